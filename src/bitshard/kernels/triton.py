"""Triton kernels for a GPU: packed weights times a few tokens, and packed weights to a matrix for many.

One kernel reads both layouts. A program owns BN output channels and BM tokens and walks along K: `_weights` unpacks a
tile [BN, BK], code minus zero exactly, times the scale, rounded once to x's dtype; tensor cores multiply it by
x^T [BK, BM] and add in float32. Weights are the first operand, so that a warp group's 64 rows are output channels and
one token wastes 15 columns of 16, not 63 rows of 64. Where there are too few tiles to fill the card, programs share K
and `_sum` adds their float32 parts in order: the same bits every time.

Above CROSSING tokens unpacking once beats unpacking in every program, so `_dequantize` writes the matrix [N, K] and
torch multiplies.

Shape legend: M tokens, K input, N output channels, G groups. Tiles are BM x BN x BK; BN divides the 64 output channels
that share second-order scales in `mix64`, BK is half a GPU record (records.mix64_lanes) or a whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

MOST_DECODE_TOKENS = 16
CROSSING = 128  # not measured yet
PROGRAMS = 4  # that a multiprocessor runs side by side; not measured yet
LEAST_STEPS = 4  # along K that are worth a program of their own; not measured yet

# the interpreter's tl.dot multiplies bfloat16's bits, and its casts to bfloat16 cut bits off
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TWO_TO_23 = tl.constexpr(0x4B000000)  # as float32; with a code in its lowest bits it is 2^23 + code, no conversion


@dataclass(frozen=True)
class Tile:
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


TILES = {  # by bytes of x's dtype and whether there are at most MOST_DECODE_TOKENS
    (2, True): Tile(BM=16, BN=64, BK=128, warps=4, stages=4),
    (2, False): Tile(BM=64, BN=64, BK=128, warps=8, stages=2),
    (4, True): Tile(BM=16, BN=64, BK=64, warps=4, stages=3),
    (4, False): Tile(BM=32, BN=64, BK=64, warps=8, stages=2),
}


@triton.jit
def _round(values, dtype: tl.constexpr):
    """float32 to the nearest of dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = (bits + 0x7FFF + (bits >> 16 & 1) & -0x10000).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _channels(n0, BN: tl.constexpr, WIDE: tl.constexpr):
    """Output channels of a tile's rows; of `mix64` rows 2 g and 2 g + 1 are g and g + 8, which share their words."""
    j = tl.arange(0, BN)
    return n0 + (j if WIDE is None else j // 16 * 16 + j % 2 * 8 + j % 16 // 2)


@triton.jit
def _mix64_weights(records, scales2, n0, k0, N, K, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile float32 [BN, BK] of records int32 [N / 16, K / 128, words]; scales2 int32 [N / 64, K / 16].

    A word is read once for both of its rows, and of 2-bit strips once for each of the two strips in it.
    """
    WORDS: tl.constexpr = 152 + 32 * WIDE
    STRIPS: tl.constexpr = BK // 16
    BLOCKS: tl.constexpr = BK // 64
    count = tl.cdiv(K, 128)
    record = k0 // 128
    block0 = k0 // 64 % 2 if BLOCKS == 1 else 0

    # words [BN / 2, BK / 4]: a lane of eight for every two rows, four lanes for every strip
    pair, c = tl.arange(0, BN // 2), tl.arange(0, BK // 4)
    last = tl.cdiv(N, 16) - 1  # rows that do not exist, which nobody stores, are some of the last tile: no masks
    row_tile = tl.minimum(n0 // 16 + pair // 8, last)
    start = (row_tile * count + record) * WORDS + pair % 8 * 4
    block, place = block0 + c // 16, c // 4 % 4
    line = tl.where(place < WIDE, block * WIDE + place, 2 * WIDE + (block * (4 - WIDE) + place - WIDE) // 2)
    words = tl.load(records + start[:, None] + (line * 32 + c % 4)[None, :])
    # reshape keeps the load's layout, whole words in a thread; with [:, None] it took 18 instructions a weight, not 8
    words = tl.broadcast_to(words.reshape([BN // 2, 1, BK // 4, 1]), [BN // 2, 2, BK // 4, 4]).reshape([BN, BK])

    # codes [BN, BK]
    j, k = tl.arange(0, BN), tl.arange(0, BK)
    block, place = block0 + k // 64, k // 16 % 4
    wide = place < WIDE
    second = tl.where(wide, 0, (block * (4 - WIDE) + place - WIDE) % 2)  # of the strips in a word
    bits = tl.where(wide, 4, 2)
    shift = (bits * (k % 4 // 2 * 2) + k % 2 * 16 + second * 8)[None, :] + bits[None, :] * (j % 2)[:, None]
    codes = words >> shift & tl.where(wide, 15, 3)[None, :] | TWO_TO_23

    # scales and zeros [BN, STRIPS], from words that hold those of two lanes and of four
    n = _channels(n0, BN, WIDE)
    start = (tl.minimum(n // 16, last) * count + record) * WORDS + WORDS - 24
    b, row = tl.arange(0, BLOCKS) + block0, n % 16
    scale_words = tl.load(records + (start + row % 8 * 2)[:, None] + b[None, :])
    zero_words = tl.load(records + (start + row % 8 + 16)[:, None] + tl.zeros_like(b)[None, :])
    place = tl.arange(0, 4)[None, None, :]
    which = (row // 8 * 2)[:, None, None] + place % 2  # of a lane's four codes
    scale_codes = scale_words[:, :, None] >> place // 2 * 16 + 4 * which & 15
    zero_codes = zero_words[:, :, None] >> (b[None, :, None] * 2 + place // 2) * 8 + 2 * which & 3
    zeros = zero_codes + tl.where(place < WIDE, 6, 0) | TWO_TO_23  # spec.zero_base
    pair2 = tl.load(scales2 + n0 // 64 * (count * 8) + k0 // 16 + tl.arange(0, STRIPS))
    step = (pair2 & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    offset = (pair2 >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scales = step[None, :] * scale_codes.reshape([BN, STRIPS]).to(tl.float32) + offset[None, :]
    scales = scales.to(tl.float16).to(tl.float32)

    codes = codes.to(tl.float32, bitcast=True).reshape([BN, STRIPS, 16])
    zeros = zeros.to(tl.float32, bitcast=True).reshape([BN, STRIPS])
    return ((codes - zeros[:, :, None]) * scales[:, :, None]).reshape([BN, BK])


@triton.jit
def _gptq_weights(
    qweight, scales, zeros, g_idx, n0, k0, N, K, group,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile float32 [BN, BK] of qweight [K * BITS / 32, N], scales and zeros [G, N].

    ALIGNED: channels, a power of two, in every whole run of which all have one group; 1 with a g_idx.
    """
    PER: tl.constexpr = 16 if BITS == 3 else 32 // BITS
    STEP: tl.constexpr = ALIGNED if ALIGNED < BK else BK
    n = n0 + tl.arange(0, BN)

    # words [BK / PER, BN], codes [BK / PER, PER, BN]
    i = k0 // PER + tl.arange(0, BK // PER)
    live = (i * PER < K)[:, None] & (n < N)[None, :]
    if BITS == 3:  # 16 codes are 48 bits, from the start of three words or from the middle of the second
        at = qweight + (i // 2 * 3 + i % 2)[:, None] * N + n[None, :]
        low, high = tl.load(at, mask=live, other=0), tl.load(at + N, mask=live, other=0)
        words = (high.to(tl.int64) << 32 | low.to(tl.int64) & 0xFFFFFFFF) >> (i % 2 * 16)[:, None]
    else:
        words = tl.load(qweight + i[:, None] * N + n[None, :], mask=live, other=0)
    codes = words.reshape([BK // PER, 1, BN]) >> (tl.arange(0, PER) * BITS)[None, :, None] & ((1 << BITS) - 1)

    # scales and zeros [BK / STEP, BN]
    k = k0 + tl.arange(0, BK // STEP) * STEP
    g = k // group if g_idx is None else tl.load(g_idx + k, mask=k < K, other=0)
    live = (k < K)[:, None] & (n < N)[None, :]
    scale = tl.load(scales + g[:, None] * N + n[None, :], mask=live, other=0).to(tl.float32)
    zero = tl.load(zeros + g[:, None] * N + n[None, :], mask=live, other=0).to(tl.int32) | TWO_TO_23

    codes = (codes.to(tl.int32) | TWO_TO_23).to(tl.float32, bitcast=True).reshape([BK // STEP, STEP, BN])
    zero = zero.to(tl.float32, bitcast=True)
    return ((codes - zero[:, None, :]) * scale[:, None, :]).reshape([BK, BN]).trans()


@triton.jit
def _weights(
    qweight, scales, zeros, g_idx, n0, k0, N, K, group,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    if WIDE is None:
        return _gptq_weights(qweight, scales, zeros, g_idx, n0, k0, N, K, group, BITS, ALIGNED, BN, BK)
    else:
        return _mix64_weights(qweight, scales, n0, k0, N, K, WIDE, BN, BK)


@triton.jit
def _linear(
    x, y, outlier_rows, outlier_columns, outlier_values, M, split_K,
    qweight, scales, zeros, g_idx, N, K, group,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [M, K] times the weights: y [splits, M, N], each split the sum over split_K channels and its share of outliers.

    Outliers of all of a tile's rows go side by side, one of each row at a time.
    """
    n0, split = tl.program_id(0) * BN, tl.program_id(2)
    n, m = _channels(n0, BN, WIDE), tl.program_id(1) * BM + tl.arange(0, BM)
    first = split * split_K
    sums = tl.zeros([BN, BM], tl.float32)
    for k0 in tl.range(first, tl.minimum(first + split_K, K), BK, num_stages=STAGES):
        w = _weights(qweight, scales, zeros, g_idx, n0, k0, N, K, group, BITS, ALIGNED, WIDE, BN, BK)
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x + m[None, :] * K + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0)
        w = _round(w, xs.dtype)
        if INTERPRETED:
            w, xs = w.to(tl.float32), xs.to(tl.float32)
        sums = tl.dot(w, xs, sums, input_precision="ieee")
    if outlier_rows is not None:
        start = tl.load(outlier_rows + n, mask=n < N, other=0)
        count = tl.load(outlier_rows + n + 1, mask=n < N, other=0) - start
        splits = tl.num_programs(2)
        at, end = start + count * split // splits, start + count * (split + 1) // splits
        extra = tl.zeros([BN, BM], tl.float32)
        for i in tl.range(0, tl.max(end - at, 0), loop_unroll_factor=64 // BM):
            live = at + i < end
            column = tl.load(outlier_columns + at + i, mask=live, other=0).to(tl.int32)
            value = tl.load(outlier_values + at + i, mask=live, other=0).to(tl.float32)
            xs = tl.load(x + m[None, :] * K + column[:, None], mask=live[:, None] & (m < M)[None, :], other=0)
            extra += value[:, None] * xs.to(tl.float32)
        sums += extra
    at = y + (split * M + m)[None, :] * N + n[:, None]
    tl.store(at, _round(sums, y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _sum(parts, y, size, splits, BLOCK: tl.constexpr):
    """parts float32 [splits, size], added in order to y [size]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts + split * size + i, mask=i < size, other=0)
    tl.store(y + i, _round(total, y.dtype.element_ty), mask=i < size)


@triton.jit
def _dequantize(
    matrix, qweight, scales, zeros, g_idx, N, K, group,
    BITS: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The weights without outliers, [N, K]."""
    n0, k0 = tl.program_id(0) * BN, tl.program_id(1) * BK
    n, k = _channels(n0, BN, WIDE), k0 + tl.arange(0, BK)
    w = _weights(qweight, scales, zeros, g_idx, n0, k0, N, K, group, BITS, ALIGNED, WIDE, BN, BK)
    at = matrix + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, _round(w, matrix.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@dataclass(frozen=True)
class Weights:
    """What the kernels need of a packed matrix: `tensors` as they take them, `constants` compiled in."""

    n: int
    k: int
    tensors: tuple[Any, ...]  # qweight, scales, zeros, g_idx, N, K, group
    constants: dict[str, Any]
    outliers: Sequence[torch.Tensor] = ()

    @classmethod
    def gptq(
        cls, qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, bits: int
    ) -> Weights:
        (groups, n), k = scales.shape, qweight.shape[0] * 32 // bits
        group, tensors = k // groups, tuple(tensor.contiguous() for tensor in (qweight, scales, zeros))
        aligned = 1 if g_idx is not None else 128 if groups == 1 else gcd(group, 128)
        constants = {"BITS": bits, "ALIGNED": aligned, "WIDE": None}
        return cls(n, k, (*tensors, g_idx, n, k, group), constants)

    @classmethod
    def mix64(
        cls, qweight: torch.Tensor, scales2: torch.Tensor, outliers: Sequence[torch.Tensor], n: int, k: int, wide: int
    ) -> Weights:
        assert k % 64 == 0 and qweight.shape[1] == triton.cdiv(k, 128), f"{k} channels for {qweight.shape[1]} records"
        constants = {"BITS": None, "ALIGNED": None, "WIDE": wide}
        return cls(n, k, (qweight, scales2.view(torch.int32), None, None, n, k, 16), constants, outliers)


def gptq_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """GPTQ tensors as the file has them but zeros, uint8 [G, N]: the true ones, unpacked when the model is loaded."""
    return _multiply(x, Weights.gptq(qweight, scales, zeros, g_idx, bits))


def mix64_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales2: torch.Tensor,
    outliers: Sequence[torch.Tensor],
    out_features: int,
    wide: int,
) -> torch.Tensor:
    """qweight and scales2 from `records.mix64_lanes`; wide: 4-bit strips of a block's four."""
    return _multiply(x, Weights.mix64(qweight, scales2, outliers, out_features, x.shape[-1], wide))


def dequantize(weights: Weights, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K], outliers included."""
    tile = TILES[dtype.itemsize, True]
    matrix: torch.Tensor = weights.tensors[0].new_empty(weights.n, weights.k, dtype=dtype)
    grid = triton.cdiv(weights.n, tile.BN), triton.cdiv(weights.k, tile.BK)
    with torch.cuda.device_of(matrix):
        _dequantize[grid](matrix, *weights.tensors, **weights.constants, BN=tile.BN, BK=tile.BK, num_warps=tile.warps)
    if weights.outliers:
        starts, columns, values = weights.outliers
        rows = torch.arange(weights.n, device=starts.device)
        rows = rows.repeat_interleave(starts.diff(), output_size=len(values))
        matrix[rows, columns.long()] = values.to(dtype)  # their places are zeros
    return matrix


def splits(programs: int, steps: int, processors: int) -> int:
    """Programs that share a tile's steps along K: enough to fill the card, none with less than a few steps."""
    return min(max(PROGRAMS * processors // programs, 1), max(steps // LEAST_STEPS, 1))


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _multiply(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """x [..., K] -> [..., N]."""
    n, k = weights.n, weights.k
    assert x.shape[-1] == k, f"{x.shape[-1]} channels for {k}"
    x_MK = x.reshape(-1, k).contiguous()
    m = len(x_MK)
    if m > CROSSING:
        return x @ dequantize(weights, x.dtype).T
    y_MN = x.new_empty(m, n)
    if m == 0:
        return y_MN.view(*x.shape[:-1], n)
    tile = TILES[x.dtype.itemsize, m <= MOST_DECODE_TOKENS]
    steps, programs = triton.cdiv(k, tile.BK), triton.cdiv(n, tile.BN) * triton.cdiv(m, tile.BM)
    steps_each = triton.cdiv(steps, splits(programs, steps, processors(x.device)))
    count = triton.cdiv(steps, steps_each)
    parts = y_MN if count == 1 else y_MN.new_empty(count, m, n, dtype=torch.float32)
    grid = triton.cdiv(n, tile.BN), triton.cdiv(m, tile.BM), count
    with torch.cuda.device_of(x_MK):
        _linear[grid](
            x_MK, parts, *(weights.outliers or (None, None, None)), m, steps_each * tile.BK,
            *weights.tensors, **weights.constants,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        if count > 1:
            _sum[(triton.cdiv(m * n, 1024),)](parts, y_MN, m * n, count, BLOCK=1024)
    return y_MN.view(*x.shape[:-1], n)
