"""n-bit codes <-> 32-bit words: the only place that knows bit order.

GPTQ's order is a little-endian bit stream: code i of a pack occupies bits [i*bits, (i+1)*bits) of the pack's words,
lowest word first. For 2, 4 and 8 bits a pack is one word; for 3 bits it is 32 codes in 3 words and two codes straddle.
"""

from __future__ import annotations

from math import gcd

import torch

from bitshard.errors import FormatError
from bitshard.spec import WORD_BITS, codes_per_pack


def words_per_pack(bits: int) -> int:
    return bits // gcd(bits, WORD_BITS)


def packed_length(length: int, bits: int) -> int:
    """Number of words that hold `length` codes; `length` must fill whole packs."""
    return length // codes_per_pack(bits) * words_per_pack(bits)


def pack(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes (any integer dtype, values in [0, 2**bits)) to int32 words along `dim`.

    Raises FormatError when the length of `dim` does not fill whole words.
    """
    codes = codes.movedim(dim, 0)
    per_pack, length = codes_per_pack(bits), codes.shape[0]
    if length % per_pack:
        raise FormatError(
            "pack", f"{length} codes of {bits} bits", f"a multiple of {per_pack}", "pad the matrix or choose other bits"
        )
    fields = codes.reshape(length // per_pack, per_pack, *codes.shape[1:])
    words = torch.zeros(
        length // per_pack, words_per_pack(bits), *codes.shape[1:], dtype=torch.int32, device=codes.device
    )
    for i in range(per_pack):
        word, offset = divmod(i * bits, WORD_BITS)
        field = fields[:, i].to(torch.int32)
        words[:, word] |= field << offset
        if offset + bits > WORD_BITS:
            words[:, word + 1] |= field >> (WORD_BITS - offset)
    return words.reshape(-1, *codes.shape[1:]).movedim(0, dim).contiguous()


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words along `dim` to uint8 codes; the exact inverse of `pack`."""
    words = words.movedim(dim, 0)
    per_pack, word_count = codes_per_pack(bits), words_per_pack(bits)
    if words.shape[0] % word_count:
        raise FormatError(
            "unpack", f"{words.shape[0]} words of {bits}-bit codes", f"a multiple of {word_count}", "check `bits`"
        )
    packs = words.reshape(words.shape[0] // word_count, word_count, *words.shape[1:])
    codes = torch.empty(packs.shape[0], per_pack, *words.shape[1:], dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for i in range(per_pack):
        word, offset = divmod(i * bits, WORD_BITS)
        field = packs[:, word] >> offset
        if offset + bits > WORD_BITS:
            low = WORD_BITS - offset  # bits of this code in the first word; >> is arithmetic, so mask them
            field = field & ((1 << low) - 1) | packs[:, word + 1] << low
        codes[:, i] = (field & mask).to(torch.uint8)
    return codes.reshape(-1, *words.shape[1:]).movedim(0, dim)
