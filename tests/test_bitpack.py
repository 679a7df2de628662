"""Codes and words: exact round trips, and GPTQ's own bit order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitshard.bitpack import pack, packed_length, unpack
from bitshard.errors import FormatError
from bitshard.spec import GPTQ_BITS, codes_per_pack


@given(bits=st.sampled_from(GPTQ_BITS), packs=st.integers(1, 5), other=st.integers(1, 7), dim=st.sampled_from((0, 1)),
       seed=st.integers(0, 2**31))  # fmt: skip
def test_round_trip(bits: int, packs: int, other: int, dim: int, seed: int) -> None:
    length = packs * codes_per_pack(bits)
    shape = (length, other) if dim == 0 else (other, length)
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack(codes, bits, dim)
    assert words.dtype == torch.int32 and words.shape[dim] == packed_length(length, bits)
    assert torch.equal(unpack(words, bits, dim), codes)


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_bit_order_is_a_little_endian_stream(bits: int) -> None:
    length = codes_per_pack(bits)
    codes = [(3 * i + 1) % (1 << bits) for i in range(length)]
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = pack(torch.tensor(codes, dtype=torch.uint8)[:, None], bits, 0)[:, 0]
    assert [w & 0xFFFFFFFF for w in words.tolist()] == [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(words))]


def test_autogptq_three_bit_words() -> None:
    """AutoGPTQ's spelled-out rule: 10 codes, then two bits of the 11th; its third bit opens the next word."""
    codes = torch.arange(32, dtype=torch.uint8) % 8
    words = [w & 0xFFFFFFFF for w in pack(codes[:, None], 3, 0)[:, 0].tolist()]
    c = codes.tolist()
    first = sum(c[i] << (3 * i) for i in range(10)) | (c[10] << 30) & 0xFFFFFFFF
    second = (c[10] >> 2) & 1 | sum(c[11 + i] << (3 * i + 1) for i in range(10)) | (c[21] << 31) & 0xFFFFFFFF
    third = (c[21] >> 1) & 3 | sum(c[22 + i] << (3 * i + 2) for i in range(10))
    assert words == [first, second, third]


@pytest.mark.parametrize(("bits", "length"), [(2, 15), (3, 31), (4, 9), (8, 2)])
def test_a_length_that_leaves_a_word_half_full_is_refused(bits: int, length: int) -> None:
    with pytest.raises(FormatError, match=f"{length} codes of {bits} bits"):
        pack(torch.zeros(length, 1, dtype=torch.uint8), bits, 0)
