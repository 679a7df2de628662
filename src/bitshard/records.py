"""Packed weights as the kernels read them: rearranged once, when a model has been loaded. Files never hold these.

On a processor words of 16 output channels lie side by side (`gptq_rows`, `mix64_rows`); on a GPU the codes that a lane
of a warp multiplies lie in one word (`mix64_lanes`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitshard.layout import GptqLayout, Mix64Layout, pack_strips, unpack_strips
from bitshard.spec import BLOCK, STRIP, WORD_BITS, MixSpec, QuantSpec

ROWS = 16  # output channels that are read together: one vector of AVX-512, one tile of a tensor core
PARTS = ("qweight", "qextra", "qscales", "qzeros")  # of a processor's record, in this order


def gptq_rows(
    layout: GptqLayout, tensors: Mapping[str, torch.Tensor], spec: QuantSpec
) -> dict[str, torch.Tensor] | None:
    """Tensors as the C kernels read them: [C, N] as [N / 16, C, 16], scales float32, zeros uint8, as they may come.

    None for what these kernels do not read: irregular groups, groups that are not whole strips of 16 channels (of
    32 for 3 bits).
    """
    groups, k = tensors["scales"].shape[0], tensors["qweight"].shape[0] * WORD_BITS // spec.bits
    if "g_idx" in tensors or _why_not_groups(spec, k // groups):
        return None
    zeros_GN = tensors["qzeros"]
    if zeros_GN.dtype != torch.uint8:
        zeros_GN = layout.unpack_zeros(zeros_GN, spec.bits)
    by_row = {"qweight": tensors["qweight"], "scales": tensors["scales"].float(), "qzeros": zeros_GN}
    return {suffix: group_rows(tensor.T) for suffix, tensor in by_row.items()}


def mix64_rows(tensors: Mapping[str, torch.Tensor], spec: MixSpec) -> dict[str, torch.Tensor | None] | None:
    """Tensors as the C kernels read them, and None in place of those that are in `qweight` then.

    qweight int32 [N / 16, blocks, 64 + 16 * 4-bit strips + 12]: what 16 output channels have of a block, in one
    stream: their words of each strip, their second words of 4-bit strips, scale codes, zero codes. Missing rows are
    zeros. scales2 is float32.

    None for what these kernels do not read: 3-bit or 8-bit strips, metadata "paper".
    """
    if _why_not_strips(spec):
        return None
    blocks = tensors["qscales"].shape[1]
    parts = [group_rows(tensors[suffix]).flatten(1).view(torch.int32) for suffix in PARTS if suffix in tensors]
    records = torch.cat([part.view(len(part), blocks, -1) for part in parts], dim=2)
    return {**dict.fromkeys(PARTS), "qweight": records, "scales2": tensors["scales2"].float()}


def mix64_from_rows(tensors: Mapping[str, torch.Tensor], spec: MixSpec, rows: int) -> dict[str, torch.Tensor]:
    """The inverse of `mix64_rows`; scales2 stays float32."""
    records, wide = tensors["qweight"], spec.widths.count(4)
    sizes = [4 * ROWS, wide * ROWS, ROWS // 2, ROWS // 4]
    found = {}
    for suffix, part in zip(PARTS, torch.split(records, sizes, dim=2), strict=True):
        if part.shape[2]:
            own = part.contiguous().view(Mix64Layout.dtypes[suffix])
            found[suffix] = ungroup_rows(own.view(len(own), -1, ROWS), rows)
    return {**tensors, **found}


def why_not_read(spec: QuantSpec | MixSpec, in_features: int, device: str) -> str:
    """What keeps all kernels of a device but the reference from reading a whole matrix of this kind, or ""."""
    if isinstance(spec, MixSpec):
        return _why_not_strips(spec)
    return "" if device == "cuda" else _why_not_groups(spec, spec.group(in_features))


def _why_not_groups(spec: QuantSpec, group: int) -> str:
    strip = 2 * STRIP if spec.bits == 3 else STRIP
    return f"groups of {group} channels, where kernels read multiples of {strip}" if group % strip else ""


def _why_not_strips(spec: MixSpec) -> str:
    if others := set(spec.widths) - {2, 4}:
        return f"strips of {max(others)} bits, where kernels read 2 and 4"
    return "" if spec.metadata == "fine" else f"{spec.metadata!r} metadata, where kernels read 'fine'"


def group_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[N, C] as [N / 16, C, 16]; missing rows are zeros."""
    n, columns = tensor.shape
    filled = torch.cat([tensor, tensor.new_zeros(-n % ROWS, columns)])
    return filled.view(-1, ROWS, columns).transpose(1, 2).contiguous()


def ungroup_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `group_rows`."""
    return tensor.transpose(1, 2).flatten(0, 1)[:rows].contiguous()


METADATA_BITS = {"qscales": 4, "qzeros": 2}  # of a strip's code

# A record of a GPU: what 16 output channels have of two blocks, eight strips. In words of 32 bits:
#
#   4-bit strips, in order            32 words each, one for each lane
#   2-bit strips, in order, in pairs  32 words each pair
#   scale codes                       int16 for each lane
#   zero codes                        uint8 for each lane
#
# Lane 4 g + t has rows g and g + 8 and channels 4 t to 4 t + 3 of a strip: what it multiplies as the operand A of
# mma.m16n8k16, so that its four fragments are pairs of channels (0, 1) of row g, of row g + 8, (2, 3) of g, of g + 8.
# A pair's codes stand 16 bits apart, fragment i of a 4-bit strip at bits 4 i and 16 + 4 i, of a 2-bit strip at 2 i and
# 16 + 2 i, and of the second strip of a word 8 bits higher. Its scale and zero codes are, from the lowest bits up,
# those of strips 2 t and 2 t + 1 of row g, then of row g + 8: what it scales when a column of the product is a strip.


def mix64_lanes(tensors: Mapping[str, torch.Tensor], spec: MixSpec) -> dict[str, torch.Tensor | None] | None:
    """Tensors as the GPU kernels read them, and None in place of those that are in `qweight` then.

    qweight int32 [N / 16, ceil(blocks / 2), words], records as above. scales2 float16 [T, 8 * ceil(blocks / 2), 2].
    Rows and blocks that are missing are zeros.

    None for what these kernels do not read: 3-bit or 8-bit strips, metadata "paper", and scales of the second order
    that float32 would not sum well enough for float16 to come out as from an exact sum, which is the kernels'.
    """
    if _why_not_strips(spec) or not _rounds_once(tensors["scales2"]):
        return None
    codes_NK = unpack_strips(tensors["qweight"], tensors.get("qextra"), spec)
    n, odd = len(codes_NK), tensors["qscales"].shape[1] % 2
    row_tiles = -(-n // ROWS)
    codes = _fill(codes_NK, -n % ROWS, odd * BLOCK).view(row_tiles, 2, 8, -1, 8, 4, 2, 2)  # tile half g record strip t
    codes = codes.permute(0, 3, 4, 2, 5, 7, 6, 1).to(torch.int32)  # tile record strip g t, one of a pair, pair half
    codes = codes.reshape(row_tiles, codes.shape[1], 8, 32, 2, 4)
    wide, shifts4, shifts2 = _wide_strips(spec), _shifts(4), _shifts(2)
    words4 = (codes[:, :, wide] << shifts4.to(codes.device)).sum((4, 5), dtype=torch.int32)
    pairs = codes[:, :, ~wide].reshape(*codes.shape[:2], -1, 2, 32, 2, 4).transpose(3, 4)
    words2 = (pairs << shifts2.to(codes.device)).sum((4, 5, 6), dtype=torch.int32)
    metadata = []
    for suffix, bits in METADATA_BITS.items():
        of_strips = _fill(_four(tensors[suffix], bits).flatten(1), -n % ROWS, odd * 4)
        of_strips = of_strips.view(row_tiles, 2, 8, -1, 4, 2)  # tile half g, record t, of a pair
        of_lanes = of_strips.permute(0, 3, 2, 4, 1, 5)
        metadata.append(_of_four(of_lanes.reshape(row_tiles, -1, 32, 4), bits).to(Mix64Layout.dtypes[suffix]))
    parts = [words4.flatten(2), words2.flatten(2), *(part.view(torch.int32) for part in metadata)]
    scales2 = _fill(tensors["scales2"].flatten(1), 0, odd * 8).view(len(tensors["scales2"]), -1, 2)
    return {**dict.fromkeys(PARTS), "qweight": torch.cat(parts, dim=2), "scales2": scales2.contiguous()}


def mix64_from_lanes(
    tensors: Mapping[str, torch.Tensor], spec: MixSpec, rows: int, blocks: int
) -> dict[str, torch.Tensor]:
    """The inverse of `mix64_lanes`."""
    records, wide = tensors["qweight"], _wide_strips(spec)
    row_tiles, count, _ = records.shape
    sizes = [32 * int(wide.sum()), 16 * int((~wide).sum()), ROWS, ROWS // 2]
    words4, words2, *metadata = torch.split(records, sizes, dim=2)
    codes = records.new_empty(row_tiles, count, 8, 32, 2, 4, dtype=torch.uint8)
    codes[:, :, wide] = (words4.view(row_tiles, count, -1, 32, 1, 1) >> _shifts(4).to(records.device) & 15).byte()
    pairs = words2.view(row_tiles, count, -1, 32, 1, 1, 1) >> _shifts(2).to(records.device) & 3
    codes[:, :, ~wide] = pairs.transpose(3, 4).flatten(2, 3).byte()
    codes = codes.view(row_tiles, count, 8, 8, 4, 2, 2, 2).permute(0, 7, 3, 1, 2, 4, 6, 5)
    found = pack_strips(codes.reshape(row_tiles * ROWS, -1)[:rows, : blocks * BLOCK], spec)
    for (suffix, bits), part in zip(METADATA_BITS.items(), metadata, strict=True):
        packed = part.contiguous().view(Mix64Layout.dtypes[suffix])
        of_lanes = _four(packed, bits).view(row_tiles, count, 8, 4, 2, 2).permute(0, 4, 2, 1, 3, 5)
        found[suffix] = _of_four(of_lanes.reshape(-1, 2 * count, 4)[:rows, :blocks], bits).to(packed.dtype)
    return {**tensors, **found, "scales2": tensors["scales2"][:, : 4 * blocks].contiguous()}


def _rounds_once(scales2: torch.Tensor) -> bool:
    """Whether step * code + offset, rounded to float32 and then to float16, is the exact sum rounded to float16.

    It is not where float32 rounds the exact sum to a number halfway between two float16: where 3 of some step make such
    a half and the offset is 10,000 times less.
    """
    steps, offsets = scales2.double().unbind(-1)
    exact = steps[..., None] * torch.arange(16, device=scales2.device) + offsets[..., None]
    twice = exact.float()
    # the float32 towards zero, its last bit set when anything was cut off: float16's half is then where the sum is
    towards_zero = twice.view(torch.int32) - (twice.double().abs() > exact.abs()).int()
    once = (towards_zero | (twice.double() != exact).int()).view(torch.float32)
    return torch.equal(once.half(), twice.half())


def _four(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes in integers that hold four each, int32 [..., 4]."""
    return packed.int()[..., None] >> torch.arange(0, 4 * bits, bits, device=packed.device) & (1 << bits) - 1


def _of_four(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes << torch.arange(0, 4 * bits, bits, device=codes.device)).sum(-1)


def _wide_strips(spec: MixSpec) -> torch.Tensor:
    """Which of a record's eight strips have 4 bits, bool [8]."""
    return torch.tensor([width == 4 for width in spec.widths] * 2)


def _shifts(bits: int) -> torch.Tensor:
    """Where a lane's codes stand in a word: [2 of a pair, 4 fragments], for 2 bits [2 strips, 2, 4]."""
    one = torch.arange(2)[:, None] * 16 + torch.arange(4) * bits
    return one if bits == 4 else torch.arange(2)[:, None, None] * 8 + one


def _fill(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, columns, 0, rows))
