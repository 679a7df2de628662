"""One torch op for each layout, `torch.ops.bitshard.gptq_linear` and `mix64_linear`, and the kernels behind them; one
for several `mix64` matrices at once.

`gptq_linear`:

    y[..., n] = sum_k x[..., k] * (code[k, n] - zero[g[k], n]) * scale[g[k], n]

x float [..., K]; qweight, qzeros int32 and scales float as in layout.GptqLayout; g_idx int32 [K], or None when groups
are consecutive and of equal length, which lets a kernel read every scale in order. Output [..., out_features] in x's
dtype.

`mix64_linear`: y[..., n] = sum_k x[..., k] * w[n, k] with w as in mixed.MixedWeight. x float [..., K], K whole blocks
of 64 channels in stored order. The tensors are layout.Mix64Layout's: metadata those it names for `metadata_kind`, in
that order, outliers its three or none. bits, fraction_4bit and metadata_kind are MixSpec's. Output [..., out_features].

`mix64_linears`: several of them on one x, their outputs side by side, [..., sum of out_features]; as the C kernels read
them. outliers: three tensors for each, or none at all; wides: 4-bit strips of each block. `fuse` makes such calls.

arrangement: "file", or "cpu" or "gpu" when `records` has put the tensors as kernels there read them. backend: "exact"
or "auto", which take the first of KERNELS that reads the weights, the dtype and so many tokens ("exact" none that
rounds activations), or the name of one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from bitshard.errors import SpecError
from bitshard.kernels import cpu, decode, reference
from bitshard.spec import MixSpec

logger = logging.getLogger(__name__)

Arrangement = Literal["file", "cpu", "gpu"]
HALVES = (torch.float16, torch.bfloat16)


@cache
def why_not_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "install triton: pip install 'triton>=3.6,<3.10'"


@dataclass(frozen=True)
class Kernel:
    """One way to multiply. missing: what keeps it from running here; "" if nothing does."""

    name: str
    reads: tuple[Arrangement, ...]
    missing: Callable[[], str]
    layouts: tuple[str, ...] = ("gptq", "mix64")
    dtypes: tuple[torch.dtype, ...] = (*HALVES, torch.float32)
    most_tokens: int | None = None  # for which it is chosen
    exact: bool = True  # activations are taken as they are

    def takes(self, layout: str, arrangement: Arrangement, dtype: torch.dtype) -> bool:
        """Whether it can multiply these, where it runs at all."""
        return arrangement in self.reads and layout in self.layouts and dtype in self.dtypes

    def needs(self, arrangement: Arrangement) -> str:
        """What this machine lacks for it, where weights are arranged so; "" if nothing."""
        return "an NVIDIA GPU is needed" if self.reads == ("gpu",) and arrangement != "gpu" else ""

    def fits(self, tokens: int, backend: str) -> bool:
        """Whether it is what a backend asks for with so many tokens."""
        if backend not in ("exact", "auto"):
            return backend == self.name
        return (self.most_tokens is None or tokens <= self.most_tokens) and (self.exact or backend == "auto")


KERNELS = (  # in order of preference
    Kernel("cpu-int8", ("cpu",), cpu.missing, exact=False),
    Kernel("cpu", ("cpu",), cpu.missing),
    Kernel("decode", ("gpu",), decode.missing, ("mix64",), HALVES, decode.MOST_TOKENS),
    Kernel("triton", ("gpu",), why_not_triton),
    Kernel("reference", ("file", "cpu", "gpu"), lambda: "", dtypes=(*HALVES, torch.float32, torch.float64)),
)
BACKENDS = ("exact", "auto", *(kernel.name for kernel in KERNELS))
BACKEND = "BITSHARD_BACKEND"  # environment: one of them, for programs that pass no config on

torch.library.define(
    "bitshard::gptq_linear",
    "(Tensor x, Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, int out_features,"
    " int bits, int zeros_version, str arrangement, str backend) -> Tensor",
)
torch.library.define(
    "bitshard::mix64_linear",
    "(Tensor x, Tensor qweight, Tensor? qextra, Tensor[] metadata, Tensor[] outliers, int out_features, int bits,"
    " float fraction_4bit, str metadata_kind, str arrangement, str backend) -> Tensor",
)
torch.library.define(
    "bitshard::mix64_linears",
    "(Tensor x, Tensor[] qweights, Tensor[] scales2, Tensor[] outliers, int[] out_features, int[] wides, str backend)"
    " -> Tensor",
)
ANY_DEVICE = "CompositeExplicitAutograd"  # torch's word for it: plain torch runs on all
gptq_linear = torch.ops.bitshard.gptq_linear.default
mix64_linear = torch.ops.bitshard.mix64_linear.default
mix64_linears = torch.ops.bitshard.mix64_linears.default


@lru_cache(maxsize=1024)
def choose(layout: str, arrangement: Arrangement, dtype: torch.dtype, tokens: int, backend: str) -> str:
    """The kernel that runs. Raises SpecError for one that does not exist or cannot read this."""
    require_backend(backend)
    for kernel in _wanted(layout, arrangement, dtype, tokens, backend):
        if not kernel.missing():
            return kernel.name
    able = [kernel for kernel in KERNELS if kernel.takes(layout, arrangement, dtype) and not kernel.missing()]
    if not able:
        raise SpecError("input", _name(dtype), ", ".join(map(_name, KERNELS[-1].dtypes)), "convert it to one of these")
    asked = next(kernel for kernel in KERNELS if kernel.name == backend)
    what = {"file": "weights as the file has them", "cpu": "weights on a processor", "gpu": "weights on a GPU"}
    raise SpecError(
        "backend",
        f"{backend} for {layout} {what[arrangement]}, {_name(dtype)} activations",
        ", ".join(["exact", "auto", *(kernel.name for kernel in able)]),
        (layout in asked.layouts and (asked.missing() or asked.needs(arrangement))) or "choose one of these",
    )


def _wanted(layout: str, arrangement: Arrangement, dtype: torch.dtype, tokens: int, backend: str) -> list[Kernel]:
    """Those that take all this, in order of preference, wherever they run."""
    return [k for k in KERNELS if k.takes(layout, arrangement, dtype) and k.fits(tokens, backend)]


@lru_cache(maxsize=1024)
def _to_run(layout: str, arrangement: Arrangement, dtype: torch.dtype, tokens: int, backend: str) -> str:
    """`choose`; where it is not what was to run that is said, as nobody would notice by the results."""
    name = choose(layout, arrangement, dtype, tokens, backend)
    first = _wanted(layout, arrangement, dtype, tokens, backend)[0]
    if name != first.name:
        _report(f"{name} runs instead of {first.name}: {first.missing()}")
    elif name == "reference" != backend and arrangement != "file":
        _report(f"plain torch runs {layout} for {_name(dtype)} activations, which no other kernel takes")
    return name


@cache
def _report(what: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(what)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wide_strips(bits: int, fraction_4bit: float) -> int:
    """4-bit strips of each block."""
    return 4 if bits == 4 else int(4 * fraction_4bit)


HOMES = {"cpu": "cpu", "gpu": "cuda"}  # device types, by arrangement


def _require_device(x: torch.Tensor, weight: torch.Tensor, arrangement: Arrangement) -> None:
    """C would read a GPU's pointers, and a GPU C's."""
    if x.is_cpu and weight.is_cpu and arrangement != "gpu":  # a tenth of the time that the rest takes
        return
    if x.device != weight.device or x.device.type != HOMES.get(arrangement, x.device.type):
        made = f", arranged for {HOMES[arrangement]}" if arrangement in HOMES else ""
        raise SpecError(
            "input", f"one on {x.device}, with weights on {weight.device}{made}",
            "both on the device that the model was loaded on",
            "move the input there; load a model where it is to run instead of moving it",
        )  # fmt: skip


def require_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise SpecError("backend", repr(backend), ", ".join(BACKENDS), "choose one of them")


def require_runs(backend: str) -> None:
    """Raise SpecError for a backend that does not exist, or a kernel that cannot run on this machine."""
    require_backend(backend)
    for kernel in (kernel for kernel in KERNELS if kernel.name == backend):  # decode compiles itself to find out
        if why := kernel.missing() or kernel.needs("gpu" if torch.cuda.is_available() else "cpu"):
            raise SpecError("backend", f"{backend}, which does not run here", "exact, auto and what does", why)


def why_not_arranged(device: str, layout: str = "mix64") -> str:
    """What keeps faster kernels than the reference from running on a device; "" if nothing does."""
    if device == "cuda":
        only_decode = layout == "mix64" and why_not_triton() and not decode.missing()
        return "" if only_decode else why_not_triton()
    return cpu.missing() if device == "cpu" else f"there are no kernels for {device}"


@torch.library.impl("bitshard::gptq_linear", ANY_DEVICE)
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    out_features: int,
    bits: int,
    zeros_version: int,
    arrangement: Arrangement,
    backend: str,
) -> torch.Tensor:
    _require_device(x, qweight, arrangement)
    kernel = _to_run("gptq", arrangement, x.dtype, x.shape[:-1].numel(), backend)
    if kernel == "reference":
        tensors = qweight, scales, qzeros, g_idx, out_features, bits, zeros_version
        return x @ reference.gptq_matrix(x.dtype, *tensors).T
    if kernel == "triton":
        from bitshard.kernels import triton

        return triton.gptq_linear(x, qweight, scales, qzeros, g_idx, bits)
    return cpu.gptq_linear(x, qweight, scales, qzeros, out_features, bits, kernel == "cpu-int8")


@torch.library.impl("bitshard::mix64_linear", ANY_DEVICE)
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
    arrangement: Arrangement,
    backend: str,
) -> torch.Tensor:
    _require_device(x, qweight, arrangement)
    kernel = _to_run("mix64", arrangement, x.dtype, x.shape[:-1].numel(), backend)
    if kernel == "reference":
        tensors = qweight, qextra, metadata, outliers, out_features, MixSpec(bits, fraction_4bit, metadata_kind)
        return x @ reference.mix64_matrix(x.dtype, x.shape[-1], *tensors, arrangement).T
    wide = wide_strips(bits, fraction_4bit)
    if kernel == "decode":
        return decode.mix64_linear(x, qweight, metadata[0], outliers, out_features, wide)
    if kernel == "triton":
        from bitshard.kernels import triton

        return triton.mix64_linear(x, qweight, metadata[0], outliers, out_features, wide)
    return cpu.mix64_linear(x, qweight, metadata[0], outliers, out_features, wide, kernel == "cpu-int8")


@torch.library.impl("bitshard::mix64_linears", ("CPU",))
def _(
    x: torch.Tensor,
    qweights: Sequence[torch.Tensor],
    scales2: Sequence[torch.Tensor],
    outliers: Sequence[torch.Tensor],
    out_features: Sequence[int],
    wides: Sequence[int],
    backend: str,
) -> torch.Tensor:
    kernel = _to_run("mix64", "cpu", x.dtype, x.shape[:-1].numel(), backend)
    assert kernel != "reference"  # which reads one matrix at a time
    return cpu.mix64_linears(x, qweights, scales2, outliers, out_features, wides, kernel == "cpu-int8")


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: Any, *rest: Any) -> torch.Tensor:
        ctx.op, ctx.rest, ctx.in_features = op, rest, x.shape[-1]
        return cast(torch.Tensor, op(x, *rest))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The same product the other way round, with the matrix written out, in the gradient's dtype."""
        dtype, rest = grads[0].dtype, ctx.rest
        if ctx.op is gptq_linear:
            matrix = reference.gptq_matrix(dtype, *rest[:-2])
        else:
            qweight, qextra, metadata, outliers, rows, *spec, arrangement, _ = rest
            tensors = qweight, qextra, metadata, outliers, rows
            matrix = reference.mix64_matrix(dtype, ctx.in_features, *tensors, MixSpec(*spec), arrangement)
        return grads[0] @ matrix, None, *(None for _ in rest)


def differentiable(op: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`gptq_linear` or `mix64_linear` with a gradient, the input's: weights are frozen. To be called only where one is
    asked for, as what torch registers for an op is Python around every call.
    """
    return cast(torch.Tensor, _Differentiable.apply(x, op, *rest))  # type: ignore[no-untyped-call]


@torch.library.register_fake("bitshard::mix64_linears")  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor, qweights: Any, scales2: Any, outliers: Any, out_features: Sequence[int], *rest: Any
) -> torch.Tensor:
    _require_device(x, qweights[0], "file")
    return x.new_empty(*x.shape[:-1], sum(out_features))


@torch.library.register_fake("bitshard::gptq_linear")  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor, qweight: Any, scales: Any, qzeros: Any, g_idx: Any, out_features: int, *rest: Any
) -> torch.Tensor:
    _require_device(x, qweight, "file")
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("bitshard::mix64_linear")  # type: ignore[untyped-decorator]
def _(
    x: torch.Tensor, qweight: Any, qextra: Any, metadata: Any, outliers: Any, out_features: int, *rest: Any
) -> torch.Tensor:
    _require_device(x, qweight, "file")
    return x.new_empty(*x.shape[:-1], out_features)
