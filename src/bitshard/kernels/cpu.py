"""The C kernels of csrc/linear.c, called through ctypes: several times plain torch's speed on a processor.

They read weights whose words of 16 output channels lie together: `records.mix64_rows` and `gptq_rows` put them so
once, when a model has been loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from bitshard.spec import BLOCK

NO_OUTLIERS = (None, None, None)
INSTRUCTION_SETS = ("any processor", "AVX2", "AVX-512", "AVX-512 with VNNI")
# weights times tokens: two threads took 10 us for 128 x 896 weights, of which one alone takes 6
WORTH_A_THREAD = 1 << 18

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
FUNCTIONS = {  # x, y, tokens, the weights, bits8, instruction set, threads
    "bitshard_gptq": (POINTER, POINTER, LONG, LONG, LONG, LONG, INT, *[POINTER] * 3, INT, INT, INT),
    "bitshard_mix64_side_by_side": (POINTER, POINTER, LONG, POINTER, INT, INT, INT, INT),
}


class Mix64(ctypes.Structure):
    """One weight from `records.mix64_rows`, as csrc/linear.c has it. wide: 4-bit strips of each block."""

    _fields_ = (
        ("out_features", LONG),
        ("blocks", LONG),
        ("wide", ctypes.c_int32),
        ("records", POINTER),
        ("scales2", POINTER),
        ("outlier_rows", POINTER),
        ("outlier_columns", POINTER),
        ("outlier_values", POINTER),
    )


@cache
def library() -> ctypes.CDLL | None:
    """None where there was no C compiler at installation, or what was built is another version's or machine's."""
    built = sorted(Path(__file__).parent.glob("_linear*.so"))
    if not built:
        return None
    try:
        found = ctypes.CDLL(str(built[0]))
    except OSError:
        return None
    if not all(hasattr(found, name) for name in FUNCTIONS):
        return None
    for name, arguments in FUNCTIONS.items():
        getattr(found, name).argtypes = arguments
    return found


def missing() -> str:
    return "" if library() is not None else "install bitshard again, where there is a C compiler"


@cache
def instruction_set() -> int:
    """The best that this processor has, an index of INSTRUCTION_SETS."""
    found = library()
    assert found is not None
    return int(found.bitshard_instruction_set())


def gptq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    out_features: int,
    bits: int,
    bits8: bool,
) -> torch.Tensor:
    """GPTQ tensors from `records.gptq_rows`. bits8: activations rounded to 8 bits, each 64 with a scale."""
    k = x.shape[-1]
    weight = out_features, k, k // scales.shape[1], bits, qweight.data_ptr(), scales.data_ptr(), zeros.data_ptr()
    return _call("bitshard_gptq", x, out_features, weight, bits8)


def mix64_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales2: torch.Tensor,
    outliers: Sequence[torch.Tensor],
    out_features: int,
    wide: int,
    bits8: bool,
) -> torch.Tensor:
    """`mix64` tensors from `records.mix64_rows`. wide: 4-bit strips of each block."""
    weight = mix64_fields(x, qweight, scales2, outliers, out_features, wide)
    return _call("bitshard_mix64_side_by_side", x, out_features, (array_of(weight), 1), bits8)


def mix64_linears(
    x: torch.Tensor,
    qweights: Sequence[torch.Tensor],
    scales2: Sequence[torch.Tensor],
    outliers: Sequence[torch.Tensor],
    out_features: Sequence[int],
    wides: Sequence[int],
    bits8: bool,
) -> torch.Tensor:
    """Several of them, their outputs side by side. outliers: three tensors for each, or none. Raises ValueError when
    there are not as many of everything.
    """
    own = [outliers[i : i + 3] for i in range(0, len(outliers), 3)] or [()] * len(qweights)
    weights = [mix64_fields(x, *weight) for weight in zip(qweights, scales2, own, out_features, wides, strict=True)]
    if not weights:
        raise ValueError("no weights")
    return _call("bitshard_mix64_side_by_side", x, sum(out_features), (array_of(*weights), len(weights)), bits8)


def mix64_fields(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales2: torch.Tensor,
    outliers: Sequence[torch.Tensor],
    out_features: int,
    wide: int,
) -> tuple[int | None, ...]:
    rows, columns, values = [tensor.data_ptr() for tensor in outliers] if outliers else NO_OUTLIERS
    blocks = x.shape[-1] // BLOCK
    return out_features, blocks, wide, qweight.data_ptr(), scales2.data_ptr(), rows, columns, values


@lru_cache(maxsize=1 << 14)  # more than any model has matrices; to make one takes several microseconds
def array_of(*weights: tuple[int | None, ...]) -> ctypes.Array[Mix64]:
    """Nothing but these numbers, so it holds for whatever stands at those addresses."""
    return (Mix64 * len(weights))(*(Mix64(*weight) for weight in weights))


def _call(function: str, x: torch.Tensor, out_features: int, weight: Sequence[Any], bits8: bool) -> torch.Tensor:
    """Little Python: every microsecond here is one for each matrix of each token."""
    k = x.shape[-1]
    exact = x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
    y = exact.new_empty(*x.shape[:-1], out_features)
    tokens = exact.numel() // k
    threads = min(torch.get_num_threads(), 1 + tokens * k * out_features // WORTH_A_THREAD)
    failed = getattr(library(), function)(
        exact.data_ptr(), y.data_ptr(), tokens, *weight, bits8, instruction_set(), threads
    )
    if failed:
        raise MemoryError(f"{function}: {tokens} tokens")
    return y if y.dtype == x.dtype else y.to(x.dtype)
