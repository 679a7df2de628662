"""One torch op for each layout, `torch.ops.bitshard.gptq_linear` and `mix64_linear`, and the kernels behind them.

`gptq_linear`:

    y[..., n] = sum_k x[..., k] * (code[k, n] - zero[g[k], n]) * scale[g[k], n]

x float [..., K]; qweight, qzeros int32 and scales float as in layout.GptqLayout; g_idx int32 [K], or None when groups
are consecutive and of equal length, which lets a kernel read every scale in order. Output [..., out_features] in x's
dtype.

`mix64_linear`: y[..., n] = sum_k x[..., k] * w[n, k] with w as in mixed.MixedWeight. x float [..., K], K whole blocks
of 64 channels in stored order. The tensors are layout.Mix64Layout's: metadata those it names for `metadata_kind`, in
that order, outliers its three or none. bits, fraction_4bit and metadata_kind are MixSpec's. Output [..., out_features].

Tensors may be the file's, or `records` has put them as the C kernels read them. backend: the name of a
kernel, or "exact" or "auto", which choose one by this table; "exact" never takes the first:

| kernel | weights | chosen for |
|---|---|---|
| `cpu-int8` | grouped rows | up to 64 tokens; activations are rounded to 8 bits, each block of 64 with a scale |
| `cpu` | grouped rows | the rest of these |
| `reference` | any | everything else |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bitshard.errors import SpecError
from bitshard.kernels import cpu, reference

KERNELS = ("cpu-int8", "cpu", "reference")
BACKENDS = ("exact", "auto", *KERNELS)
MOST_INT8_TOKENS = 64  # above that a model reads rather than writes, and all of it is worth being exact

torch.library.define(
    "bitshard::gptq_linear",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, int out_features,"
    " int bits, int zeros_version, str backend) -> Tensor",
)
torch.library.define(
    "bitshard::mix64_linear",
    "(Tensor x, Tensor qweight, Tensor? qextra, Tensor[] metadata, Tensor[] outliers, int out_features, int bits,"
    " float fraction_4bit, str metadata_kind, str backend) -> Tensor",
)
gptq_linear = torch.ops.bitshard.gptq_linear.default
mix64_linear = torch.ops.bitshard.mix64_linear.default


def choose(grouped: bool, tokens: int, backend: str) -> str:
    """The kernel that runs. Raises SpecError for one that does not exist or cannot read these weights."""
    if backend == "auto" and grouped and tokens <= MOST_INT8_TOKENS:
        return "cpu-int8"
    if backend in ("auto", "exact"):
        return "cpu" if grouped else "reference"
    require_backend(backend)
    if backend != "reference" and not grouped:
        why = why_not_grouped() or "load the model with this backend"
        raise SpecError("backend", f"{backend} for weights as the file has them", "reference", why)
    return backend


def require_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise SpecError("backend", repr(backend), ", ".join(BACKENDS), "choose one of them")


def why_not_grouped() -> str:
    """What keeps the C kernels from running here; "" if nothing does."""
    return "" if cpu.library() is not None else "install bitshard where there is a C compiler"


@torch.library.impl("bitshard::gptq_linear", ("CPU", "CUDA"))
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    out_features: int,
    bits: int,
    zeros_version: int,
    backend: str,
) -> torch.Tensor:
    kernel = choose(qweight.dim() == 3, x.shape[:-1].numel(), backend)
    if kernel == "reference":
        return reference.gptq_linear(x, qweight, scales, qzeros, g_idx, out_features, bits, zeros_version)
    return cpu.gptq_linear(x, qweight, scales, qzeros, out_features, bits, kernel == "cpu-int8")


@torch.library.impl("bitshard::mix64_linear", ("CPU", "CUDA"))
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qextra: torch.Tensor | None,
    metadata: Sequence[torch.Tensor],
    outliers: Sequence[torch.Tensor],
    out_features: int,
    bits: int,
    fraction_4bit: float,
    metadata_kind: str,
    backend: str,
) -> torch.Tensor:
    kernel = choose(qweight.dim() == 3, x.shape[:-1].numel(), backend)
    if kernel == "reference":
        return reference.mix64_linear(
            x, qweight, qextra, metadata, outliers, out_features, bits, fraction_4bit, metadata_kind
        )
    wide = 4 if bits == 4 else int(4 * fraction_4bit)
    return cpu.mix64_linear(x, qweight, metadata[0], outliers, out_features, wide, kernel == "cpu-int8")


@torch.library.register_fake("bitshard::gptq_linear")  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor, qweight: Any, scales: Any, qzeros: Any, g_idx: Any, out_features: int, *rest: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("bitshard::mix64_linear")  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor, qweight: Any, qextra: Any, metadata: Any, outliers: Any, out_features: int, *rest: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
