"""The C kernels of csrc/linear.c, called through ctypes: several times plain torch's speed on a processor.

They read weights whose words of 16 output channels lie together: `Mix64Layout.group_rows` and `GptqLayout.group_rows`
put them so once, when a model has been loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from bitshard.spec import BLOCK

INSTRUCTION_SETS = ("any processor", "AVX2", "AVX-512", "AVX-512 with VNNI")


@cache
def library() -> ctypes.CDLL | None:
    """None where the package was installed without a C compiler."""
    built = sorted(Path(__file__).parent.glob("_linear*.so"))
    return ctypes.CDLL(str(built[0])) if built else None


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
    """GPTQ tensors from `GptqLayout.group_rows`. bits8: activations rounded to 8 bits, each 64 with a scale."""
    sizes = out_features, x.shape[-1], x.shape[-1] // scales.shape[1]
    return _call("bitshard_gptq", x, out_features, sizes, (bits,), (qweight, scales, zeros), bits8)


def mix64_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qextra: torch.Tensor | None,
    metadata: Sequence[torch.Tensor],
    outliers: Sequence[torch.Tensor],
    out_features: int,
    wide: int,
    bits8: bool,
) -> torch.Tensor:
    """`mix64` tensors from `Mix64Layout.group_rows`. wide: 4-bit strips of each block."""
    scales2, qscales, qzeros = metadata
    sizes = out_features, x.shape[-1] // BLOCK
    tensors = qweight, qextra, qscales, qzeros, scales2, *(outliers or (None,) * 3)
    return _call("bitshard_mix64", x, out_features, sizes, (wide,), tensors, bits8)


def _call(
    function: str,
    x: torch.Tensor,
    out_features: int,
    sizes: Sequence[int],
    widths: Sequence[int],
    tensors: Sequence[torch.Tensor | None],
    bits8: bool,
) -> torch.Tensor:
    x_MK = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    y_MN = torch.empty(len(x_MK), out_features)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    failed = getattr(library(), function)(
        ctypes.c_void_p(x_MK.data_ptr()),
        ctypes.c_void_p(y_MN.data_ptr()),
        *map(ctypes.c_int64, (len(x_MK), *sizes)),
        *widths,
        *map(ctypes.c_void_p, pointers),
        int(bits8),
        instruction_set(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"{function}: {len(x_MK)} tokens")
    return y_MN.view(*x.shape[:-1], out_features).to(x.dtype)
