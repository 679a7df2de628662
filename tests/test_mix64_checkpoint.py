"""Whole mix64 checkpoints: config, checks, plans, what the commands say of them, running them on one rank and two."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alter import Change, config, content, tensors, without
from bitshard.checkpoint import REPORT, Checkpoint
from bitshard.errors import FormatError, PlanError
from bitshard.integrations.transformers import load
from bitshard.integrations.transformers_parallel import require_degree
from bitshard.kernels import why_not_arranged
from bitshard.layout import FORMAT_VERSION, GptqLayout, Mix64Layout
from bitshard.models import Shapes
from bitshard.nn import Mix64Linear
from bitshard.parallel import count_collectives, launch
from bitshard.plan import Padding, padding_for
from bitshard.quantconfig import QuantConfig, parse_quant_config
from bitshard.spec import MixSpec, QuantSpec
from bitshard.writer import Task, Writer
from commands import bitshard, refusal
from factory import CONFIGS, dense_model, random_checkpoint, random_mixed_weight, rewrite, token_ids

SPEC, PAPER, PLAIN = MixSpec(), MixSpec(2, 0.25, "paper"), MixSpec(3, 0.0)
# wide enough for two ranks to hold whole tiles and blocks of every matrix
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
WIDE_BIGCODE = {"n_embd": 256, "n_inner": 256, "n_head": 4}
SECTION = {
    "quant_method": "bitshard",
    **vars(SPEC),
    "bitshard": {"version": FORMAT_VERSION, "layout": "mix64", "provenance": {"source": "a model"}},
}


def logits(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the checkpoint as it runs, and of a dense model with its dequantized weights."""
    with torch.no_grad():
        return tuple(model(token_ids(96), use_cache=False).logits for model in (load(path), dense_model(path)))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_runs(tmp_path: Path, model_type: str) -> None:
    """Sizes that do not fill a block, outliers, and for odd cases the paper's metadata with strips out of order."""
    odd = list(CONFIGS).index(model_type) % 2
    sizes = {"n_embd": 96} if model_type == "gpt_bigcode" else {"hidden_size": 96}
    sizes |= {"head_dim": 24} if "head_dim" in CONFIGS[model_type] else {}
    path = random_checkpoint(
        tmp_path / "in", model_type, PAPER if odd else SPEC, outliers=0.02, ordered=not odd, **sizes
    )
    found, expected = logits(path)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())
    result = bitshard("verify", path)
    assert result.code == 0, result.stderr


@pytest.mark.parametrize("spec", [PLAIN, MixSpec(8, 0.0), MixSpec(2, 0.5)], ids=str)
def test_every_width_runs(tmp_path: Path, spec: MixSpec) -> None:
    found, expected = logits(random_checkpoint(tmp_path / "in", "llama", spec))
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())


def test_a_16_bit_model_keeps_second_order_scales_as_they_are(tmp_path: Path) -> None:
    """Loading in bfloat16 must not round the float16 steps and offsets."""
    path = random_checkpoint(tmp_path / "in", "llama", SPEC, outliers=0.02)
    layer = load(path, dtype=torch.bfloat16).get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, Mix64Linear)
    expected = Checkpoint.open(path).weight("model.layers.1.mlp.down_proj").dequantize(torch.bfloat16)
    assert torch.equal(layer(torch.eye(128, dtype=torch.bfloat16)), expected.T)


def run_cases(paths: list[str]) -> list[tuple[torch.Tensor, dict[str, int], dict[str, tuple[int, ...]]]]:
    """On one rank of two: logits, collectives, and the shapes of the slices it holds."""
    torch.set_num_threads(1)
    results = []
    for path in paths:
        model = load(Path(path), 2)
        with torch.no_grad(), count_collectives() as traffic:
            found = model(token_ids(96), use_cache=False).logits
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            if isinstance(module, Mix64Linear):
                strips = (module.file_shape or module.qweight.shape)[1]
                shapes[f"{name}.qweight"] = (module.rows, strips)
        results.append((found, traffic.calls, shapes))
    return results


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Every architecture, outliers and biases among it; two AllReduces in a block, and half of every matrix."""
    paths = []
    for model_type in CONFIGS:
        sizes: dict[str, Any] = WIDE_BIGCODE if model_type == "gpt_bigcode" else WIDE
        paths.append(random_checkpoint(tmp_path / model_type, model_type, SPEC, outliers=0.01, **sizes))
    paths.append(random_checkpoint(tmp_path / "3-bit", "llama", PLAIN, **WIDE))
    ranks = launch(2, run_cases, [str(path) for path in paths])
    for i, path in enumerate(paths):
        checkpoint = Checkpoint.open(path)
        with torch.no_grad():
            expected = load(path)(token_ids(96), use_cache=False).logits
        for found, calls, _ in (rank[i] for rank in ranks):
            torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())
            assert calls == {"AllReduce": 2 * checkpoint.sizes.layers}, path
        plan = checkpoint.plan()
        held = [rank[i][2] for rank in ranks]
        for name, linear in plan.linears(0):
            module, (n, strips) = plan.arch.module_name(name), checkpoint.tensor(f"{name}.qweight").shape
            half = (n, strips // 2) if linear.role == "row" else (n // 2, strips)
            if linear.name == "attn.c_attn":
                half = (256 // 2 + 2 * 64, strips)  # half of q, all of the one k and v
            assert [shapes[f"{module}.qweight"] for shapes in held] == [half] * 2
            if f"{name}.outlier_values" in checkpoint.files and linear.name != "attn.c_attn":
                entries = checkpoint.tensor(f"{name}.outlier_values").shape[0]
                assert sum(shapes[f"{module}.outlier_values"][0] for shapes in held) == entries


@pytest.mark.skipif(bool(why_not_arranged("cpu")), reason="the C kernels were not built")
def test_what_runs_in_plain_torch_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(random_checkpoint(tmp_path / "mixed", "llama", SPEC))
    load(random_checkpoint(tmp_path / "3-bit", "llama", PLAIN), backend="reference")
    assert not caplog.records
    load(random_checkpoint(tmp_path / "slow", "llama", PLAIN))
    [record] = caplog.records
    assert record.getMessage().startswith(
        "plain torch runs 14 of 14 matrices, model.layers.0.mlp.down_proj first: strips of 3 bits, where kernels read 2"
    )


def test_degrees(tmp_path: Path) -> None:
    """Whole tiles of output channels, whole blocks of input channels, and no strips out of order."""
    plan = Checkpoint.open(random_checkpoint(tmp_path / "in", "llama", SPEC, **WIDE)).plan()
    assert plan.legal_degrees() == [1, 2]
    finer = replace(plan, sizes=replace(plan.sizes, kv_heads=4))
    assert finer.legal_degrees() == [1, 2, 4]
    odd = replace(finer, sizes=replace(plan.sizes, kv_heads=4, intermediate=256 + 32))
    assert {o.reason for o in odd.obstacles(4)} == {
        "288 output channels / 4 splits a tile of 64 output channels",
        "288 input channels / 4 splits a block of 64 input channels",
    }
    assert odd.legal_degrees() == [1]
    assert padding_for(odd, 4).intermediate == 512
    paper = replace(finer, spec_of=lambda name: PAPER)
    assert {o.reason for o in paper.obstacles(2)} == {"256 output channels / 2 splits a tile of 256 output channels"}
    wider = replace(paper, sizes=replace(plan.sizes, heads=8, kv_heads=8, intermediate=288))
    assert padding_for(wider, 2).intermediate == 512
    # Qwen2.5-0.5B and stories260K: more KV heads than 2 ranks of the first two numbers that were tried
    qwen = Shapes(hidden=896, intermediate=4864, heads=14, kv_heads=2, head_dim=64, layers=2, experts=0)
    assert padding_for(replace(paper, sizes=qwen), 2) == Padding(5120, 56, 8)
    stories = Shapes(hidden=64, intermediate=172, heads=8, kv_heads=4, head_dim=8, layers=2, experts=0)
    assert padding_for(replace(finer, sizes=stories), 2) == Padding(256, 32, 16)
    with pytest.raises(PlanError, match="tensor-parallel degree: found 1000; allowed: 1 to 64"):
        padding_for(finer, 1000)
    with pytest.raises(PlanError, match="choose one of these, or zero-pad: quantize its 16-bit model with --max-tp 4"):
        odd.require(4)
    with pytest.raises(PlanError, match="choose one of these$"):
        replace(finer, sizes=replace(finer.sizes, hidden=256)).require(3)


def test_a_row_matrix_with_strips_out_of_order_is_not_cut(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path / "in", "llama", SPEC, ordered=False, **WIDE))
    plan = checkpoint.plan()
    assert len(plan.gathered) == 4 and plan.legal_degrees() == [1]
    for strategy in ("tp-aware", "local-sort", "naive"):
        with pytest.raises(PlanError, match="o_proj: .* 256 input channels / 2 splits the order of its strips"):
            require_degree(plan, 2, strategy)


@pytest.mark.parametrize("spec", [SPEC, PAPER, PLAIN], ids=str)
def test_bytes_per_rank_are_those_of_the_file(tmp_path: Path, spec: MixSpec) -> None:
    outliers = 0.02 if spec.bits == 2 else 0.0
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path / "in", "mistral", spec, outliers=outliers, hidden_size=96))
    found = [t.nbytes for name in checkpoint.matrices() for t in checkpoint.matrix_tensors(name).values()]
    assert checkpoint.plan().bytes_per_rank(1) == sum(found)
    inspected = json.loads(bitshard("inspect", tmp_path / "in", "--json").stdout)
    assert [m["bytes"] for m in inspected["matrices"]] and sum(m["bytes"] for m in inspected["matrices"]) == sum(found)
    assert {m["kernel"] for m in inspected["matrices"]} <= {"cpu-int8", "reference"}


def test_a_rank_holds_half(tmp_path: Path) -> None:
    plan = Checkpoint.open(random_checkpoint(tmp_path / "in", "llama", SPEC, outliers=0.01, **WIDE)).plan()
    whole = plan.bytes_per_rank(1)
    rows = 4 * 4 * 257  # the row starts of o_proj and down_proj's outliers are as long on every rank
    assert abs(2 * plan.bytes_per_rank(2) - whole - rows) <= 100


def test_inspect_says_what_the_file_and_the_report_say(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "in", "llama", SPEC, outliers=0.02)
    names = Checkpoint.open(path).matrices()
    report = {name: {"error": i / 100, "share_4bit": 0.5} for i, name in enumerate(names)}
    (path / REPORT).write_text(json.dumps(report))
    found = json.loads(bitshard("inspect", path, "--json", "--picture", tmp_path / "map.png").stdout)
    assert (found["method"], found["layout"], found["zeros_version"]) == ("bitshard", "mix64", None)
    assert found["spec"] == vars(SPEC)
    for matrix in found["matrices"]:
        assert matrix["spec"] == vars(SPEC) and matrix["order"] == "in order" and matrix["outliers"] > 0
        assert (matrix["error"], matrix["share_4bit"]) == (report[matrix["name"]]["error"], 0.5)
        assert matrix["average_bits"] == matrix["bytes"] * 8 / (matrix["in_features"] * matrix["out_features"])
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    said = bitshard("inspect", path, "--picture", tmp_path / "drawn").stdout
    assert f"picture: {tmp_path / 'drawn.png'}" in said.replace("\n", "") and (tmp_path / "drawn.png").exists()
    table = bitshard("inspect", path).stdout
    assert "mix64 version 1" in table and "outliers" in table and "4-bit" in table
    rows = [line.split() for line in bitshard("inspect", path, "--layers").stdout.splitlines()]
    assert ["1", "down_proj", "128", "x", "64"] in [row[:5] for row in rows]
    assert "unknown" in refusal("inspect", path, "--picture", tmp_path / "map.unknown")
    (path / REPORT).write_text(json.dumps({names[0]: {"error": "small"}}))
    assert "found error 'small'; allowed: a number" in refusal("inspect", path)


def test_one_matrix_may_be_wider(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`, with this format's settings."""
    path = random_checkpoint(tmp_path / "in", "llama", SPEC)
    name = "model.layers.1.mlp.down_proj"
    weight = random_mixed_weight(64, 128, MixSpec(2, 0.5), torch.Generator().manual_seed(0))
    rewrite(path, {f"{name}.{suffix}": tensor for suffix, tensor in Mix64Layout().pack(weight).items()})
    assert "down_proj.qextra: found shape" in refusal("verify", path)
    section = SECTION | {"dynamic": {r"+:.*\.1\.mlp\.down_proj": {"fraction_4bit": 0.5}}}
    config(quantization_config=section)(path)
    assert bitshard("verify", path).code == 0
    assert torch.equal(Checkpoint.open(path).weight(name).dequantize(), weight.dequantize())
    found, expected = logits(path)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())


def test_a_section_is_read_as_it_was_written() -> None:
    overrides = ((r".*\.down_proj", {"fraction_4bit": 0.5}), (r".*\.q_proj", None))
    written = QuantConfig(SPEC, Mix64Layout(), overrides, SECTION["bitshard"])
    assert parse_quant_config(json.loads(json.dumps(written.to_json())), "config.json") == replace(
        written, extra={"lm_head": False}
    )
    assert written.to_json()["quant_method"] == "bitshard" and "checkpoint_format" not in written.to_json()
    assert written.spec_of("model.layers.0.mlp.down_proj") == MixSpec(2, 0.5)
    assert written.spec_of("model.layers.0.self_attn.q_proj") is None


def ours(**changes: Any) -> dict[str, Any]:
    return SECTION | {"bitshard": {"version": FORMAT_VERSION, "layout": "mix64"} | changes}


SECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "newer": (ours(version=FORMAT_VERSION + 1), "found bitshard format version 2; allowed: 1 or older"),
    "unknown layout": (ours(layout="mix65"), "found bitshard layout 'mix65'; allowed: 'gptq' or 'mix64'"),
    "another method": (SECTION | {"quant_method": "gptq"}, "found quant_method 'gptq' with layout 'mix64'"),
    "no layout": (SECTION | {"bitshard": {}}, "found quant_method 'bitshard' with layout 'gptq'"),
    "no fraction": ({k: v for k, v in SECTION.items() if k != "fraction_4bit"}, "found no fraction_4bit"),
    "bits": (SECTION | {"bits": 5}, "found bits = 5; allowed: 2, 3, 4 or 8"),
    "fraction": (SECTION | {"fraction_4bit": 0.3}, "found fraction_4bit = 0.3"),
    "metadata": (SECTION | {"metadata": ["fine"]}, r"found metadata = \['fine'\]"),
    "override": (SECTION | {"dynamic": {"x": {"bits": 3}}}, "dynamic 'x': found fraction_4bit = 0.25 with bits 3"),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_section_that_means_nothing_is_refused(case: str) -> None:
    section, sentence = SECTIONS[case]
    with pytest.raises(FormatError, match=sentence):
        parse_quant_config(section, "config.json")


def halved(part: str) -> Change:
    def change(folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        name = next(name for name in checkpoint.files if name.endswith(part))
        tensors({name: checkpoint.tensor(name)[: len(checkpoint.tensor(name)) // 2].clone()})(folder)

    return change


DAMAGE: dict[str, tuple[Change, str]] = {
    "no scales": (without("0.mlp.up_proj.scales2"), r"up_proj.scales2: found no such tensor"),
    "half a matrix": (halved("gate_proj.qweight"), r"gate_proj.qweight: found 64 x 64 channels; allowed: 64 x 128"),
    "a tensor of gptq": (
        tensors({"model.layers.0.mlp.up_proj.g_idx": torch.zeros(64, dtype=torch.int32)}),
        "up_proj.g_idx: found an unknown tensor of a quantized matrix",
    ),
    "other sizes": (config(intermediate_size=256), "gate_proj.qweight: found 64 x 128 channels; allowed: 64 x 256"),
    "a gptq file beside it": (
        content("quantize_config.json", json.dumps({"bits": 4, "group_size": 16}).encode()),
        "quantize_config.json: found layout gptq, and mix64 in config.json",
    ),
    "a gptq shard": (
        tensors({}, {"format": "pt", "bitshard": json.dumps({"version": 1, "layout": "gptq"})}),
        "model.safetensors: found bitshard layout 'gptq'; allowed: 'mix64', as config.json has it",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    change, sentence = DAMAGE[case]
    path = random_checkpoint(tmp_path / "in", "llama", SPEC, outliers=0.02)
    change(path)
    with pytest.raises(FormatError, match=sentence):
        Checkpoint.open(path).check_matrices()
    assert re.search(sentence, refusal("verify", path))


def test_what_is_for_gptq_alone_says_so(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "in", "llama", SPEC)
    sentence = refusal("convert", path, tmp_path / "out")
    assert "found layout mix64, whose channels are in order already" in sentence and not (tmp_path / "out").exists()
    assert "found layout mix64, which no conversion writes" in refusal("verify", path, "--against", path)


def test_plan_counts_the_same_before_and_after(tmp_path: Path) -> None:
    path = random_checkpoint(tmp_path / "in", "llama", SPEC, **WIDE)
    after = json.loads(bitshard("plan", path, "--json").stdout)
    (tmp_path / "dense").mkdir()
    dense = json.loads((path / "config.json").read_text())
    del dense["quantization_config"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(dense))
    before = json.loads(bitshard("plan", tmp_path / "dense", "--json").stdout)
    advice = "Do it: `quantize --max-tp 4`", "Do it: quantize its 16-bit model with --max-tp 4"
    for model, says in zip((tmp_path / "dense", path), advice, strict=True):
        assert says in " ".join(bitshard("plan", model, "--pad", 4).stdout.split())
    assert before.pop("quantized") is False and after.pop("quantized") is True
    assert before["spec"] == vars(SPEC) and before | {"model": ""} == after | {"model": ""}
    assert 2.9 < before["average_bits"] < 2.91
    assert "format: found 'awq'" in refusal("plan", path, "--format", "awq")
    assert "metadata: found paper" in refusal("plan", path, "--bits", 3, "--metadata", "paper")


def finished(out: Path, source: Path, spec: MixSpec | QuantSpec, report: dict[str, Any] | None) -> Path:
    layout = Mix64Layout() if isinstance(spec, MixSpec) else GptqLayout(2)
    checkpoint = Checkpoint.open(source)
    writer = Writer(out, ["all"], Task({}, {}), layout.name)
    writer.write("all", checkpoint.read(checkpoint.files))
    section = {"version": FORMAT_VERSION, "layout": layout.name}
    writer.finish(source, checkpoint.config, QuantConfig(spec, layout, (), section).to_json(), report)
    return out


def test_a_written_folder_is_read_again(tmp_path: Path) -> None:
    """One config file, its report, and the layout in every shard; a source's report stays with the source."""
    source = random_checkpoint(tmp_path / "in", "llama", SPEC)
    first = finished(tmp_path / "first", source, SPEC, {"a": {"error": 0.5}})
    assert json.loads((first / REPORT).read_text()) == {"a": {"error": 0.5}}
    second = finished(tmp_path / "second", first, SPEC, None)
    assert {path.name for path in second.iterdir()} == {path.name for path in first.iterdir()} - {REPORT}
    assert not (second / "quantize_config.json").exists()
    assert bitshard("verify", second).code == 0
    gptq = random_checkpoint(tmp_path / "gptq", "llama", QuantSpec(4, 16))
    assert (finished(tmp_path / "third", gptq, QuantSpec(4, 16), None) / "quantize_config.json").exists()


@pytest.mark.parametrize("spec", [SPEC, PLAIN], ids=str)
def test_lm_head_may_be_quantized_too(tmp_path: Path, spec: MixSpec) -> None:
    """A matrix outside the blocks: all its stored channels are real."""
    path = random_checkpoint(tmp_path / "in", "llama", spec)
    weight = random_mixed_weight(96, 64, spec, torch.Generator().manual_seed(0))
    packed = {f"lm_head.{suffix}": tensor for suffix, tensor in Mix64Layout().pack(weight).items()}
    tensors({"lm_head.weight": None, **packed})(path)
    found, expected = logits(path)
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-5 * expected.abs().max().item())
