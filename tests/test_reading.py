"""GPTQ checkpoints in all the variants that quantizers write: each dequantizes to the weights it was made of."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from alter import WEIGHTS, config, removed, section, sharded, tensors, without
from bitshard.checkpoint import Checkpoint
from bitshard.convert import convert
from bitshard.layout import GptqLayout
from bitshard.models import architecture, block_linears, shapes
from bitshard.quantconfig import QuantConfig
from bitshard.spec import QuantSpec
from bitshard.verify import verify
from factory import CONFIGS, random_checkpoint, random_weight, write_folder

CONFIG = {**CONFIGS["llama"], "model_type": "llama"}
Known = dict[str, torch.Tensor]  # dequantized weights by name


def known_checkpoint(
    folder: Path,
    spec: QuantSpec,
    version: int = 2,
    dtype: torch.dtype = torch.float16,
    overrides: Mapping[str, dict[str, Any] | None] | None = None,
    bias: bool = False,
) -> Known:
    """Write a Llama's matrices, and return what they stand for. overrides: GPTQModel's `dynamic`, parsed."""
    quant = QuantConfig(spec, GptqLayout(1 if version == 1 else 2), tuple((overrides or {}).items()))
    arch, generator = architecture(CONFIG), torch.Generator().manual_seed(0)
    written: dict[str, torch.Tensor] = {}
    known: Known = {}
    for layer in range(CONFIG["num_hidden_layers"]):
        for linear in block_linears(arch, shapes(arch, CONFIG)):
            name, k, n = f"model.layers.{layer}.{linear.name}", linear.in_features, linear.out_features
            own = quant.spec_of(name)
            if own is None:
                written[f"{name}.weight"] = torch.randn(n, k, generator=generator).half()
                known[name] = written[f"{name}.weight"].float().T
            else:
                weight = random_weight(k, n, own, generator, bias=bias)
                weight = replace(weight, scales_GN=weight.scales_GN.to(dtype))
                known[name] = weight.dequantize()
                written |= {f"{name}.{suffix}": tensor for suffix, tensor in quant.layout.pack(weight).items()}
    write_folder(folder, CONFIG, written, quant)
    return known


def assert_known(folder: Path, known: Known) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.plan()
    for name, expected in known.items():
        if checkpoint.spec_of(name) is None:
            assert torch.equal(checkpoint.tensor(f"{name}.weight").float().T, expected)
        else:
            assert torch.equal(checkpoint.weight(name).dequantize(), expected), name


def stream(words: torch.Tensor, bits: int) -> np.ndarray:
    """Codes of [words, rows] as a little-endian stream of bits down each column."""
    as_bits = np.unpackbits(words.numpy().T.copy().view(np.uint8), axis=1, bitorder="little")
    return (as_bits.reshape(words.shape[1], -1, bits) @ (1 << np.arange(bits))).T


def by_the_formula(own: Mapping[str, torch.Tensor], bits: int, version: int) -> torch.Tensor:
    """(q - z) * s of the public format, written without the library."""
    zeros = stream(own["qzeros"].T.contiguous(), bits).T + (version == 1)
    group = own["g_idx"].numpy()
    difference = torch.from_numpy(stream(own["qweight"], bits) - zeros[group])
    return difference.float() * own["scales"].float()[own["g_idx"].long()]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("sym", "desc_act", "static_groups"), [(True, False, False), (False, True, False), (False, True, True)]
)
def test_every_spec(bits: int, group_size: int, sym: bool, desc_act: bool, static_groups: bool, version: int,
                    tmp_path: Path) -> None:  # fmt: skip
    spec = QuantSpec(bits, group_size, sym, desc_act, static_groups)
    known = known_checkpoint(tmp_path / "in", spec, version)
    assert_known(tmp_path / "in", known)
    assert Checkpoint.open(tmp_path / "in").gptq.spec == spec
    name = "model.layers.1.mlp.down_proj"
    own = {key.rpartition(".")[2]: t for key, t in load_file(tmp_path / "in" / WEIGHTS).items() if key.startswith(name)}
    assert torch.equal(by_the_formula(own, bits, version), known[name])
    assert Checkpoint.open(tmp_path / "in").is_irregular(name) == (desc_act and not static_groups and group_size != -1)


PLAIN = QuantSpec(4, 16, sym=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", PLAIN, dtype=dtype)
    assert_known(tmp_path / "in", known)
    assert Checkpoint.open(tmp_path / "in").weight("model.layers.0.mlp.up_proj").scales_GN.dtype == dtype


@pytest.mark.parametrize("spec", [PLAIN, QuantSpec(4, -1, desc_act=True), QuantSpec(3, 32, False, True, True)])
def test_no_g_idx(spec: QuantSpec, tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", spec)
    without(".g_idx")(tmp_path / "in")
    assert_known(tmp_path / "in", known)
    convert(tmp_path / "in", tmp_path / "out")
    assert_known(tmp_path / "out", known)


def test_a_long_g_idx(tmp_path: Path) -> None:
    """int64, as some converters write it."""
    known = known_checkpoint(tmp_path / "in", QuantSpec(4, 16, False, True))
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors({name: Checkpoint.open(tmp_path / "in").tensor(name).long()})(tmp_path / "in")
    assert_known(tmp_path / "in", known)


def test_biases(tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", PLAIN, bias=True)
    assert_known(tmp_path / "in", known)
    weight = Checkpoint.open(tmp_path / "in").weight("model.layers.0.self_attn.k_proj")
    assert weight.bias_N is not None
    assert torch.equal(weight.bias_N, load_file(tmp_path / "in" / WEIGHTS)["model.layers.0.self_attn.k_proj.bias"])


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_with_an_index(shards: int, tmp_path: Path) -> None:
    """Tensors of one matrix lie in different files."""
    known = known_checkpoint(tmp_path / "in", QuantSpec(4, 16, False, True))
    convert(tmp_path / "in", tmp_path / "from one file")
    sharded(tmp_path / "in", shards)
    assert_known(tmp_path / "in", known)
    convert(tmp_path / "in", tmp_path / "from shards")
    for path in (tmp_path / "from one file").iterdir():
        assert path.read_bytes() == (tmp_path / "from shards" / path.name).read_bytes()


def test_a_tensor_in_two_shards_is_where_the_index_says(tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", PLAIN)
    folder = tmp_path / "in"
    sharded(folder, 2)
    first, second = sorted(folder.glob("model-*"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: torch.zeros_like(load_file(first)[name])}, second)
    assert Checkpoint.open(folder).files[name] == first
    assert_known(folder, known)


@pytest.mark.parametrize("only", ["config.json", "quantize_config.json"])
def test_one_config_is_enough(only: str, tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", PLAIN, version=1)
    if only == "config.json":
        removed("quantize_config.json")(tmp_path / "in")
    else:
        config(quantization_config=None)(tmp_path / "in")
    assert_known(tmp_path / "in", known)


def test_the_oldest_config(tmp_path: Path) -> None:
    """AutoGPTQ's first files: bits and group_size and little else; version 1, symmetric."""
    known = known_checkpoint(tmp_path / "in", QuantSpec(4, 16), version=1)
    config(quantization_config=None)(tmp_path / "in")
    text = json.dumps({"bits": 4, "group_size": 16, "desc_act": False, "damp_percent": 0.01, "true_sequential": True})
    (tmp_path / "in" / "quantize_config.json").write_text(text)
    assert_known(tmp_path / "in", known)


def test_keys_that_say_nothing(tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", PLAIN)
    nulls = {key: None for key in ("desc_act", "static_groups", "dynamic", "meta", "pack_dtype", "bitshard")}
    for name in ("config.json", "quantize_config.json"):
        value = json.loads((tmp_path / "in" / name).read_text())
        value.get("quantization_config", value).update(nulls)
        (tmp_path / "in" / name).write_text(json.dumps(value))
    assert_known(tmp_path / "in", known)


def test_static_groups_in_gptqmodels_meta(tmp_path: Path) -> None:
    known_checkpoint(tmp_path / "in", QuantSpec(4, 16, True, True, True))
    section(static_groups=None, meta={"static_groups": True})(tmp_path / "in")
    assert Checkpoint.open(tmp_path / "in").gptq.spec.static_groups


DYNAMIC: dict[str, dict[str, Any] | None] = {
    r".*\.1\.self_attn\.(q|k)_proj": None,
    r".*\.0\.mlp\.gate_proj": None,
    r".*\.1\.mlp\.down_proj": None,
    r".*\.mlp\.": {"bits": 8, "group_size": 32},
    r".*\.o_proj": {"desc_act": False, "sym": True},
    r".*\.v_proj": {"bits": 2, "group_size": -1},
}


def test_dynamic_overrides(tmp_path: Path) -> None:
    """The first pattern that fits decides; `-:` leaves a matrix 16-bit."""
    known = known_checkpoint(tmp_path / "in", QuantSpec(4, 16, False, True), overrides=DYNAMIC)
    assert_known(tmp_path / "in", known)
    checkpoint = Checkpoint.open(tmp_path / "in")
    spec = {name.removeprefix("model.layers."): checkpoint.spec_of(name) for name in known}
    assert spec["0.mlp.up_proj"] == QuantSpec(8, 32, False, True) and spec["0.mlp.gate_proj"] is None
    assert spec["0.self_attn.o_proj"] == QuantSpec(4, 16, True, False) and spec["1.mlp.down_proj"] is None
    assert spec["1.self_attn.v_proj"] == QuantSpec(2, -1, False, True) and spec["1.self_attn.q_proj"] is None


def test_dynamic_keys_with_and_without_a_sign(tmp_path: Path) -> None:
    known = known_checkpoint(tmp_path / "in", PLAIN, overrides={r".*up_proj": {"bits": 8}, r".*v_proj": None})
    section(dynamic={".*up_proj": {"bits": 8}, "-:.*v_proj": {}})(tmp_path / "in")
    assert_known(tmp_path / "in", known)


def test_dynamic_through_convert_and_verify(tmp_path: Path) -> None:
    """A gate that stays 16-bit is reordered with its MLP; logits of both files agree."""
    folder = random_checkpoint(tmp_path / "in", "llama", QuantSpec(4, 16, False, True))
    checkpoint = Checkpoint.open(folder)
    gate, down = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"
    changes: dict[str, torch.Tensor | None] = {}
    for name in (gate, down, "model.layers.0.self_attn.q_proj"):
        changes[f"{name}.weight"] = checkpoint.weight(name).dequantize().half().T.contiguous()
        changes |= {f"{name}.{suffix}": None for suffix in checkpoint.matrix_tensors(name)}
    tensors(changes)(folder)
    section(dynamic={rf"-:{name.replace('.', chr(92) + '.')}$": {} for name in (gate, down)})(folder)
    report = convert(folder, tmp_path / "out")
    assert report.mlps_reordered == 1
    order = torch.argsort(checkpoint.tensor("model.layers.0.mlp.down_proj.g_idx"), stable=True)
    moved = Checkpoint.open(tmp_path / "out").tensor(f"{gate}.weight")
    assert torch.equal(moved, Checkpoint.open(folder).tensor(f"{gate}.weight")[order])
    assert Checkpoint.open(tmp_path / "out").gptq.overrides == Checkpoint.open(folder).gptq.overrides
    found = verify(tmp_path / "out", against=folder)
    assert found.logits_error is not None and found.equal_matrices == found.matrices


def test_tied_embeddings(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "in", "llama", QuantSpec(4, 16, False, True), tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(folder).files
    convert(folder, tmp_path / "out")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "out").files
    assert verify(tmp_path / "out", against=folder).logits_error is not None


def test_a_quantized_lm_head(tmp_path: Path) -> None:
    """GPTQModel's `lm_head: true`: outside the blocks, kept as it is, and checked by verify."""
    folder = random_checkpoint(tmp_path / "in", "llama", QuantSpec(4, 16, False, True))
    head = random_weight(64, 96, QuantSpec(4, 16, False, True), torch.Generator().manual_seed(1))
    packed = {f"lm_head.{suffix}": tensor for suffix, tensor in GptqLayout(2).pack(head).items()}
    tensors({"lm_head.weight": None, **packed})(folder)
    section(lm_head=True)(folder)
    convert(folder, tmp_path / "out")
    assert torch.equal(Checkpoint.open(tmp_path / "out").weight("lm_head").dequantize(), head.dequantize())
    assert Checkpoint.open(tmp_path / "out").gptq.to_json()["lm_head"] is True
    assert verify(tmp_path / "out", against=folder).logits_error is not None
