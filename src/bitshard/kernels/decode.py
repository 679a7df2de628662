"""The decode kernel of a GPU, decode.cu: `mix64` weights times a few tokens, with asynchronous copies.

NVRTC, which comes with torch, compiles it when it is first used: a variant for each kind of matrix and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F

from bitshard.records import ROWS

SOURCE = Path(__file__).with_name("decode.cu")
CHANNELS = 128  # of a record
MOST_TOKENS = 64  # every 16 tokens read the weights again: beyond 64 that is as much as float16 weights would be
_COMPILING = Lock()
BUSY_WARPS = 8  # on each multiprocessor, when enough copies are on their way


@dataclass(frozen=True)
class Variant:
    """What decode.cu is compiled with."""

    wide: int  # 4-bit strips of a block
    columns: int  # tokens of one product of the tensor core: 1, 2, 4, 8
    tiles: int  # products side by side
    bfloat: int
    warps: int = 4
    stages: int = 3
    prefetch: int = 1

    @classmethod
    def of(cls, wide: int, tokens: int, dtype: torch.dtype) -> Variant:
        columns = next((c for c in (1, 2, 4) if tokens <= c), 8)
        tiles = 1 if tokens <= 8 else 2  # with two, x in registers twice over would spill
        return cls(wide, columns, tiles, int(dtype == torch.bfloat16), prefetch=int(tiles == 1))

    @property
    def tokens(self) -> int:
        """Of a block of threads."""
        return self.columns * self.tiles

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads: the ring and expanded scales of each warp; the sums of all warps take their place."""
        stage = 2 * (4 * 32 * (4 + self.wide) + 6 * ROWS + 32)  # two records
        ring = self.warps * (self.stages * stage + (8 * 8 * ROWS if self.columns > 1 else 0))
        return max(ring, 4 * (self.warps + 1) * ROWS * self.tokens)

    def options(self) -> list[str]:
        return [f"-D{name.upper()}={value}" for name, value in asdict(self).items()]


@cache
def missing() -> str:
    """What keeps the kernel from running here; "" if nothing does: a variant of it was compiled."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "an NVIDIA GPU is needed"
    if torch.cuda.get_device_capability() < (8, 0):
        return "a GPU of compute capability 8.0 or later is needed"
    try:
        _compiled(Variant.of(1, 1, torch.float16), torch.device("cuda"))
    except (AttributeError, ImportError, OSError, RuntimeError) as error:  # torch's own, or NVRTC's
        return f"NVRTC does not compile it: {' '.join(str(error).split())[:200]}"
    return ""


def grid(variant: Variant, tokens: int, n: int, k: int, multiprocessors: int) -> tuple[int, int, int]:
    """Blocks of threads for rows, splits of K, tokens. Splits where rows alone leave multiprocessors idle."""
    rows, batches = -(-n // ROWS), -(-tokens // variant.tokens)
    wanted = multiprocessors * BUSY_WARPS // variant.warps
    turns = -(-k // (2 * CHANNELS)) // variant.warps  # of a warp, over all K
    return rows, max(1, min(wanted // (rows * batches), turns)), batches


def mix64_linear(
    x: torch.Tensor,
    records: torch.Tensor,
    scales2: torch.Tensor,
    outliers: Sequence[torch.Tensor],
    out_features: int,
    wide: int,
    **how: int,
) -> torch.Tensor:
    """x [..., K] float16 or bfloat16, K whole blocks of 64, tensors from `records.mix64_lanes` -> [..., N].

    how: fields of Variant that are to be otherwise.
    """
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    if unused := -x_MK.shape[1] % CHANNELS:
        x_MK = F.pad(x_MK, (0, unused))
    elif x_MK.data_ptr() % 8:
        x_MK = x_MK.clone()
    tokens, k = x_MK.shape
    y_MN = x_MK.new_empty(tokens, out_features)
    if tokens:
        variant = replace(Variant.of(wide, tokens, x.dtype), **how)
        blocks = grid(variant, tokens, out_features, k, _multiprocessors(x.device))
        launch(_compiled(variant, x.device), variant, blocks, x_MK, y_MN, records, scales2, outliers)
    return y_MN.view(*x.shape[:-1], out_features)


def launch(
    kernel: Callable[..., Any],
    variant: Variant,
    blocks: tuple[int, int, int],
    x_MK: torch.Tensor,
    y_MN: torch.Tensor,
    records: torch.Tensor,
    scales2: torch.Tensor,
    outliers: Sequence[torch.Tensor],
) -> None:
    """One launch on the current stream, after one that sets counters to zero where there are splits."""
    rows, splits, batches = blocks
    none = x_MK.new_empty(0)
    partial = arrived = none
    if splits > 1:
        partial = x_MK.new_empty(rows * splits * batches * ROWS * variant.tokens, dtype=torch.float32)
        arrived = x_MK.new_zeros(rows * batches, dtype=torch.int32)
    tensors = records, scales2, x_MK, y_MN, *(outliers or (none, none, none)), partial, arrived
    sizes = len(x_MK), y_MN.shape[1], x_MK.shape[1]
    with torch.cuda.device_of(x_MK):  # type: ignore[no-untyped-call]
        kernel(grid=blocks, block=(32 * variant.warps, 1, 1), args=[*tensors, *sizes], shared_mem=variant.shared_bytes)


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@contextmanager
def _some_toolkit() -> Iterator[None]:
    """torch's compiler passes NVRTC the toolkit's headers and refuses to go on where none is installed, as is usual
    beside a torch from pip; decode.cu includes nothing.
    """
    from torch.utils import cpp_extension  # here, as it takes a third of a second

    with _COMPILING:
        found = cpp_extension.CUDA_HOME
        cpp_extension.CUDA_HOME = found or str(SOURCE.parent)
        try:
            yield
        finally:
            cpp_extension.CUDA_HOME = found


@cache
def _compiled(variant: Variant, device: torch.device) -> Any:
    with torch.cuda.device(device), _some_toolkit():
        kernel = torch.cuda._compile_kernel(SOURCE.read_text(), "mix64_decode", nvcc_options=variant.options())
        kernel.set_shared_memory_config(variant.shared_bytes)
    return kernel
