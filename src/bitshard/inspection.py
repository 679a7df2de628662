"""`bitshard inspect`: what a checkpoint says it is, matrix by matrix. Reads headers and `g_idx`, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitshard.bitpack import packed_length
from bitshard.checkpoint import Checkpoint
from bitshard.layout import FORMAT_VERSION, GptqLayout, check_shapes


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix; sizes in channels, bytes of all its tensors. order: "in order" (consecutive groups) or "by g_idx"."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    order: str
    bytes: int

    @property
    def average_bits(self) -> float:
        return self.bytes * 8 / (self.in_features * self.out_features)


@dataclass(frozen=True)
class Inspection:
    """layout and version: of the bytes; provenance: where they come from, empty for a file bitshard did not write."""

    path: str
    model_type: str
    method: str
    layout: str
    version: int
    zeros_version: int
    spec: Mapping[str, Any]
    degrees: Sequence[int]
    average_bits: float
    matrices: Sequence[MatrixInfo]
    provenance: Mapping[str, Any]


def inspect(path: Path) -> Inspection:
    """Describe the GPTQ checkpoint `path`. Raises FormatError for one that is not quantized."""
    checkpoint = Checkpoint.open(path)
    quantization, plan = checkpoint.gptq, checkpoint.plan()
    matrices = [_matrix(checkpoint, name) for name in checkpoint.matrices()]
    weights = sum(m.in_features * m.out_features for m in matrices)
    return Inspection(
        path=str(path),
        model_type=str(checkpoint.config.get("model_type")),
        method="gptq",
        layout=GptqLayout.name,
        version=quantization.section.get("version", FORMAT_VERSION),
        zeros_version=quantization.layout.zeros_version,
        spec=vars(quantization.spec),
        degrees=plan.legal_degrees(),
        average_bits=sum(m.bytes for m in matrices) * 8 / weights,
        matrices=sorted(matrices, key=lambda m: _natural(m.name)),
        provenance=quantization.section.get("provenance", {}),
    )


def _matrix(checkpoint: Checkpoint, name: str) -> MatrixInfo:
    spec = checkpoint.spec_of(name)
    assert spec is not None  # it has a qweight
    tensors = checkpoint.shapes(f"{name}.{suffix}" for suffix in GptqLayout.suffixes)
    by_suffix = {tensor.rpartition(".")[2]: shape for tensor, shape in tensors.items()}
    k, n = check_shapes(checkpoint.where(name), by_suffix, spec)
    groups = k // spec.group(k)
    # g_idx is left out where it says nothing, bias is no weight
    size = 4 * prod(by_suffix["qweight"]) + groups * (2 * n + 4 * packed_length(n, spec.bits))
    irregular = checkpoint.is_irregular(name)
    return MatrixInfo(
        name=name,
        in_features=k,
        out_features=n,
        bits=spec.bits,
        group_size=spec.group_size,
        order="by g_idx" if irregular else "in order",
        bytes=size + (4 * k if irregular else 0),
    )


def _natural(name: str) -> list[Any]:
    """Sort key with numbers as numbers, so that layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
