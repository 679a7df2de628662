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
from bitshard.spec import STRIP, QuantSpec, codes_per_pack
from bitshard.writer import Task, Writer

FORMATS = ("gptq", "compressed-tensors")
OUTSIDE = "outside the blocks"
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
    specs = {name: logical(checkpoint, name, to).spec for name in matrices}
    if len(set(specs.values())) > 1:
        raise FormatError(str(source), "matrices of several specs", "one for all of them", "quantize without `dynamic`")
    blocks = [f"block {layer}" for layer in range(checkpoint.sizes.layers)]
    task = Task({"verb": "export", "to": to, "format version": FORMAT_VERSION}, {"model": checkpoint.fingerprint()})
    writer = Writer(out, [OUTSIDE, *blocks], task, to)
    if not writer.has(OUTSIDE):
        writer.write(OUTSIDE, _exported(checkpoint, checkpoint.names_outside_blocks(), to))
    for layer, block in enumerate(progress(blocks, "exporting")):
        if not writer.has(block):
            writer.write(block, _exported(checkpoint, checkpoint.names_in_block(layer), to))
    spec, provenance = specs[matrices[0]], checkpoint.quantized.section.get("provenance", {})
    if to == "gptq":
        section = {"version": FORMAT_VERSION, "layout": GptqLayout.name, "provenance": provenance}
        writer.finish(source, checkpoint.config, QuantConfig(spec, GptqLayout(2), (), section).to_json())
    else:
        writer.finish(source, checkpoint.config, _compressed_section(checkpoint, spec))
    return ExportReport(str(out), to, len(matrices), spec.bits + (16 + spec.bits) / spec.group_size)


def logical(checkpoint: Checkpoint, name: str, to: str) -> QuantizedWeight:
    """A matrix as a format holds it, or FormatError with its name."""
    weight, where = checkpoint.weight(name), checkpoint.where(name)
    if isinstance(weight, MixedWeight):
        weight = _of_strips(weight, where)
    if not weight.is_trivial:
        raise FormatError(
            where, "an irregular g_idx", f"groups in order, as {to} has them", "quantize with --order model"
        )
    if to != "gptq" and (weight.spec.bits not in (4, 8) or weight.spec.group_size == -1):
        found = f"{weight.spec.bits} bits in groups of {weight.spec.group_size}"
        raise FormatError(
            where, found, f"4 or 8 bits in groups, as {to} has them", "quantize so, or keep the GPTQ file"
        )
    if weight.out_features % codes_per_pack(weight.spec.bits):
        found = f"{weight.out_features} output channels"
        raise FormatError(where, found, f"whole words of {weight.spec.bits}-bit zeros", "keep this format")
    return weight


def _of_strips(weight: MixedWeight, where: str) -> QuantizedWeight:
    """A `mix64` matrix in groups of 16 channels, with 4 bits each, in the model's order."""
    if weight.outliers is not None and len(weight.outliers.values):
        raise FormatError(where, "16-bit outliers", "codes alone", "quantize without --outliers")
    if max(weight.spec.widths) > 4:
        raise FormatError(where, f"{weight.spec.bits}-bit strips", "up to 4 bits", "quantize to --format gptq")
    if weight.in_features % STRIP:
        raise FormatError(
            where, f"{weight.in_features} input channels", f"whole groups of {STRIP}", "use another model"
        )
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
            weight = logical(checkpoint, name, to)
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
