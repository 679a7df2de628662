"""convert: the same weights in another order, proved without convert's own bookkeeping."""

import json
from pathlib import Path

import pytest
import torch

from bitshard.checkpoint import Checkpoint
from bitshard.convert import convert
from bitshard.errors import PlanError
from bitshard.integrations.transformers import load
from bitshard.layout import GptqLayout
from bitshard.models import architecture, block_linears, mlp_paths, shapes
from bitshard.quantconfig import QuantConfig
from bitshard.quantized import trivial_g_idx
from bitshard.spec import QuantSpec
from factory import ASSETS, CONFIGS, dense_model, random_checkpoint, random_weight, rewrite, token_ids, write_folder

SYM = QuantSpec(4, 16, sym=True, desc_act=True)
ASYM3 = QuantSpec(3, 32, sym=False, desc_act=True)
REAL = ASSETS / "gptq-smollm2-4l"
needs_assets = pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}: the shared assets are not on this machine")


def assert_same_weights(source: Checkpoint, out: Checkpoint) -> None:
    """Every matrix bit for bit: MLPs under the order that down's g_idx asks for, all others as they were."""
    arch, sizes = source.arch, source.sizes
    seen = set()
    for layer in range(sizes.layers):
        prefix = f"{arch.blocks}.{layer}."
        for columns, row in mlp_paths(arch, sizes):
            before, after = source.weight(prefix + row), out.weight(prefix + row)
            perm = torch.argsort(before.g_idx_K, stable=True)
            assert torch.equal(after.dequantize(), before.dequantize()[perm])
            assert after.is_trivial
            seen.add(prefix + row)
            for name in columns:
                before, after = source.weight(prefix + name), out.weight(prefix + name)
                parts = before.dequantize().split(len(perm), dim=1)
                assert torch.equal(after.dequantize(), torch.cat([part[:, perm] for part in parts], dim=1))
                assert torch.equal(after.g_idx_K, before.g_idx_K)
                if before.bias_N is not None:
                    parts = before.bias_N.split(len(perm))
                    assert torch.equal(after.bias_N, torch.cat([part[perm] for part in parts]))
                seen.add(prefix + name)
    for name in set(source.matrices()) - seen:
        for suffix, tensor in source.matrix_tensors(name).items():
            assert torch.equal(out.matrix_tensors(name)[suffix], tensor)
    for name in set(source.files) - {n for m in source.matrices() for n in source.files if n.startswith(m + ".")}:
        assert torch.equal(out.tensor(name), source.tensor(name)), name


def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load(path)(ids).logits


def assert_equal_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 logits whose sums run in another order: a thousand roundings of 2**-24 at most."""
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(("spec", "version"), [(SYM, 1), (ASYM3, 2)])
def test_every_architecture(tmp_path: Path, model_type: str, spec: QuantSpec, version: int) -> None:
    source = random_checkpoint(tmp_path / "in", model_type, spec, seed=version, zeros_version=version)
    report = convert(source, tmp_path / "out")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    experts = max(before.sizes.experts, 1)
    assert report.mlps_reordered == before.sizes.layers * experts
    assert_same_weights(before, after)
    ids = token_ids(96)
    with torch.no_grad():
        expected = dense_model(source)(ids).logits
    assert_equal_to_rounding(logits(source, ids), expected)
    assert_equal_to_rounding(logits(tmp_path / "out", ids), expected)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_other_widths(tmp_path: Path, bits: int, seed: int) -> None:
    source = random_checkpoint(tmp_path / "in", "llama", QuantSpec(bits, 32, False, True), seed)
    convert(source, tmp_path / "out")
    assert_same_weights(Checkpoint.open(source), Checkpoint.open(tmp_path / "out"))


@needs_assets
@pytest.mark.parametrize("name", ["sym-g64-v1", "asym-g32-v2"])
def test_a_peers_checkpoint(tmp_path: Path, name: str) -> None:
    report = convert(REAL / name, tmp_path / "out")
    assert report.degrees == [1, 3] and report.mlps_reordered == 4
    # 9 query heads over 3 KV heads, groups over all of them: nothing inside a KV group to absorb
    assert sorted(report.kept) == [f"model.layers.{i}.self_attn.o_proj" for i in range(4)]
    group = 64 if name.startswith("sym") else 32
    row_bytes = 576 * 2 + 576 // 8 * 4
    for cost in report.kept.values():
        assert cost[3] == 576 // group * row_bytes * 2 // 3  # two thirds of the scales and zeros are other ranks'
    assert_same_weights(Checkpoint.open(REAL / name), Checkpoint.open(tmp_path / "out"))
    ids = token_ids(4096)
    with torch.no_grad():
        expected = dense_model(REAL / name)(ids).logits
    assert_equal_to_rounding(logits(tmp_path / "out", ids), expected)


def test_converting_twice_changes_no_byte(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "in", "mixtral", SYM)
    convert(tmp_path / "in", tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    once = {p.name: p.read_bytes() for p in (tmp_path / "once").iterdir()}
    twice = {p.name: p.read_bytes() for p in (tmp_path / "twice").iterdir()}
    assert once == twice


def value_ordered(source: Path, same_in_group: bool) -> None:
    """Give o_proj a g_idx whose order stays inside each head; the heads of a KV group agree on it or do not."""
    checkpoint = Checkpoint.open(source)
    sizes, generator = checkpoint.sizes, torch.Generator().manual_seed(3)
    changes = {}
    for layer in range(sizes.layers):
        heads = []
        for _ in range(sizes.kv_heads):
            order = torch.randperm(sizes.head_dim, generator=generator)
            for _ in range(sizes.heads // sizes.kv_heads):
                heads.append(order if same_in_group else torch.randperm(sizes.head_dim, generator=generator))
        groups_per_head = sizes.head_dim // SMALL.group_size
        numbers = torch.randperm(sizes.heads * groups_per_head, generator=generator).view(sizes.heads, -1)
        rows = [numbers[h][order // SMALL.group_size] for h, order in enumerate(heads)]
        name = f"{checkpoint.arch.blocks}.{layer}.{checkpoint.arch.attention.row}"
        changes[f"{name}.g_idx"] = torch.cat(rows).to(torch.int32)
    rewrite(source, changes)


SMALL = QuantSpec(4, 8, sym=False, desc_act=True)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "glm", "mixtral"])
def test_an_order_inside_kv_groups_goes_into_v(tmp_path: Path, model_type: str) -> None:
    source = random_checkpoint(tmp_path / "in", model_type, SMALL)
    value_ordered(source, same_in_group=True)
    report = convert(source, tmp_path / "out")
    assert report.attentions_reordered == 2 and not report.kept
    after = Checkpoint.open(tmp_path / "out")
    assert after.weight("model.layers.1.self_attn.o_proj").is_trivial
    assert not after.plan().gathered
    ids = token_ids(96)
    with torch.no_grad():
        assert_equal_to_rounding(logits(tmp_path / "out", ids), dense_model(source)(ids).logits)


def test_an_order_that_query_heads_do_not_share_is_kept_and_reported(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "in", "llama", SMALL)
    value_ordered(source, same_in_group=False)
    report = convert(source, tmp_path / "out")
    assert report.attentions_reordered == 0
    assert set(report.kept) == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    assert all(cost[1] == 0 and cost[2] > 0 for cost in report.kept.values())
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for part in ("v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{part}"
        assert torch.equal(after.weight(name).dequantize(), before.weight(name).dequantize())


def test_nothing_left_to_gather_is_a_plain_file(tmp_path: Path) -> None:
    """Regular inputs and an irregular down projection: what is left has desc_act=false and consecutive groups."""
    source = random_checkpoint(tmp_path / "in", "llama", SYM)
    checkpoint = Checkpoint.open(source)
    regular = [name for name in checkpoint.matrices() if not name.endswith("down_proj")]
    rewrite(source, {f"{n}.g_idx": trivial_g_idx(checkpoint.weight(n).in_features, 16) for n in regular})
    report = convert(source, tmp_path / "out")
    assert not report.desc_act and report.input_gathers == 0 and not report.kept
    after = Checkpoint.open(tmp_path / "out")
    assert all(after.weight(name).is_trivial for name in after.matrices())
    for file in ("config.json", "quantize_config.json"):
        section = json.loads((tmp_path / "out" / file).read_text())
        assert section.get("quantization_config", section)["desc_act"] is False


def chatglm(folder: Path, spec: QuantSpec) -> Path:
    """A ChatGLM checkpoint: no transformers class, so tensors and config only."""
    config = {
        "model_type": "chatglm",
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "num_layers": 2,
    }
    arch, generator = architecture(config), torch.Generator().manual_seed(0)
    tensors = {"transformer.embedding.word_embeddings.weight": torch.randn(8, 64, generator=generator)}
    for layer in range(2):
        for linear in block_linears(arch, shapes(arch, config)):
            weight = random_weight(
                linear.in_features, linear.out_features, spec, generator, bias="query" in linear.name
            )
            for suffix, tensor in GptqLayout(2).pack(weight).items():
                tensors[f"transformer.encoder.layers.{layer}.{linear.name}.{suffix}"] = tensor
        tensors[f"transformer.encoder.layers.{layer}.input_layernorm.weight"] = torch.ones(64)
    write_folder(folder, config, tensors, QuantConfig(spec, GptqLayout(2)))
    return folder


def chatglm_block(checkpoint: Checkpoint, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ChatGLM's MLP, and its attention with softmax left out: all that an order of channels could change."""
    prefix = "transformer.encoder.layers.1."
    gate, up = (x @ checkpoint.weight(prefix + "mlp.dense_h_to_4h").dequantize()).chunk(2, dim=-1)
    mlp = (torch.nn.functional.silu(gate) * up) @ checkpoint.weight(prefix + "mlp.dense_4h_to_h").dequantize()
    fused = checkpoint.weight(prefix + "self_attention.query_key_value")
    assert fused.bias_N is not None
    q, k, v = (x @ fused.dequantize() + fused.bias_N).split([64, 32, 32], dim=-1)
    heads = v.view(-1, 2, 1, 16).expand(-1, 2, 2, 16) * (q.view(-1, 2, 2, 16) * k.view(-1, 2, 1, 16)).sum(-1, True)
    return mlp, heads.reshape(-1, 64) @ checkpoint.weight(prefix + "self_attention.dense").dequantize()


def test_chatglm_fused_matrices(tmp_path: Path) -> None:
    source = chatglm(tmp_path / "in", SMALL)
    value_ordered(source, same_in_group=True)
    report = convert(source, tmp_path / "out")
    assert report.mlps_reordered == report.attentions_reordered == 2
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    for found, expected in zip(chatglm_block(after, x), chatglm_block(before, x), strict=True):
        assert_equal_to_rounding(found, expected)


@pytest.mark.parametrize("model_type", ["llama", "glm", "gpt_bigcode", "mixtral"])
def test_padding_changes_no_logit(tmp_path: Path, model_type: str) -> None:
    name = "n_inner" if model_type == "gpt_bigcode" else "intermediate_size"
    source = random_checkpoint(tmp_path / "in", model_type, SYM, **{name: 112})
    convert(source, tmp_path / "plain")
    with pytest.raises(PlanError, match="112 input channels / 2 splits a group of 16"):
        Checkpoint.open(tmp_path / "plain").plan().require(2)
    report = convert(source, tmp_path / "out", pad_to=2)
    assert report.padded["intermediate"] == 128 and 2 in report.degrees
    ids = token_ids(96)
    with torch.no_grad():
        assert_equal_to_rounding(logits(tmp_path / "out", ids), dense_model(source)(ids).logits)


def test_padding_whole_kv_groups(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "in", "llama", SYM, num_attention_heads=6, num_key_value_heads=3,
                               hidden_size=96)  # fmt: skip
    report = convert(source, tmp_path / "out", pad_to=4)
    assert report.padded == {"intermediate": 128, "heads": 8, "kv_heads": 4} and 4 in report.degrees
    ids = token_ids(96)
    with torch.no_grad():
        assert_equal_to_rounding(logits(tmp_path / "out", ids), dense_model(source)(ids).logits)
