"""What a quantized weight is asked to be: frozen, checked once, when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from bitshard.errors import SpecError

GPTQ_BITS = (2, 3, 4, 8)
WORD_BITS = 32  # GPTQ packs codes into int32 words


def codes_per_pack(bits: int) -> int:
    """Smallest number of codes that fills whole 32-bit words: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    return WORD_BITS // gcd(bits, WORD_BITS)


@dataclass(frozen=True)
class QuantSpec:
    """How one weight is quantized, in GPTQ's own terms.

    bits: width of a code. group_size: input channels that share one scale and zero, -1 for all of them.
    sym: the zero is the middle code. desc_act: channels are grouped in order of falling sensitivity, so `g_idx`
    is irregular. static_groups: groups are fixed in natural order before channels are visited, so `g_idx` is not.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        # a spec may come from a file: 4.0, "128" and "false" must not pass for what they look like
        if type(self.bits) is not int or self.bits not in GPTQ_BITS:
            raise SpecError("bits", repr(self.bits), "2, 3, 4 or 8", "choose one of these widths")
        if type(self.group_size) is not int or (self.group_size != -1 and self.group_size < 1):
            raise SpecError(
                "group_size", repr(self.group_size), "a positive number, or -1 for one group", "for example 64 or 128"
            )
        for name in ("sym", "desc_act", "static_groups"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(name, repr(getattr(self, name)), "true or false", "choose one of them")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def irregular(self) -> bool:
        """True when quantizing with this spec leaves an irregular `g_idx` (2402.04925, act-order grouping)."""
        return self.desc_act and not self.static_groups and self.group_size != -1

    def group(self, in_features: int) -> int:
        """Group length in channels for a weight of `in_features` input channels."""
        return in_features if self.group_size == -1 else self.group_size
