"""quantize to mix64: every architecture, ordered and not, any kill point, odd sizes, and every input it must refuse."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bitshard import pipeline
from bitshard.blockwise import BlockwiseModel
from bitshard.checkpoint import Checkpoint
from bitshard.errors import BitshardError, CheckpointError, FormatError, PlanError, SolverError, SpecError
from bitshard.inspection import inspect
from bitshard.integrations.transformers import load
from bitshard.mixed import MixedWeight
from bitshard.ordering import choose_order
from bitshard.pipeline import Calibration, QuantizeReport, _allocate, _bytes, _Job, _prepare, quantize
from bitshard.progress import Progress, silent
from bitshard.quantized import QuantizedWeight
from bitshard.reorder import deal, deal_within, is_identity, kv_group_order
from bitshard.solver.allocate import relative_errors
from bitshard.solver.hessian import Hessian
from bitshard.spec import BLOCK, GPTQ_RECIPE, PAPER_RECIPES, MixRecipe, MixSpec, QuantSpec
from bitshard.writer import Writer
from commands import bitshard, refusal
from dense import random_model, random_text
from factory import CONFIGS, dense_model, rewrite, token_ids
from kill import Killed, counting_down, dies_at

CPU = torch.device("cpu")
ALL_EXPERTS = {"num_experts_per_tok": 4}  # so that no choice of experts flips; only mixtral reads it
# three KV groups, and 96 channels: no whole number of blocks; gpt_bigcode has one KV head
WIDER = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, **ALL_EXPERTS}
SIZES = {t: {"n_embd": 96} if t == "gpt_bigcode" else WIDER for t in CONFIGS}
EIGHT = MixSpec(8, 0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(random_text(2000))
    return tmp_path / "text.txt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_model(tmp_path / "m", "llama")


def small(text: Path, **changes: Any) -> Calibration:
    return Calibration(**{"path": text, "samples": 6, "length": 24, **changes})


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(token_ids(96), use_cache=False).logits
    return found


def source_logits(path: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


def assert_close(found: torch.Tensor, expected: torch.Tensor, of_largest: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=of_largest * expected.abs().max().item())


def uneven_model(folder: Path, model_type: str, **changes: Any) -> Checkpoint:
    """A random model whose norms are no ones, so that their order counts."""
    path = random_model(folder, model_type, **changes)
    source, generator = Checkpoint.open(path), torch.Generator().manual_seed(0)
    vectors = {n: t for n, t in source.read(source.files).items() if t.dim() == 1}
    noise = {n: torch.rand(t.shape, generator=generator).to(t.dtype) for n, t in vectors.items()}
    rewrite(path, {n: t + 0.5 * noise[n] for n, t in vectors.items()})
    return Checkpoint.open(path)


def permutations(source: Checkpoint, out: Checkpoint) -> bool:
    """True when the embedding of `out` has the source's channels in another order."""
    name = next(n for n in source.files if n.endswith(("embed_tokens.weight", "wte.weight")))
    before, after = source.tensor(name), out.tensor(name)
    assert torch.equal(before.sort(dim=1).values, after.sort(dim=1).values)
    return not torch.equal(before, after)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_order_alone_changes_no_output(model_type: str, tmp_path: Path) -> None:
    """Every tensor as the job reads it, in the order that quantizing chooses, makes the same model."""
    source = uneven_model(tmp_path / "m", model_type, dtype=torch.float32, **SIZES[model_type])
    for mixed in (True, False):
        model = BlockwiseModel(source, source.sizes, {}, CPU)
        order, _ = choose_order(model, token_ids(96), "hessian", mixed, silent)
        assert not is_identity(order.hidden_H) and not any(map(is_identity, order.intermediate.values()))
        job = _Job(source, MixSpec(), MixRecipe(), samples=1, order=order)
        tensors = job.read_outside(source.names_outside_blocks())
        for layer in range(source.sizes.layers):
            tensors |= job.read_block(layer)
        assert tensors.keys() == source.files.keys()
        out = tmp_path / f"ordered-{mixed}"
        shutil.copytree(source.path, out, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        assert_close(source_logits(out), source_logits(source.path), 6e-5)


def sensitivities(source: Checkpoint, role: str) -> dict[str, torch.Tensor]:
    """H_jj |W_:j|^2 of every matrix of that role [K], H over its mean, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}

    def see(module: torch.nn.Linear, args: tuple[torch.Tensor], name: str) -> None:
        active_K = args[0].flatten(0, -2).double().square().sum(0)
        found[name] = active_K / active_K.mean() * module.weight.double().square().sum(0)

    names = [name for i in range(source.sizes.layers) for name, m in source.plan().linears(i) if m.role == role]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(see, name=name))
    with torch.no_grad():
        model(token_ids(96))
    assert sorted(found) == sorted(names)
    return found


def test_hidden_channels_are_ordered_by_all_that_read_them(tmp_path: Path) -> None:
    """q, k, v, gate and up of all layers."""
    source = uneven_model(tmp_path / "m", "llama", dtype=torch.float32, **SIZES["llama"])
    order, _ = choose_order(BlockwiseModel(source, source.sizes, {}, CPU), token_ids(96), "hessian", True, silent)
    of_columns = sensitivities(source, "column")
    assert len(of_columns) == 5 * source.sizes.layers
    assert torch.equal(order.hidden_H, deal(torch.stack(list(of_columns.values())).sum(0), BLOCK))
    for name in of_columns:
        rest = [s_H for other, s_H in of_columns.items() if other != name]
        assert not torch.equal(order.hidden_H, deal(torch.stack(rest).sum(0), BLOCK)), f"{name} counts"


def test_heads_and_what_is_in_them_are_ordered_by_o(tmp_path: Path) -> None:
    changes = {**SIZES["llama"], "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    source = uneven_model(tmp_path / "m", "llama", dtype=torch.float32, **changes)
    order, _ = choose_order(BlockwiseModel(source, source.sizes, {}, CPU), token_ids(96), "hessian", True, silent)
    at_o = [s_K for name, s_K in sensitivities(source, "row").items() if name.endswith("o_proj")]
    assert len(at_o) == source.sizes.layers
    for values_JD, groups_J, s_K in zip(order.values_LJD, order.kv_groups_LJ, at_o, strict=True):
        assert torch.equal(groups_J, kv_group_order(s_K.view(4, -1).sum(1)))
        assert torch.equal(values_JD, deal_within(s_K, source.sizes, groups_J, BLOCK))
        assert not torch.equal(values_JD, deal_within(torch.ones_like(s_K), source.sizes, groups_J, BLOCK))
    assert not all(map(is_identity, order.kv_groups_LJ))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_at_8_bits_is_the_source(model_type: str, text: Path, tmp_path: Path) -> None:
    """Order, quantization and writing agree: what comes back is the 16-bit model."""
    source = uneven_model(tmp_path / "m", model_type, **SIZES[model_type])
    report = quantize(source.path, tmp_path / "out", EIGHT, small(text, samples=20))
    out = Checkpoint.open(tmp_path / "out")
    assert permutations(source, out)
    assert_close(logits(dense_model(out.path)), source_logits(source.path), 0.05)
    assert all(0 < m.relative_error < 1e-4 for m in report.matrices)
    hidden = {name: 32 for name, linear in out.plan().linears(0) if linear.in_features == 96}
    assert hidden and hidden.items() <= report.filled.items() and set(report.filled.values()) == {32}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_by_default(model_type: str, text: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(random_model(tmp_path / "m", model_type, **ALL_EXPERTS))
    report = quantize(source.path, tmp_path / "out", MixSpec(), small(text))
    out = Checkpoint.open(tmp_path / "out")
    assert out.quantized.spec == MixSpec() and out.layout.name == "mix64" and not report.filled and not report.unseen
    assert sorted(m.name for m in report.matrices) == sorted(out.matrices())
    for name in out.matrices():
        weight = out.weight(name)
        assert isinstance(weight, MixedWeight) and weight.dequantize().isfinite().all()
        assert (weight.spec.bits, weight.spec.metadata) == (2, "fine")
        assert not out.is_irregular(name)
    assert permutations(source, out)
    assert all(0 < m.relative_error < 0.15 and 0 <= m.share_4bit <= 1 for m in report.matrices), report.matrices
    size = sum(t.nbytes for n in out.matrices() for s, t in out.matrix_tensors(n).items() if s != "bias")
    weights = sum(weight.numel() for weight in (out.weight(n).dequantize() for n in out.matrices()))
    assert report.average_bits == pytest.approx(8 * size / weights) and report.average_bits <= 2.91
    kept = {name: t for name, t in out.read(out.names_outside_blocks()).items()}
    assert all(tensor.dtype == torch.float16 for tensor in kept.values())
    assert_close(logits(load(out.path)), logits(dense_model(out.path)), 1e-4)


def test_bits_are_dealt_by_each_channels_own_activity(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and activity in one order: the sum of both over channels is that of the model as it was."""
    source = uneven_model(tmp_path / "m", "llama", **SIZES["llama"])
    job, asked = _prepare(source.path, MixSpec(), MixRecipe(), 6), list[float]()

    def see(W_NK: torch.Tensor, active_K: torch.Tensor) -> list[float]:
        asked.append(float((W_NK.double().square() * active_K.double()).sum()))
        return relative_errors(W_NK, active_K)

    monkeypatch.setattr(pipeline, "relative_errors", see)
    monkeypatch.setattr(pipeline, "ALLOCATE_ROWS", 1 << 20)  # all of them
    blocks = BlockwiseModel(source, source.sizes, {}, CPU)
    order, activity = choose_order(blocks, token_ids(96), "hessian", True, silent)
    _allocate(replace(job, order=order), activity, 2.91, silent)
    names = [name for i in range(source.sizes.layers) for name, _ in source.plan().linears(i)]
    expected = [
        float((source.tensor(f"{name}.weight").double().square() * activity[name].double()).sum()) for name in names
    ]
    assert asked == pytest.approx(expected, rel=1e-5)
    assert not is_identity(order.hidden_H) and not any(map(is_identity, order.intermediate.values()))


def test_a_budget_is_kept(text: Path, tmp_path: Path) -> None:
    """Of everything in the file, for each weight; by default, where blocks that are filled up need more, for each of
    their places. What matters more gets more.
    """
    source = random_model(tmp_path / "m", "llama", hidden_size=80)
    for budget in (2.91, 4.0, 4.2):
        recipe, out = MixRecipe("none", outliers=0.005, average_bits=budget), tmp_path / str(budget)
        report = quantize(source, out, MixSpec(), small(text), recipe)
        checkpoint = Checkpoint.open(out)
        weights = [checkpoint.weight(name) for name in checkpoint.matrices()]
        stored = sum(w.codes_NK.numel() for w in weights if isinstance(w, MixedWeight))
        real = sum(w.dequantize().numel() for w in weights)
        found = report.average_bits * (real / stored if budget == 2.91 else 1)
        assert budget - 0.2 < found <= budget, (report.average_bits, real / stored)
        fractions = {w.spec.fraction_4bit for w in weights if isinstance(w, MixedWeight)}
        assert len(fractions) > 1
        for name in checkpoint.matrices():
            spec, (n, k) = checkpoint.spec_of(name), checkpoint.weight(name).dequantize().shape
            written = sum(tensor.nbytes for tensor in checkpoint.matrix_tensors(name).values())
            assert isinstance(spec, MixSpec)
            assert 0.98 * written < _bytes(spec, recipe, k, n) and written <= _bytes(spec, recipe, k, n)
        assert_close(logits(load(out)), logits(dense_model(out)), 1e-4)
    refused(SpecError, "average_bits: found 3.3; allowed: 3.[3-9][0-9]+ or more", source, small(text),
            recipe=MixRecipe(average_bits=3.3))  # fmt: skip


def test_a_budget_that_cannot_be_kept_is_refused_first(model: Path, text: Path, tmp_path: Path) -> None:
    """With the least that can; before anything is written."""
    command = ["quantize", model, tmp_path / "out", "--calibration", text, *CALIBRATE]
    # with so many outliers, which 4-bit strips do not have, 4 bits everywhere are the fewest for most matrices
    sentence = refusal(*command, "--outliers", 0.05)
    assert "--average-bits: found 2.91, the default; allowed: " in sentence and "or fewer outliers" in sentence
    assert not list(tmp_path.glob("out*"))
    least = re.search(r"allowed: (\d\.\d+) or more", refusal(*command, "--outliers", 0.05, "--average-bits", 4.3))
    assert least and float(least[1]) < 4.42
    assert bitshard(*command, "--outliers", 0.05, "--average-bits", least[1]).code == 0
    checkpoint = Checkpoint.open(tmp_path / "out")
    # down has twice as many input channels, so row pointers take fewer of its bits
    fractions = {name.rpartition(".")[2]: checkpoint.spec_of(name).fraction_4bit for name in checkpoint.matrices()}
    assert fractions == dict.fromkeys(fractions, 1.0) | {"down_proj": 0.0}


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [
        (MixSpec(), MixRecipe("none")),
        (MixSpec(2, 0.5), MixRecipe("none", "range", outliers=0.01)),
        (MixSpec(3, 0.0), MixRecipe("none", correct=False)),
        *PAPER_RECIPES.values(),
    ],
    ids=["default", "half", "3 bits", *PAPER_RECIPES],
)
def test_without_an_order_of_the_model(spec: MixSpec, recipe: MixRecipe, text: Path, tmp_path: Path) -> None:
    """Mixed widths gather each matrix's own strips instead, which the file says; embeddings and norms stay."""
    source = Checkpoint.open(random_model(tmp_path / "m", "qwen2", **SIZES["qwen2"]))
    quantize(source.path, tmp_path / "out", spec, small(text), recipe)
    out = Checkpoint.open(tmp_path / "out")
    names = out.matrices()
    assert all(out.is_irregular(name) == (len(set(spec.widths)) > 1) for name in names)
    assert all(torch.equal(out.tensor(n), source.tensor(n)) for n in source.files if n.rpartition(".")[0] not in names)
    weights = [out.weight(name) for name in names]
    assert all(isinstance(w, MixedWeight) and (w.outliers is not None) == (recipe.outliers > 0) for w in weights)
    assert_close(logits(load(out.path)), logits(dense_model(out.path)), 1e-4)
    exact, found = source_logits(source.path), logits(dense_model(out.path))
    assert (found - exact).square().sum() < exact.square().sum()


@pytest.mark.parametrize("correct", [True, False])
def test_a_block_reads_what_the_quantized_ones_put_out(
    correct: bool, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what the 16-bit ones do, which is kept beside it for the correction."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    write_state = Writer.write_state

    def recorded(self: Writer, name: str, tensors: dict[str, torch.Tensor]) -> None:
        states[name] = {name: tensor.clone() for name, tensor in tensors.items()}
        write_state(self, name, tensors)

    monkeypatch.setattr(Writer, "write_state", recorded)
    quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe(correct=correct))
    found = states[pipeline._state(1)]
    tokens_SL = pipeline._segments(Checkpoint.open(model), text.read_text(), small(text))
    with torch.no_grad():
        expected = dense_model(tmp_path / "out").model(tokens_SL, output_hidden_states=True).hidden_states[1]
    off = (found["hidden"] - expected).square().mean()
    assert off < 1e-4 * expected.square().mean()  # the blocks are multiplied in bfloat16
    assert ("exact" in found) == correct
    if correct:
        assert off < 0.01 * (found["exact"] - expected).square().mean()


@pytest.mark.parametrize("format", ["mix64", "gptq"])
def test_damping_is_what_was_asked_for(format: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Much of it follows the inputs less: weights stay nearer to what they were. By default docs/accuracy.md's."""
    assert (MixRecipe().damp, GPTQ_RECIPE.damp, *{r.damp for _, r in PAPER_RECIPES.values()}) == (0.05, 0.01, 0.01)
    usual, spec = (MixRecipe(), MixSpec(4, 0.0)) if format == "mix64" else (GPTQ_RECIPE, QuantSpec(4, 16))
    before, off = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters()), dict[float, float]()
    for damp in (usual.damp, 1.0):
        report = quantize(model, tmp_path / str(damp), spec, small(text), replace(usual, order="none", damp=damp))
        assert {m.damp for m in report.matrices} == {damp}
        after = dense_model(tmp_path / str(damp)).named_parameters()
        off[damp] = sum(float((weight - before[name]).detach().square().sum()) for name, weight in after)
    assert off[1.0] < off[usual.damp]


@pytest.mark.parametrize("model_type", ["llama", "glm", "gpt_bigcode"])
def test_ordered_and_padded(model_type: str, text: Path, tmp_path: Path) -> None:
    """Both edits at once; the zeros come after the order."""
    width = {"n_inner": 92} if model_type == "gpt_bigcode" else {"intermediate_size": 92}
    source = random_model(tmp_path / "m", model_type, **width)
    report = quantize(source, tmp_path / "out", EIGHT, small(text), max_tp=1)
    assert report.padded["intermediate"] == 128 and not report.filled
    assert report.average_bits == pytest.approx(inspect(tmp_path / "out").average_bits)
    assert report.model_bits > 1.1 * report.average_bits  # of the weights that there were, not of zeros
    assert_close(logits(dense_model(tmp_path / "out")), source_logits(source), 0.05)


def planted(folder: Path) -> Path:
    """A model whose last quarter of channels are 30 times as active as the others, behind every norm."""
    path = random_model(folder, "llama")
    source = Checkpoint.open(path)
    norms = [n for n in source.files if n.endswith("layernorm.weight")]
    rewrite(path, {n: torch.where(torch.arange(64) % 4 == 3, 30.0, 1.0).half() for n in norms})
    return path


def test_gptq_of_an_ordered_model(text: Path, tmp_path: Path) -> None:
    """A plain file that any engine reads, with less error than the natural order leaves."""
    source = planted(tmp_path / "m")
    spec, errors = QuantSpec(3, 16), {}
    for order in ("none", "model"):
        out = tmp_path / order
        report = quantize(source, out, spec, small(text), replace(GPTQ_RECIPE, order=order))
        errors[order] = {m.name: m.relative_error for m in report.matrices}
        checkpoint = Checkpoint.open(out)
        assert permutations(Checkpoint.open(source), checkpoint) == (order == "model")
        for name in checkpoint.matrices():
            weight = checkpoint.weight(name)
            assert isinstance(weight, QuantizedWeight) and weight.is_trivial and not weight.spec.desc_act
        section = json.loads((out / "quantize_config.json").read_text())
        assert section["desc_act"] is False and section["quant_method"] == "gptq"
    columns = [name for name in errors["none"] if name.endswith(("q_proj", "v_proj", "gate_proj", "up_proj"))]
    assert all(errors["model"][name] < 0.8 * errors["none"][name] for name in columns), errors


def test_an_ordered_model_loses_less(text: Path, tmp_path: Path) -> None:
    source = planted(tmp_path / "m")
    errors = {}
    for order in ("model", "none"):
        report = quantize(source, tmp_path / order, MixSpec(), small(text), MixRecipe(order))
        assert all(0.2 < m.share_4bit < 1 for m in report.matrices)
        errors[order] = {m.name: m.relative_error for m in report.matrices}
    columns = [name for name in errors["none"] if name.endswith(("q_proj", "v_proj", "gate_proj", "up_proj"))]
    assert all(errors["model"][name] < 0.5 * errors["none"][name] for name in columns), errors


def told(report: QuantizeReport) -> tuple[Any, ...]:
    return tuple(report.matrices), tuple(report.unseen), dict(report.filled), report.average_bits


def test_resumes_from_any_kill_to_the_same_bytes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on disk changes its meaning only by renaming and removing files: die before each of these, in turn."""
    model = random_model(tmp_path / "m", "llama", hidden_size=48, intermediate_size=64, head_dim=12)
    calibration, recipe = small(text, samples=2, length=8), MixRecipe(outliers=0.01)
    whole = quantize(model, tmp_path / "whole", MixSpec(), calibration, recipe)
    die_before, seen = counting_down(monkeypatch), []
    for point in range(1, 100):
        out = tmp_path / f"out-{point}"
        die_before(point)
        try:
            quantize(model, out, MixSpec(), calibration, recipe)
        except Killed:
            if not out.exists():  # it has its name before the states and the task leave it
                seen.append({path.name.partition("-")[0] for path in (tmp_path / f"out-{point}.partial").iterdir()})
                assert told(quantize(model, out, MixSpec(), calibration, recipe)) == told(whole)
                assert len(digest(out)) == len(digest(tmp_path / "whole"))
            assert digest(out).items() >= digest(tmp_path / "whole").items(), f"died before change {point}"
            assert bitshard("verify", out).code == 0
        else:
            break
    assert point > 1 + 1 + 3 * 2 + 3, "too few kill points were seen"
    # also between the order and the first shard, and between a state and its block's shard
    assert {"task.json", "order.safetensors", "model"} in seen and {"task.json", "order.safetensors"} < seen[1]
    assert any("inputs" in names for names in seen)


def test_a_run_begun_in_bfloat16_is_not_finished_in_float32(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine it is refused, and the file says which it was."""
    model = random_model(tmp_path / "m", "llama")

    def run(name: str, bfloat16: bool, progress: Progress = silent) -> None:
        monkeypatch.setattr("bitshard.blockwise._is_good_at_bfloat16", lambda device: bfloat16)
        quantize(model, tmp_path / name, MixSpec(), small(text), MixRecipe("none"), progress=progress)

    with pytest.raises(Killed):
        run("out", True, dies_at(1))
    with pytest.raises(CheckpointError, match="an unfinished run with bfloat16 True, not False; allowed: the same"):
        run("out", False)
    for name, bfloat16 in (("out", True), ("float32", False), ("bfloat16", True)):
        run(name, bfloat16)
        section = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["bitshard"]
        assert section["provenance"]["bfloat16"] is bfloat16
    assert digest(tmp_path / "out") == digest(tmp_path / "bfloat16") != digest(tmp_path / "float32")


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from bitshard.pipeline import Calibration, quantize
from bitshard.spec import MixSpec

torch.set_num_threads(1)
model, out, text = map(Path, sys.argv[1:])

def progress(items, label):
    for item in items:
        if label == "quantizing" and item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

quantize(model, out, MixSpec(), Calibration(text, 6, 24), progress=progress)
"""


def test_survives_sigkill_in_another_process(text: Path, tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", "qwen2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, tmp_path / "out", text], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "order.safetensors").exists()
    quantize(model, tmp_path / "out", MixSpec(), small(text))
    quantize(model, tmp_path / "whole", MixSpec(), small(text))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_seed_says_all(model: Path, text: Path, tmp_path: Path) -> None:
    shards = {}
    for name, seed in {"first": 0, "again": 0, "other": 1, "other again": 1}.items():
        quantize(model, tmp_path / name, MixSpec(), small(text, seed=seed))
        shards[name] = digest(tmp_path / name)
    assert shards["first"] == shards["again"] and shards["other"] == shards["other again"]
    same = {name for name in shards["first"] if shards["first"][name] == shards["other"][name]}
    assert not any(name.startswith("model-") for name in same)


@pytest.mark.parametrize("other", ["recipe", "max_tp"])
def test_another_task_is_refused(other: str, model: Path, text: Path, tmp_path: Path) -> None:
    """Nothing of an interrupted run is used, its order least of all; in the command's own words."""
    arguments = ["quantize", model, tmp_path / "out", "--calibration", text, "--samples", 6, "--length", 24]
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe(average_bits=2.91), progress=dies_at(1))
    options = ["--ranking", "range", "--tune", 2, "--damp", 1] if other == "recipe" else ["--max-tp", 1]
    recipes = "ranking hessian, not range; tune 0, not 2; damp 0.05, not 1.0"
    says = recipes if other == "recipe" else "max_tp None, not 1"
    assert f"out.partial: found an unfinished run with {says}; allowed" in refusal(*arguments, *options)
    assert bitshard(*arguments).code == 0
    quantize(model, tmp_path / "whole", MixSpec(), small(text))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_number_written_otherwise_is_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe(damp=1), progress=dies_at(1))
    quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe(damp=1.0))


def test_a_name_that_is_no_text(model: Path, text: Path, tmp_path: Path) -> None:
    sentence = refusal("quantize", model, tmp_path / "s\udce9", "--calibration", text, *CALIBRATE)
    assert r"s\udce9': found a name that is not UTF-8; allowed: UTF-8" in sentence
    assert {path.name for path in tmp_path.iterdir()} == {"m", "text.txt"}


def test_a_finished_block_is_not_done_again(model: Path, text: Path, tmp_path: Path) -> None:
    def stop_after(count: int, seen: list[str]) -> Any:
        def progress(items: Sequence[int], label: str, /) -> Iterator[int]:
            for item in items:
                if len(seen) == count:
                    raise Killed
                yield item
                seen.append(f"{label} {item}")

        return progress

    first: list[str] = []
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe(), progress=stop_after(3, first))
    second: list[str] = []
    quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe(), progress=stop_after(99, second))
    assert first == ["ordering 0", "ordering 1", "quantizing 0"] and second == ["quantizing, 1 of 2 done before 1"]


def test_a_file_beside_the_weights_that_cannot_be_read(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "LICENSE").write_text("mine")
    may = os.access
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: Path(path).name != "LICENSE" and may(path, mode))
        with pytest.raises(CheckpointError, match="m/LICENSE: found a file that cannot be read; .* shards are kept"):
            quantize(model, tmp_path / "out", MixSpec(), small(text))
    assert not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out", MixSpec(), small(text))
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"


def test_an_output_may_have_any_name(model: Path, text: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "x.partial", MixSpec(), small(text))
    assert Checkpoint.open(tmp_path / "x.partial").quantization is not None


def test_config_says_how_it_was_made(model: Path, text: Path, tmp_path: Path) -> None:
    report = quantize(str(model), tmp_path / "out", MixSpec(), small(text), MixRecipe(outliers=0.01))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config["quantization_config"]
    provenance = section["bitshard"]["provenance"]
    assert (section["quant_method"], section["bits"], section["fraction_4bit"]) == ("bitshard", 2, 0.25)
    assert provenance["recipe"] == vars(MixRecipe(outliers=0.01)) and len(provenance["permutation_sha256"]) == 64
    assert provenance["calibration_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(config) and (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    facts = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert facts == {m.name: {"error": m.relative_error, "share_4bit": m.share_4bit} for m in report.matrices}


def test_dead_channels_work(model: Path, text: Path, tmp_path: Path) -> None:
    """Silenced by a norm, or by the rows that make them; what they multiply becomes zero, and no output changes."""
    source = Checkpoint.open(model)
    norm, up = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
    changes = {name: source.tensor(name).clone() for name in (norm, up)}
    changes[norm][10:40] = 0
    changes[up][::2] = 0
    rewrite(model, changes)
    report = quantize(model, tmp_path / "out", EIGHT, small(text))
    dead = {m.name: m.dead for m in report.matrices if m.dead}
    assert dead == {
        **{f"model.layers.0.self_attn.{x}_proj": 30 for x in "qkv"}, "model.layers.1.mlp.down_proj": 64,
    }  # fmt: skip
    assert_close(logits(dense_model(tmp_path / "out")), source_logits(model), 0.05)


def test_sizes_that_fill_no_block_are_exact_and_said(text: Path, tmp_path: Path) -> None:
    """K of 80, 100 and 60 (no multiple of 16): the zeros are in the file alone, and the command says so."""
    sizes = {"hidden_size": 80, "intermediate_size": 100, "head_dim": 15, "num_attention_heads": 4}
    model = random_model(tmp_path / "m", "granite", **{k: v for k, v in sizes.items() if k != "head_dim"})
    arguments = ["--calibration", text, "--samples", 6, "--length", 24, "--bits", 8]
    result = bitshard("quantize", model, tmp_path / "out", *arguments)
    assert result.code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "input channels of 14 matrices filled up to whole blocks of 64, with 28 or 48 zero channels" in said
    slow = "plain torch runs 14 of 14 matrices: strips of 8 bits, where kernels read 2 and 4"
    assert slow in said
    result = bitshard("quantize", model, tmp_path / "json", *arguments, "--json")
    assert slow in result.stderr and len(json.loads(result.stdout)["slow"]) == 14
    out = Checkpoint.open(tmp_path / "out")
    down = out.weight("model.layers.0.mlp.down_proj")
    assert isinstance(down, MixedWeight) and down.codes_NK.shape == (80, 128) and down.in_features == 100
    assert torch.equal(down.codes_NK[:, 100:], down.zeros_NS.repeat_interleave(16, 1)[:, 100:])
    assert_close(logits(dense_model(out.path)), source_logits(model), 0.05)
    assert_close(logits(load(out.path)), logits(dense_model(out.path)), 1e-4)


def refused(kind: type[BitshardError], says: str, model: Path, calibration: Calibration, **options: Any) -> None:
    out = model.parent / "refused"
    with pytest.raises(kind, match=says):
        quantize(model, out, MixSpec(), calibration, **options)
    assert not out.exists()
    if kind is SolverError:  # the run may have begun, and the next one is another task
        shutil.rmtree(out.with_name("refused.partial"), ignore_errors=True)


def test_refuses_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    refused(SpecError, "txt: found a text of .* tokens, 83 segments of 24", model, small(text, samples=84))
    refused(SpecError, "length: found 129 tokens", model, small(text, length=129))
    refused(CheckpointError, "nowhere: found no such folder", tmp_path / "nowhere", small(text))
    refused(CheckpointError, "nowhere.txt: found No such file", model, small(tmp_path / "nowhere.txt"))
    refused(PlanError, "tensor-parallel degree: found 0", model, small(text), max_tp=0)
    for name, content, says in [
        ("empty.txt", "", "empty.txt: found a text of 0 tokens, 0 segments of 24; allowed: at least 6 segments"),
        ("short.txt", "Once upon a time", "short.txt: found a text of 16 tokens, 0 segments"),
        ("no.jsonl", '{"txt": "x"}\n', "no.jsonl: found line 1: no `text`"),
    ]:
        (tmp_path / name).write_text(content)
        refused(BitshardError, says, model, small(tmp_path / name))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(CheckpointError, "binary.txt: found UnicodeDecodeError", model, small(tmp_path / "binary.txt"))
    quantize(model, tmp_path / "done", MixSpec(), small(text))
    refused(FormatError, "done: found a quantized checkpoint; allowed: a 16-bit model", tmp_path / "done", small(text))
    with pytest.raises(CheckpointError, match="done: found an existing file or folder"):
        quantize(model, tmp_path / "done", MixSpec(), small(text))
    with pytest.raises(SpecError, match="outliers: found 0.01 with strips 8 8 8 8"):
        quantize(model, tmp_path / "refused", EIGHT, small(text), MixRecipe(outliers=0.01))
    assert not list(tmp_path.glob("refused*"))


def test_refuses_another_models_tokenizer(text: Path, tmp_path: Path) -> None:
    small_vocabulary = random_model(tmp_path / "v", "llama", vocab_size=64)
    refused(
        CheckpointError, "v: found a tokenizer with tokens up to 95; allowed: 0 to 63", small_vocabulary, small(text)
    )
    unreadable = tmp_path / "greek.txt"
    unreadable.write_text(500 * "αβγ", encoding="utf-8")
    own = random_model(tmp_path / "own", "llama")
    says = "own: found a tokenizer that does not know 100% of the calibration text; allowed: at most 50%"
    refused(CheckpointError, says, own, small(unreadable))
    easy = tmp_path / "easy.txt"  # none of its tokens is one that the model does not have
    easy.write_text(50 * min(text.read_text(), key=ord) + 500 * " ", encoding="utf-8")
    refused(CheckpointError, "v: found a tokenizer with tokens up to 95", small_vocabulary, small(easy))
    without_unknown = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    PreTrainedTokenizerFast(tokenizer_object=without_unknown).save_pretrained(own)
    refused(
        CheckpointError, r"own: found a tokenizer that cannot read the text \(Exception: WordLevel", own, small(text)
    )
    (small_vocabulary / "tokenizer.json").unlink()
    refused(CheckpointError, "v: found no usable tokenizer", small_vocabulary, small(text))
    assert not list(tmp_path.glob("refused*"))


def test_refuses_a_tensor_that_no_order_fits(model: Path, text: Path, tmp_path: Path) -> None:
    """Beside the blocks, where the model has none: it is kept, and in the model's order if it can be."""
    rewrite(model, {"v_head.weight": torch.ones(3, 5)})
    says = r"v_head.weight: found shape \[3, 5\]; allowed: 64 channels in the last dimension, .* --order none"
    refused(FormatError, says, model, small(text))
    assert not list(tmp_path.glob("refused*"))
    quantize(model, tmp_path / "out", MixSpec(), small(text), MixRecipe("none"))
    rewrite(model, {"v_head.weight": torch.full((3, 64), torch.nan)})
    refused(SolverError, "v_head.weight: found NaN", model, small(text))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_refuses_numbers_that_are_not_finite_by_name(value: float, text: Path, tmp_path: Path) -> None:
    broken = {
        "llama": ("model.layers.1.mlp.up_proj.weight", "model.layers.1.post_attention_layernorm.weight",
                  "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        "qwen2": ("model.layers.1.self_attn.q_proj.bias",),
        "gpt_bigcode": ("transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.bias"),
    }  # fmt: skip
    for i, (model_type, name) in enumerate((t, name) for t, names in broken.items() for name in names):
        model = random_model(tmp_path / f"m{i}", model_type)
        tensor = Checkpoint.open(model).tensor(name).clone()
        tensor[0] = value  # no character of the text, for the embedding
        rewrite(model, {name: tensor})
        recipe = MixRecipe() if value != value else MixRecipe("none", correct=False)
        refused(SolverError, f"^{name}: found NaN or infinite", model, small(text, samples=2), recipe=recipe)


def test_refuses_a_hessian_that_cannot_be_factored(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hessian, "matrix", lambda self: -torch.eye(len(self._sum_KK)))
    says = "^model.layers.0.self_attn.q_proj: found a Hessian that is not positive definite, even with damping 1"
    refused(SolverError, says, model, small(text))


def test_refuses_weights_beyond_fp16(text: Path, tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", "llama", dtype=torch.float32)
    rewrite(model, {"model.layers.0.mlp.down_proj.weight": torch.full((64, 128), 1e7)})
    refused(SolverError, "^model.layers.0.mlp.down_proj: found a scale beyond fp16", model, small(text))


@pytest.mark.parametrize("written", [0, 3, 5])
def test_a_full_disk(written: int, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the order, a shard, a state: one sentence, and the same command goes on from there to the same bytes."""
    arguments = ["quantize", model, tmp_path / "out", "--calibration", text, "--samples", 2, "--length", 24]
    count = 0

    def save(*args: Any) -> None:
        nonlocal count
        if count == written:  # safetensors passes the system's error on as text, so this is its text
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        count += 1
        save_file(*args)

    with monkeypatch.context() as patched:
        patched.setattr("bitshard.writer.save_file", save)
        sentence = refusal(*arguments)
    assert "out.partial: found no room left on the disk" in sentence and "run the same command again" in sentence
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial/*tmp*"))
    writes: list[str] = []
    write_state = Writer.write_state

    def recorded(self: Writer, file_name: str, tensors: Any) -> None:
        writes.append(file_name)
        write_state(self, file_name, tensors)

    monkeypatch.setattr(Writer, "write_state", recorded)
    assert bitshard(*arguments).code == 0
    # order, outside, and for each of two blocks the next one's inputs before its shard; a finished shard is kept
    assert len(writes) == {0: 6, 3: 4, 5: 2}[written]
    quantize(model, tmp_path / "whole", MixSpec(), Calibration(text, 2, 24))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


CALIBRATE = ("--samples", 2, "--length", 24)


def test_the_command_by_default(model: Path, text: Path, tmp_path: Path) -> None:
    """Nothing but the files named: mix64, ordered, 2.9 bits and a little, and what to do next."""
    result = bitshard("quantize", model, tmp_path / "out", "--calibration", text, *CALIBRATE)
    assert result.code == 0 and f"next: bitshard inspect {tmp_path / 'out'}" in result.stdout, result
    assert "calibration tokens are fewer than the 128 channels" in " ".join(result.stdout.split())
    assert "14 matrices, the worst five" in result.stdout
    assert "filled up" not in result.stdout and "plain torch" not in result.stdout
    assert "ordering" in result.stderr and "quantizing" in result.stderr
    quantize(model, tmp_path / "api", MixSpec(), Calibration(text, 2, 24))
    assert digest(tmp_path / "out") == digest(tmp_path / "api")
    assert bitshard("inspect", tmp_path / "out").code == bitshard("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("recipe", PAPER_RECIPES)
def test_the_command_with_the_papers_recipe(recipe: str, model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--calibration", text, *CALIBRATE, "--recipe", recipe, "--json"]
    result = bitshard("quantize", model, tmp_path / "out", *arguments)
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    spec, expected = PAPER_RECIPES[recipe]
    out = Checkpoint.open(tmp_path / "out")
    assert out.quantized.spec == spec and len(report["matrices"]) == 14 and report["average_bits"] > 2.5
    provenance = json.loads((out.path / "config.json").read_text())["quantization_config"]["bitshard"]["provenance"]
    assert provenance["recipe"] == vars(expected) and "permutation_sha256" not in provenance
    for name in out.matrices():
        weight = out.weight(name)
        assert isinstance(weight, MixedWeight) and weight.outliers is not None
        assert len(weight.outliers.values) == round(expected.outliers * weight.dequantize().numel())


def test_the_command_to_gptq_in_the_models_order(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--format", "gptq", "--order", "model", "--bits", 4, "--group-size", 16, "--calibration", text]
    result = bitshard("quantize", model, tmp_path / "out", *arguments, *CALIBRATE)
    assert result.code == 0 and f"next: bitshard inspect {tmp_path / 'out'}" in result.stdout, result
    out = Checkpoint.open(tmp_path / "out")
    assert out.gptq.spec == QuantSpec(4, 16) and not any(map(out.is_irregular, out.matrices()))
    assert permutations(Checkpoint.open(model), out)
