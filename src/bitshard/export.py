"""`bitshard export`: the same weights, exactly, in a format that other engines read.

GPTQ and compressed-tensors have groups of consecutive channels, with one width for a matrix. A `mix64` matrix without
outliers fits in there: its strips are groups of 16 channels, and its 2-bit codes 4-bit ones that happen to be small.
That takes 5.25 bits a weight; it is for engines that know nothing of us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitshard.bitpack import pack
from bitshard.checkpoint import Checkpoint
from bitshard.errors import FormatError, SpecError
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.mixed import MixedWeight
from bitshard.progress import Progress, silent
from bitshard.quantconfig import QuantConfig
from bitshard.quantized import QuantizedWeight, trivial_g_idx
from bitshard.spec import STRIP, MixSpec, QuantSpec, codes_per_pack
from bitshard.writer import OUTSIDE, Task, Writer, block_shard

FORMATS = ("gptq", "compressed-tensors")
OF_STRIPS = QuantSpec(4, STRIP, sym=False)  # what a `mix64` matrix is in either


@dataclass(frozen=True)
class ExportReport:
    """average_bits: of the exported matrices, codes, scales and zeros."""

    out: str
    format: str
    matrices: int
    average_bits: float


def export(source: Path, out: Path, to: str, progress: Progress = silent) -> ExportReport:
    """Write the quantized checkpoint `source` in another format into the new folder `out`; resumable.

    Raises SpecError for an unknown format, and FormatError with a matrix's name for what the format cannot hold, before
    anything is written.
    """
    if to not in FORMATS:
        raise SpecError("--to", repr(to), " or ".join(FORMATS), "choose one of them")
    checkpoint = Checkpoint.open(source)
    checkpoint.check_matrices()
    if to == "gptq" and isinstance(checkpoint.layout, GptqLayout):
        raise FormatError(str(source), "a GPTQ checkpoint", "another format than the one it has", "use it as it is")
    matrices = checkpoint.matrices()
    specs = {name: _exported_spec(checkpoint, name, to) for name in matrices}
    if len(set(specs.values())) > 1:
        raise FormatError(str(source), "matrices of several specs", "one for all of them", "quantize without `dynamic`")
    blocks = range(checkpoint.sizes.layers)
    task = Task({"verb": "export", "to": to, "format version": FORMAT_VERSION}, {"model": checkpoint.fingerprint()})
    writer = Writer(out, [OUTSIDE, *map(block_shard, blocks)], task, to)
    if not writer.has(OUTSIDE):
        writer.write(OUTSIDE, _exported(checkpoint, checkpoint.names_outside_blocks(), to))
    for layer in progress(blocks, "exporting"):
        if not writer.has(block_shard(layer)):
            writer.write(block_shard(layer), _exported(checkpoint, checkpoint.names_in_block(layer), to))
    spec, provenance = specs[matrices[0]], checkpoint.quantized.section.get("provenance", {})
    if to == "gptq":
        section = {"version": FORMAT_VERSION, "layout": GptqLayout.name, "provenance": provenance}
        writer.finish(source, checkpoint.config, QuantConfig(spec, GptqLayout(2), (), section).to_json())
    else:
        writer.finish(source, checkpoint.config, _compressed_section(checkpoint, spec))
    zero_bits = 0 if spec.sym and to != "gptq" else spec.bits  # which compressed-tensors does not store then
    return ExportReport(str(out), to, len(matrices), spec.bits + (16 + zero_bits) / spec.group_size)


def _exported_spec(checkpoint: Checkpoint, name: str, to: str) -> QuantSpec:
    """What a matrix is in a format, without reading its codes; FormatError with its name where it cannot be."""
    spec, where, suffixes = checkpoint.spec_of(name), checkpoint.where(name), checkpoint.layout.suffixes
    found = checkpoint.shapes(f"{name}.{suffix}" for suffix in suffixes)
    shapes = {full_name.rpartition(".")[2]: shape for full_name, shape in found.items()}
    k, n = checkpoint.layout.check_shapes(where, shapes, spec, checkpoint.size_of(name))
    if isinstance(spec, MixSpec):
        if shapes.get("outlier_values", [0])[0]:
            raise FormatError(where, "16-bit outliers", "codes alone", "quantize without --outliers")
        if max(spec.widths) > 4:
            raise FormatError(where, f"{spec.bits}-bit strips", "up to 4 bits", "quantize to --format gptq")
        if k % STRIP:
            raise FormatError(where, f"{k} input channels", f"whole groups of {STRIP}", "quantize with --max-tp 1")
        spec = OF_STRIPS
    elif checkpoint.is_irregular(name):
        raise FormatError(
            where, "an irregular g_idx", f"groups in order, as {to} has them", "quantize with --order model"
        )
    assert isinstance(spec, QuantSpec)
    if to != "gptq" and (spec.bits not in (4, 8) or spec.group_size == -1):
        own = f"{spec.bits} bits in groups of {spec.group_size}"
        raise FormatError(where, own, f"4 or 8 bits in groups, as {to} has them", "quantize so, or keep the GPTQ file")
    if n % codes_per_pack(spec.bits):
        raise FormatError(where, f"{n} output channels", f"whole words of {spec.bits}-bit zeros", "keep this format")
    return spec


def _of_strips(weight: MixedWeight) -> QuantizedWeight:
    """A `mix64` matrix in groups of 16 channels, with 4 bits each, in the model's order."""
    place_S = torch.arange(weight.zeros_NS.shape[1]) if weight.strip_order_S is None else weight.strip_order_S.argsort()
    place_S = place_S[: weight.in_features // STRIP]  # without what fills up a block
    codes_NSR = weight.codes_NK.view(weight.out_features, -1, STRIP)[:, place_S]
    return QuantizedWeight(
        OF_STRIPS,
        codes_NSR.flatten(1).T.contiguous(),
        weight.scales()[:, place_S].T.contiguous(),
        weight.zeros_NS[:, place_S].T.contiguous(),
        trivial_g_idx(weight.in_features, STRIP),
        weight.bias_N,
    )


def _exported(checkpoint: Checkpoint, names: Iterable[str], to: str) -> dict[str, torch.Tensor]:
    """Tensors of a shard, with those of quantized matrices in the format's own shape."""
    names, packed = list(names), set(checkpoint.matrices())
    tensors = checkpoint.read(name for name in names if name.rpartition(".")[0] not in packed)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        if name in packed:
            weight = checkpoint.weight(name)
            weight = _of_strips(weight) if isinstance(weight, MixedWeight) else weight
            own = GptqLayout(2).pack(weight) if to == "gptq" else _compressed(weight)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in own.items()}
    return tensors


def _compressed(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """compressed-tensors 0.20, `pack-quantized`: codes less half their range, that added again; packed along a row."""
    bits = weight.spec.bits
    tensors = {
        "weight_packed": pack(weight.codes_KN.T, bits, dim=1),
        "weight_scale": weight.scales_GN.T.contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not weight.spec.sym:
        tensors["weight_zero_point"] = pack(weight.zeros_GN.T, bits, dim=0)
    if weight.bias_N is not None:
        tensors["bias"] = weight.bias_N.contiguous()
    return tensors


def _compressed_section(checkpoint: Checkpoint, spec: QuantSpec) -> Mapping[str, Any]:
    weights = {
        "num_bits": spec.bits, "type": "int", "symmetric": spec.sym, "strategy": "group",
        "group_size": spec.group_size, "dynamic": False,
    }  # fmt: skip
    quantized = set(checkpoint.matrices())
    linears = {name for layer in range(checkpoint.sizes.layers) for name, _ in checkpoint.plan().linears(layer)}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *sorted(linears - quantized)],
    }
