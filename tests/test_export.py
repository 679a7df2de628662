"""The same weights in other formats, read by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitshard.checkpoint import Checkpoint
from bitshard.export import export
from bitshard.mixed import MixedWeight
from bitshard.spec import MixSpec, QuantSpec
from commands import bitshard, refusal
from factory import dense_model, random_checkpoint, token_ids

MIXED = [MixSpec(), MixSpec(fraction_4bit=0.0), MixSpec(4, 0.0), MixSpec(metadata="paper")]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(96), use_cache=False).logits


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("model_type", ["qwen2", "mixtral", "gpt_bigcode"])
@pytest.mark.parametrize("spec", MIXED, ids=str)
def test_mix64_to_gptq_is_exact(spec: MixSpec, model_type: str, ordered: bool, tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "m", model_type, spec, ordered=ordered)
    report = export(source, tmp_path / "out", "gptq")
    old, new = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert new.gptq.spec == QuantSpec(4, 16, sym=False) and report.average_bits == 5.25
    for name in old.matrices():
        assert torch.equal(old.weight(name).dequantize(), new.weight(name).dequantize().T), name
        assert not new.is_irregular(name)
    same(logits(dense_model(tmp_path / "out")), logits(dense_model(source)))


@pytest.mark.filterwarnings("ignore")  # of another library
@pytest.mark.parametrize("spec", [MixSpec(), QuantSpec(4, 32), QuantSpec(4, 32, sym=False), QuantSpec(8, 64)], ids=str)
def test_compressed_tensors_own_library_reads_it(spec: QuantSpec | MixSpec, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    source = random_checkpoint(tmp_path / "m", "qwen2", spec)
    export(source, tmp_path / "out", "compressed-tensors")
    old, files = Checkpoint.open(source), load_file(tmp_path / "out" / "model-00002-of-00003.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = quantization.QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    for name in (name for name in old.matrices() if ".0." in name):
        tensors = {key.removeprefix(f"{name}."): value for key, value in files.items() if key.startswith(f"{name}.")}
        tensors["weight_scale"] = tensors["weight_scale"].float()
        found = compressors.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
        weight = old.weight(name)
        matrix = weight.dequantize() if isinstance(weight, MixedWeight) else weight.dequantize().T
        assert torch.equal(found, matrix), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(8, 64)], ids=str)
def test_transformers_runs_compressed_tensors(spec: QuantSpec, tmp_path: Path) -> None:
    """Symmetric ones: with zeros transformers 5.23 expects them unpacked, and loads nobody's."""
    pytest.importorskip("compressed_tensors")
    source = random_checkpoint(tmp_path / "m", "qwen2", spec)
    export(source, tmp_path / "out", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.quantization_method == "compressed-tensors"
    same(logits(model), logits(dense_model(source)), 2e-3)  # it multiplies by scales in their own float16


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    act_order = random_checkpoint(tmp_path / "a", "llama", QuantSpec(4, 16, sym=False, desc_act=True))
    sentence = refusal("export", act_order, tmp_path / "out", "--to", "compressed-tensors")
    assert "found an irregular g_idx; allowed: groups in order" in sentence and "layers.0." in sentence
    assert "found a GPTQ checkpoint" in refusal("export", act_order, tmp_path / "out")
    outliers = random_checkpoint(tmp_path / "o", "llama", MixSpec(), outliers=0.02)
    assert "found 16-bit outliers; allowed: codes alone" in refusal("export", outliers, tmp_path / "out")
    three = random_checkpoint(tmp_path / "t", "llama", QuantSpec(3, 32))
    sentence = refusal("export", three, tmp_path / "out", "--to", "compressed-tensors")
    assert "found 3 bits in groups of 32; allowed: 4 or 8 bits" in sentence
    eight = random_checkpoint(tmp_path / "e", "llama", MixSpec(8, 0.0))
    assert "8-bit strips" in refusal("export", eight, tmp_path / "out")
    assert "--to: found 'awq'" in refusal("export", outliers, tmp_path / "out", "--to", "awq")
    assert not list(tmp_path.glob("out*"))


def test_the_command(tmp_path: Path) -> None:
    source = random_checkpoint(tmp_path / "m", "llama", MixSpec())
    result = bitshard("export", source, tmp_path / "out")
    assert result.code == 0 and "14 matrices as gptq, 5.25 bits" in " ".join(result.stdout.split())
    assert "found an existing file or folder" in refusal("export", source, tmp_path / "out")
