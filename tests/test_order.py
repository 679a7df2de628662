"""The order of a 16-bit model: every freedom of every architecture changes no output, and orders are dealt as promised.

Shape legend: H hidden, K input channels, L layers, J KV heads, D channels of a head, B blocks.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bitshard.checkpoint import Checkpoint
from bitshard.edit import BlockEdit
from bitshard.errors import PlanError
from bitshard.models import architecture, shapes
from bitshard.plan import TPPlan
from bitshard.reorder import ModelOrder, deal, deal_within, kv_group_order
from dense import STORIES, stories_model
from factory import CONFIGS, token_ids

FREEDOMS = ("hidden_H", "intermediate", "values_LJD", "kv_groups_LJ")
# three KV groups: a swap of two would look the same in both directions
WIDER = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
CASES: dict[str, tuple[str, dict[str, Any]]] = {t: (t, {**config, **WIDER}) for t, config in CONFIGS.items()}
CASES["gpt_bigcode"] = ("gpt_bigcode", CONFIGS["gpt_bigcode"])
CASES["glm4"] = ("glm4", {**CONFIGS["glm"], **WIDER, "attention_bias": True})
CASES["llama with biases"] = ("llama", {**CASES["llama"][1], "attention_bias": True, "mlp_bias": True})
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A float32 model in which no two channels are alike: norms, biases and embeddings are random too."""
    model_type, config = CASES[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        parameter.data += 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
        if "bias" in name:
            assert parameter.dim() == 1
    path = tmp_path_factory.mktemp("source")
    model.save_pretrained(path)
    return Checkpoint.open(path)


def random_order(plan: TPPlan, seed: int = 0, freedoms: tuple[str, ...] = FREEDOMS) -> ModelOrder:
    generator, sizes = torch.Generator().manual_seed(seed), plan.sizes
    order = ModelOrder.identity(plan.arch, sizes)

    def shuffled(perm: torch.Tensor) -> torch.Tensor:
        return torch.rand(perm.shape, generator=generator).argsort(-1)

    every = {
        "hidden_H": shuffled(order.hidden_H),
        "intermediate": {name: shuffled(perm_I) for name, perm_I in order.intermediate.items()},
        "values_LJD": shuffled(order.values_LJD),
        # a rotation is no identity and, of three groups, not its own inverse
        "kv_groups_LJ": torch.stack([perm_J.roll(1 + i % 2) for i, perm_J in enumerate(order.kv_groups_LJ)]),
    }
    return replace(order, **{name: every[name] for name in freedoms})


def ordered(plan: TPPlan, order: ModelOrder, tensors: Tensors) -> Tensors:
    """A whole model's tensors in the new order, as quantizing would go through them."""
    order.check(plan.arch, plan.sizes)
    blocks = {layer: f"{plan.arch.blocks}.{layer}." for layer in range(plan.sizes.layers)}
    outside = {n: t for n, t in tensors.items() if not n.startswith(tuple(blocks.values()))}
    edit = BlockEdit()
    edit.order_outside(order, outside)
    out = edit.apply_all(outside)
    for layer, prefix in blocks.items():
        own, edit = {n: t for n, t in tensors.items() if n.startswith(prefix)}, BlockEdit()
        edit.order_block(plan, order, layer, own)
        out |= edit.apply_all(own)
    assert {name: t.shape for name, t in out.items()} == {name: t.shape for name, t in tensors.items()}
    return out


def inverse(order: ModelOrder) -> ModelOrder:
    """The order that takes every channel back. v's orders are listed as the reordered file has its heads."""
    moved_LJD = order.values_LJD.gather(1, order.kv_groups_LJ[..., None].expand_as(order.values_LJD))
    return ModelOrder(
        order.hidden_H.argsort(),
        {name: perm_I.argsort() for name, perm_I in order.intermediate.items()},
        moved_LJD.argsort(-1),
        order.kv_groups_LJ.argsort(-1),
    )


def logits(path: Path, vocab: int = 96) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids(vocab)).logits


def ordered_logits(source: Checkpoint, order: ModelOrder, out: Path, vocab: int = 96) -> torch.Tensor:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(dict(source.config)))
    save_file(ordered(source.plan(), order, source.read(source.files)), out / "model.safetensors", {"format": "pt"})
    return logits(out, vocab)


def assert_equal_to_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())


@pytest.mark.parametrize("freedoms", [FREEDOMS, *((name,) for name in FREEDOMS)], ids=["all", *FREEDOMS])
def test_no_output_changes(source: Checkpoint, freedoms: tuple[str, ...], tmp_path: Path) -> None:
    order = random_order(source.plan(), 1, freedoms)
    assert_equal_to_rounding(ordered_logits(source, order, tmp_path / "out"), logits(source.path))


def test_an_order_and_its_inverse_change_no_bit(source: Checkpoint) -> None:
    plan, tensors = source.plan(), source.read(source.files)
    order = random_order(plan, 2)
    there = ordered(plan, order, tensors)
    back = ordered(plan, inverse(order), there)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    # every tensor moved, but for those that know nothing of the stream
    still = {name.split(".", 3)[-1] for name, tensor in tensors.items() if torch.equal(there[name], tensor)}
    assert still <= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


CHATGLM = {
    "model_type": "chatglm",
    "hidden_size": 48,
    "ffn_hidden_size": 40,
    "num_attention_heads": 6,
    "multi_query_group_num": 3,
    "kv_channels": 8,
    "num_layers": 2,
}


def chatglm_tensors(sizes: Any, vocab: int) -> Tensors:
    torch.manual_seed(0)
    h, i, d = sizes.hidden, sizes.intermediate, sizes.head_dim
    qkv = (sizes.heads + 2 * sizes.kv_heads) * d
    wanted = {
        "transformer.embedding.word_embeddings.weight": (vocab, h),
        "transformer.encoder.final_layernorm.weight": (h,),
        "transformer.output_layer.weight": (vocab, h),
    }
    for layer in range(sizes.layers):
        block = f"transformer.encoder.layers.{layer}"
        wanted |= {
            f"{block}.input_layernorm.weight": (h,),
            f"{block}.self_attention.query_key_value.weight": (qkv, h),
            f"{block}.self_attention.query_key_value.bias": (qkv,),
            f"{block}.self_attention.dense.weight": (h, sizes.heads * d),
            f"{block}.post_attention_layernorm.weight": (h,),
            f"{block}.mlp.dense_h_to_4h.weight": (2 * i, h),
            f"{block}.mlp.dense_4h_to_h.weight": (h, i),
        }
    tensors = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in wanted.items()}
    # a table of angles, as real files have it: no weight, and not on the stream
    return tensors | {"transformer.rotary_pos_emb.inv_freq": torch.rand(d // 2)}


def chatglm_logits(sizes: Any, tensors: Tensors, tokens_L: torch.Tensor) -> torch.Tensor:
    """What its own modelling code computes, in few lines; transformers runs this model with remote code only."""
    d, shared, hidden = sizes.head_dim, sizes.heads // sizes.kv_heads, sizes.hidden
    turns = torch.outer(torch.arange(len(tokens_L)), tensors["transformer.rotary_pos_emb.inv_freq"]).repeat(1, 2)

    def rotated(heads_LHD: torch.Tensor) -> torch.Tensor:
        a, b = heads_LHD.chunk(2, dim=-1)
        return heads_LHD * turns.cos()[:, None] + torch.cat([-b, a], dim=-1) * turns.sin()[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (hidden,), tensors[f"{name}.weight"], 1e-5)

    x = tensors["transformer.embedding.word_embeddings.weight"][tokens_L]
    for layer in range(sizes.layers):
        block = f"transformer.encoder.layers.{layer}"
        own = {n.removeprefix(f"{block}."): t for n, t in tensors.items()}
        fused = "self_attention.query_key_value"
        qkv = F.linear(norm(x, f"{block}.input_layernorm"), own[f"{fused}.weight"], own[f"{fused}.bias"])
        q, k, v = qkv.split([sizes.heads * d, sizes.kv_heads * d, sizes.kv_heads * d], dim=-1)
        q, k = rotated(q.unflatten(-1, (-1, d))), rotated(k.unflatten(-1, (-1, d))).repeat_interleave(shared, 1)
        v = v.unflatten(-1, (-1, d)).repeat_interleave(shared, 1)
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True)
        x = x + F.linear(mixed[0].transpose(0, 1).flatten(1), own["self_attention.dense.weight"])
        y = F.linear(norm(x, f"{block}.post_attention_layernorm"), own["mlp.dense_h_to_4h.weight"])
        gate, up = y.chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, own["mlp.dense_4h_to_h.weight"])
    return F.linear(norm(x, "transformer.encoder.final_layernorm"), tensors["transformer.output_layer.weight"])


@pytest.mark.parametrize("freedoms", [FREEDOMS, *((name,) for name in FREEDOMS)], ids=["all", *FREEDOMS])
def test_chatglm(freedoms: tuple[str, ...]) -> None:
    arch = architecture(CHATGLM)
    plan = TPPlan(arch, shapes(arch, CHATGLM), lambda name: None)
    tensors, tokens_L = chatglm_tensors(plan.sizes, 50), token_ids(50)[0]
    order = random_order(plan, 3, freedoms)
    moved = ordered(plan, order, tensors)
    assert_equal_to_rounding(chatglm_logits(plan.sizes, moved, tokens_L), chatglm_logits(plan.sizes, tensors, tokens_L))
    back = ordered(plan, inverse(order), moved)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}: the shared assets are not on this machine")
def test_real_weights_in_orders_that_were_chosen(tmp_path: Path) -> None:
    """stories260K ordered by the norms of its own columns."""
    source = Checkpoint.open(stories_model(tmp_path / "stories"))
    plan, tensors = source.plan(), source.read(source.files)
    sizes, columns = plan.sizes, {name: tensors[f"{name}.weight"].square().sum(0) for name in named_rows(plan)}
    groups, values = [], []
    for layer in range(sizes.layers):
        sensitivity_K = columns[f"model.layers.{layer}.self_attn.o_proj"]
        groups.append(kv_group_order(sensitivity_K.view(sizes.kv_heads, -1).sum(1)))
        values.append(deal_within(sensitivity_K, sizes, groups[-1]))
    order = ModelOrder(
        deal(tensors["model.layers.0.self_attn.q_proj.weight"].square().sum(0)),
        {name: deal(sensitivity) for name, sensitivity in columns.items() if "mlp" in name},
        torch.stack(values),
        torch.stack(groups),
    )
    found = ordered_logits(source, order, tmp_path / "out", 512)
    assert_equal_to_rounding(found, logits(source.path, 512))


def named_rows(plan: TPPlan) -> list[str]:
    return [n for layer in range(plan.sizes.layers) for n, linear in plan.linears(layer) if linear.role == "row"]


def llama_plan(**changes: int) -> TPPlan:
    config = {**CASES["llama"][1], "model_type": "llama", **changes}
    arch = architecture(config)
    return TPPlan(arch, shapes(arch, config), lambda name: None)


def test_what_is_no_order_of_this_model_is_refused_by_name() -> None:
    plan, row = llama_plan(), "model.layers.1.mlp.down_proj"
    good = random_order(plan)
    good.check(plan.arch, plan.sizes)
    twice, short = good.hidden_H.clone(), good.intermediate[row][:-1]
    twice[0] = twice[1]
    for says, broken in {
        r"order of hidden_H: found \[96\] numbers that are no permutation": replace(good, hidden_H=twice),
        r"order of hidden_H: found \[96\] numbers": replace(good, hidden_H=good.hidden_H.int()),
        r"layers.1.mlp.down_proj: found \[127\] .* \[128\] with each of 0 to 127": replace(
            good, intermediate={**good.intermediate, row: short}
        ),
        r"layers.1.mlp.down_proj: found one without": replace(
            good, intermediate={n: p for n, p in good.intermediate.items() if n != row}
        ),
        r"order of nothing: found one without": replace(good, intermediate={**good.intermediate, "nothing": short}),
        r"order of values_LJD: found \[2, 3, 8\]": replace(good, values_LJD=good.values_LJD[..., :8]),
        r"order of kv_groups_LJ: found \[1, 3\]": replace(good, kv_groups_LJ=good.kv_groups_LJ[:1]),
    }.items():
        with pytest.raises(PlanError, match=says):
            broken.check(plan.arch, plan.sizes)


@pytest.mark.parametrize("name", ["input_layernorm.weight", "self_attn.q_proj.weight", "mlp.down_proj.weight"])
def test_a_tensor_of_other_sizes_is_refused_by_name(name: str) -> None:
    plan, edit = llama_plan(), BlockEdit()
    tensors = {f"model.layers.0.{name}": torch.zeros(200) if "norm" in name else torch.zeros(200, 200)}
    edit.order_block(plan, random_order(plan), 0, tensors)
    with pytest.raises(PlanError, match=rf"layers.0.{name}: found shape \[200.* channels in dimension 0"):
        edit.apply_all(tensors)


numbers = st.one_of(st.floats(0, 1), st.floats(0, 1e6), st.sampled_from([0.0, 1.0]))
sensitivities = st.lists(numbers, min_size=1, max_size=400).map(lambda values: torch.tensor(values).double())


@given(sensitivities, st.sampled_from([16, 64, 128]))
def test_a_deal_puts_the_most_sensitive_first_and_blocks_are_alike(s_K: torch.Tensor, block: int) -> None:
    perm = deal(s_K, block)
    assert torch.equal(perm.sort().values, torch.arange(len(s_K)))
    assert torch.equal(perm, deal(s_K, block))
    dealt, falling = s_K[perm], s_K.sort(descending=True).values
    places = torch.arange(len(s_K)) % block
    for strip in (4, 16, block):  # the firsts of all blocks are the most sensitive of all
        first = dealt[places < strip]
        assert torch.equal(first.sort(descending=True).values, falling[: len(first)])
    whole_BS = dealt[: len(s_K) // block * block].view(-1, block)
    assert (whole_BS.diff(dim=1) <= 0).all()
    if len(whole_BS):
        sums_B = whole_BS.sum(1)
        assert sums_B.max() - sums_B.min() <= (falling[0] - falling[-1]) * (1 + 1e-9) + 1e-9


def test_a_deal_of_like_channels_keeps_their_order_and_one_block_is_a_sort() -> None:
    assert torch.equal(deal(torch.ones(128)), torch.arange(128).view(64, 2).T.flatten())
    s_K = torch.rand(300, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    assert torch.equal(deal(s_K, 300), torch.argsort(s_K, descending=True, stable=True))


def test_a_deal_evens_out_what_it_can() -> None:
    """64 blocks: 0.001 % off the mean at most; always dealing from the same side would be 2.3 % off, the file 37 %."""
    s_K = torch.rand(4096, generator=torch.Generator().manual_seed(0)).square().double()
    in_turn_K = s_K.sort(descending=True).values.view(64, 64).T.flatten()
    for dealt_K, least, most in ((s_K[deal(s_K)], 0, 3e-5), (in_turn_K, 0.02, 0.03), (s_K, 0.3, 0.4)):
        sums_B = dealt_K.view(-1, 64).sum(1)
        assert least <= (sums_B / sums_B.mean() - 1).abs().max() < most


@given(st.sampled_from([(6, 3, 64), (4, 1, 128), (2, 2, 256), (8, 4, 192)]), st.integers(0, 9), st.sampled_from([1, 4]))
def test_heads_of_whole_blocks_are_dealt(shape: tuple[int, int, int], seed: int, power: int) -> None:
    """o's input, block by block: the 16 most sensitive first, summed over the query heads that share an order."""
    heads, kv_heads, d = shape
    plan = llama_plan(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=d)
    generator = torch.Generator().manual_seed(seed)
    s_K = torch.rand(heads * d, generator=generator) ** power
    values_JD = deal_within(s_K, plan.sizes, torch.randperm(kv_heads, generator=generator))
    summed_JD = s_K.double().view(kv_heads, -1, d).sum(1)
    for order_D, summed_D in zip(values_JD, summed_JD, strict=True):
        dealt_BS = summed_D[order_D].view(-1, 64)
        assert torch.equal(order_D.sort().values, torch.arange(d))
        assert dealt_BS[:, :16].min() >= dealt_BS[:, 16:].max()
        assert dealt_BS.sum(1).max() - dealt_BS.sum(1).min() <= summed_D.max() - summed_D.min()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "groups", "best"),
    [
        (4, 2, 32, [0, 1], [range(16), range(16)]),  # two heads in a block, the first of them meets its first strip
        (2, 2, 32, [0, 1], [range(16), range(0)]),
        (2, 2, 32, [1, 0], [range(0), range(16)]),  # group 1 comes first in the file
        (8, 2, 16, [0, 1], [range(16), range(16)]),  # four heads in a block
        (4, 4, 80, [0, 1, 2, 3], [[*range(16), *range(64, 80)], range(48, 64), range(32, 48), range(16, 32)]),
        (5, 1, 80, [0], [[*range(16), *range(64, 80)]]),  # these meet a first strip in two heads, others in one
    ],
)
def test_heads_that_share_blocks_put_the_most_sensitive_where_first_strips_are(
    heads: int, kv_heads: int, d: int, groups: list[int], best: list[Any]
) -> None:
    plan = llama_plan(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=d)
    s_K = torch.rand(heads * d, generator=torch.Generator().manual_seed(0))
    values_JD = deal_within(s_K, plan.sizes, torch.tensor(groups))
    summed_JD = s_K.double().view(kv_heads, -1, d).sum(1)
    for order_D, summed_D, places in zip(values_JD, summed_JD, best, strict=True):
        assert torch.equal(order_D.sort().values, torch.arange(d))
        falling = summed_D.argsort(descending=True)
        assert set(order_D[[*places]].tolist()) == set(falling[: len(places)].tolist())


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=24).map(torch.tensor))
def test_kv_groups_are_balanced_for_every_degree(s_J: torch.Tensor) -> None:
    """No worse than the file's order, and no two groups whose trade would make it better."""

    def unevenness(order_J: torch.Tensor) -> float:
        degrees = [t for t in range(2, len(s_J)) if len(s_J) % t == 0]
        return sum(t * s_J.double()[order_J].view(t, -1).sum(1).square().sum().item() for t in degrees)

    order_J = kv_group_order(s_J)
    assert torch.equal(order_J.sort().values, torch.arange(len(s_J)))
    found, total = unevenness(order_J), s_J.double().sum().item()
    assert found <= unevenness(torch.arange(len(s_J)))
    for a in range(len(s_J)):
        for b in range(a):
            traded = order_J.clone()
            traded[[a, b]] = order_J[[b, a]]
            assert unevenness(traded) >= found - 1e-8 * total**2


def test_kv_groups_of_eight_are_balanced_on_two_and_four_ranks() -> None:
    order_J = kv_group_order(torch.arange(8.0))
    sums = [torch.arange(8.0)[order_J].view(ranks, -1).sum(1).tolist() for ranks in (2, 4)]
    assert sums == [[14, 14], [7, 7, 7, 7]]
    assert torch.equal(kv_group_order(torch.ones(8)), torch.arange(8))


def test_a_short_last_block_has_its_share_of_the_most_sensitive() -> None:
    """172 channels are three blocks: 48 places of high precision, 16 of them in the last block of 44."""
    s_K = torch.rand(172, generator=torch.Generator().manual_seed(0))
    perm = deal(s_K)
    first = torch.cat([perm[start : start + 16] for start in (0, 64, 128)])
    assert set(first.tolist()) == set(s_K.argsort(descending=True)[:48].tolist())
    sums = [s_K[perm[start : start + 16]].sum().item() for start in (0, 64, 128)]
    assert all(abs(a - b) < 0.02 for a, b in pairwise(sums))
