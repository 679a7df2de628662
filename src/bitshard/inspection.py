"""`bitshard inspect`: what a checkpoint says it is, matrix by matrix. Reads headers and `g_idx`, no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch

from bitshard.checkpoint import REPORT, Checkpoint, read_json, reason
from bitshard.errors import CheckpointError, FormatError
from bitshard.kernels import Arrangement, choose, why_not_arranged
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.records import why_not_read
from bitshard.spec import MixSpec, QuantSpec


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix; sizes in channels, bytes of all its tensors but the bias, average bits from the bytes.

    order: "in order" (consecutive groups), "by g_idx" or "by strip_order". outliers: how many. error and share_4bit,
    where quantizing left them: output error relative to the output, and the share of the Hessian-weighted error that
    would be in the 4-bit strips. block_error: where tuning left it instead, the error of its block's outputs. kernel,
    prompt_kernel: what multiplies it by one token and by 512 here. slow: why plain torch does, if so, else "".
    """

    name: str
    in_features: int
    out_features: int
    spec: QuantSpec | MixSpec
    order: str
    bytes: int
    average_bits: float
    outliers: int
    error: float | None
    block_error: float | None
    share_4bit: float | None
    kernel: str
    prompt_kernel: str
    slow: str


@dataclass(frozen=True)
class Inspection:
    """layout and version: of the bytes; provenance: where they come from, empty for a file bitshard did not write.

    zeros_version: of the public format, None for `mix64`.
    """

    path: str
    model_type: str
    method: str
    layout: str
    version: int
    zeros_version: int | None
    spec: Mapping[str, Any]
    degrees: Sequence[int]
    average_bits: float
    matrices: Sequence[MatrixInfo]
    provenance: Mapping[str, Any]

    @property
    def outlier_share(self) -> float:
        """Outliers per weight."""
        return sum(m.outliers for m in self.matrices) / sum(m.in_features * m.out_features for m in self.matrices)


def inspect(path: Path) -> Inspection:
    """Describe the quantized checkpoint `path`. Raises FormatError for one that is not quantized."""
    checkpoint = Checkpoint.open(path)
    quantization, plan = checkpoint.quantized, checkpoint.plan()
    in_use = [name for layer in range(plan.sizes.layers) for name, _ in plan.linears(layer)]
    places = {name: i for i, name in enumerate(in_use)}
    report = read_json(path / REPORT) if (path / REPORT).exists() else {}
    matrices = [_matrix(checkpoint, name, _solved(path, report, name)) for name in checkpoint.matrices()]
    weights = sum(m.in_features * m.out_features for m in matrices)
    layout = quantization.layout
    return Inspection(
        path=str(path),
        model_type=str(checkpoint.config.get("model_type")),
        method=layout.method,
        layout=layout.name,
        version=quantization.section.get("version", FORMAT_VERSION),
        zeros_version=layout.zeros_version if isinstance(layout, GptqLayout) else None,
        spec=vars(quantization.spec),
        degrees=plan.legal_degrees(),
        average_bits=sum(m.bytes for m in matrices) * 8 / weights,
        matrices=sorted(matrices, key=lambda m: (places.get(m.name, len(places)), _natural(m.name))),
        provenance=quantization.section.get("provenance", {}),
    )


def _solved(path: Path, report: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """What the quantizer's report says of one matrix; FormatError when it is no report."""
    row = report.get(name, {})
    found = {key: row.get(key) if isinstance(row, dict) else row for key in ("error", "block_error", "share_4bit")}
    for key, value in found.items():
        if value is not None and type(value) not in (int, float):
            raise FormatError(f"{path / REPORT}: {name}", f"{key} {value!r}", "a number", "get the file again")
    return found


def _matrix(checkpoint: Checkpoint, name: str, solved: Mapping[str, float | None]) -> MatrixInfo:
    spec, layout = checkpoint.spec_of(name), checkpoint.layout
    assert spec is not None  # it has a qweight
    tensors = checkpoint.shapes(f"{name}.{suffix}" for suffix in layout.suffixes)
    by_suffix = {tensor.rpartition(".")[2]: shape for tensor, shape in tensors.items()}
    k, n = layout.check_shapes(checkpoint.where(name), by_suffix, spec, checkpoint.size_of(name))
    irregular = checkpoint.is_irregular(name)
    size = layout.matrix_bytes(by_suffix, spec, (k, n))
    kernel, prompt_kernel, slow = _kernels(layout.name, spec, k)
    return MatrixInfo(
        name=name,
        in_features=k,
        out_features=n,
        spec=spec,
        order=f"by {layout.order_suffix}" if irregular else "in order",
        bytes=size,
        average_bits=size * 8 / (k * n),
        outliers=by_suffix.get("outlier_values", [0])[0],
        kernel=kernel,
        prompt_kernel=prompt_kernel,
        slow=slow,
        **solved,
    )


def _kernels(layout: str, spec: QuantSpec | MixSpec, in_features: int) -> tuple[str, str, str]:
    """What `generate` takes, in its dtype on this machine, for a token and for 512, and why plain torch, if it does."""
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    slow = why_not_arranged(device, layout) or why_not_read(spec, in_features, device)
    arrangement: Arrangement = "file" if slow else "gpu" if device == "cuda" else "cpu"
    kernel, prompt_kernel = (choose(layout, arrangement, dtype, tokens, "auto") for tokens in (1, 512))
    return kernel, prompt_kernel, slow


PANELS = {
    "average bits": "average_bits",
    "relative output error": "error",
    "error of the block's outputs": "block_error",
    "share of the error in 4-bit strips": "share_4bit",
    "outliers": "outliers",
}


def draw(inspection: Inspection, path: Path) -> Path:
    """One heat map, layers x linears, for every number that is known; experts of a block as their mean.

    Returns where it is: a name without a suffix gets .png.

    CheckpointError when the file cannot be written, or its suffix names no kind of picture.
    """
    from matplotlib.figure import Figure

    places = [(m, match) for m in inspection.matrices if (match := re.search(r"\.(\d+)\.(.+)", m.name))]
    kinds = list(dict.fromkeys(re.sub(r"\d+", "*", match[2]) for _, match in places))
    layers = sorted({int(match[1]) for _, match in places})
    figure = Figure(figsize=(3 + 0.45 * len(kinds) * len(PANELS), 3 + 0.16 * len(layers)), layout="constrained")
    grids = {}
    for title, field in PANELS.items():
        cells: dict[tuple[int, int], list[float]] = {}
        for m, match in places:
            place = layers.index(int(match[1])), kinds.index(re.sub(r"\d+", "*", match[2]))
            cells.setdefault(place, []).append(getattr(m, field))
        if any(value for values in cells.values() for value in values):
            grids[title] = [
                [_mean(cells.get((row, column), [])) for column in range(len(kinds))] for row in range(len(layers))
            ]
    for axis, (title, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        figure.colorbar(axis.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest"), ax=axis)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(kinds)), [kind.rpartition(".")[2] for kind in kinds], rotation=90, fontsize=8)
        every = max(1, len(layers) // 12)  # labels that fit
        axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=8)
    figure.suptitle(f"{Path(inspection.path).name}: {inspection.average_bits:.3f} bits", fontsize=10)
    figure.supylabel("layer", fontsize=9)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path),
            reason(error),
            "a picture file that can be written",
            "choose another name, such as bits.png, in a folder that is there",
        ) from None
    return path


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else nan


def _natural(name: str) -> list[Any]:
    """Sort key with numbers as numbers, so that expert 2 comes before expert 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
