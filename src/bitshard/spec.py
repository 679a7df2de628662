"""What a quantized weight is asked to be: frozen, checked once, when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil, gcd, lcm
from typing import Any

from bitshard.errors import SpecError

GPTQ_BITS = (2, 3, 4, 8)
FRACTIONS = (0.0, 0.25, 0.5, 1.0)
METADATA = ("fine", "paper")
MOST_OUTLIERS = 0.05  # above that a weight of 16 bits and its column cost more than 3 bits everywhere
STRIP = 16  # input channels that share one scale and zero in `mix64` (g1 of 2311.16442)
BLOCK = 64  # input channels of one aligned 128-bit load: four strips
MAX_SEED = 2**32 - 1
WORD_BITS = 32  # GPTQ packs codes into int32 words


def codes_per_pack(bits: int) -> int:
    """Smallest number of codes that fills whole 32-bit words: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    return WORD_BITS // gcd(bits, WORD_BITS)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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

    def row_cut(self, in_features: int, irregular: bool) -> tuple[int, str]:
        """Input channels that a tensor-parallel cut keeps together, and what they are. irregular: by its `g_idx`."""
        word = codes_per_pack(self.bits)
        if irregular or self.group(in_features) >= in_features:
            return word, f"a packed word of {word} codes"
        return lcm(self.group_size, word), f"a group of {self.group_size} input channels"

    def column_cut(self, out_features: int) -> tuple[int, str]:
        """The same for output channels."""
        word = codes_per_pack(self.bits)
        return word, f"a packed word of {word} zeros"

    def facts(self) -> dict[str, str]:
        """What a table says of a matrix."""
        return {"bits": str(self.bits), "group": str(self.group_size)}

    def padding_unit(self, role: str) -> int:
        """What zero-padding fills up: input channels of a "row" matrix, output channels of a "column" one."""
        grouped = role == "row" and self.group_size != -1
        return lcm(codes_per_pack(self.bits), self.group_size if grouped else 1)

    def code_bytes(self, in_features: int, out_features: int) -> int:
        return in_features * out_features * self.bits // 8

    def scale_bytes(self, in_features: int, out_features: int) -> int:
        """Bytes of scales (16-bit) and zeros."""
        return ceil(in_features / self.group(in_features)) * out_features * (16 + self.bits) // 8


@dataclass(frozen=True)
class MixSpec:
    """How one weight is stored in `mix64`: strips of 16 input channels, four to a block of 64, every block alike.

    bits: width of the plain strips, 2, 3, 4 or 8. fraction_4bit: share of 4-bit strips in each block, 0, 1/4, 1/2 or 1;
    they come first. metadata: "fine" (a 4-bit scale code and a 2-bit zero code for every strip of every row) or "paper"
    (2311.16442: 3, 3 and 4-bit scale codes of the 2-bit strips; a 16-bit scale and 4-bit zero per row for 4-bit ones).
    """

    bits: int = 2
    fraction_4bit: float = 0.25
    metadata: str = "fine"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in GPTQ_BITS:
            raise SpecError("bits", repr(self.bits), "2, 3, 4 or 8", "choose one of these widths")
        if not _is_number(self.fraction_4bit) or self.fraction_4bit not in FRACTIONS:
            raise SpecError(
                "fraction_4bit",
                repr(self.fraction_4bit),
                "0, 0.25, 0.5 or 1",
                "choose how many strips of four have 4 bits",
            )
        if self.fraction_4bit and self.bits != 2:
            raise SpecError(
                "fraction_4bit", f"{self.fraction_4bit:g} with bits {self.bits}", "4-bit strips among 2-bit ones",
                "use bits 2, or a fraction of 0",
            )  # fmt: skip
        if self.metadata not in METADATA:
            raise SpecError("metadata", repr(self.metadata), "fine or paper", "choose one of them")
        if self.metadata == "paper" and self.widths != (4, 2, 2, 2):
            raise SpecError(
                "metadata", f"paper with strips of {self.widths} bits", "one 4-bit and three 2-bit strips in a block",
                "use a fraction of 0.25, or metadata fine",
            )  # fmt: skip

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Bits of the four strips of every block."""
        wide = int(4 * self.fraction_4bit)
        first, second, third, fourth = (4,) * wide + (self.bits,) * (4 - wide)
        return first, second, third, fourth

    @property
    def tile(self) -> int:
        """Output channels that share the second-order scales of a strip; 256 is the paper's g2."""
        return 256 if self.metadata == "paper" else 64

    @property
    def scale_tops(self) -> tuple[int, int, int, int]:
        """Highest scale code of each strip of a block: 2311.16442 clips two to 3 bits, and a 4-bit strip has none."""
        return (0, 7, 7, 15) if self.metadata == "paper" else (15, 15, 15, 15)

    @property
    def extra_words(self) -> int:
        """32-bit words of a row's block beyond the four of the main array."""
        return (sum(self.widths) - 8) // 2

    def blocks(self, in_features: int) -> int:
        """Blocks of a weight with this many input channels; the last one is filled up with zeros."""
        return ceil(in_features / BLOCK)

    def tiles(self, out_features: int) -> int:
        return ceil(out_features / self.tile)

    def row_cut(self, in_features: int, irregular: bool) -> tuple[int, str]:
        """Input channels that a tensor-parallel cut keeps together, and what they are. irregular: a `strip_order`."""
        if irregular:
            return in_features, "the order of its strips"
        return (in_features if in_features % BLOCK else BLOCK), f"a block of {BLOCK} input channels"

    def column_cut(self, out_features: int) -> tuple[int, str]:
        """The same for output channels."""
        tile = self.tile
        return (out_features if out_features % tile else tile), f"a tile of {tile} output channels"

    def facts(self) -> dict[str, str]:
        """What a table says of a matrix."""
        return {"strips": " ".join(map(str, self.widths)), "metadata": self.metadata}

    def padding_unit(self, role: str) -> int:
        """What zero-padding fills up: input channels of a "row" matrix, output channels of a "column" one."""
        return BLOCK if role == "row" else self.tile

    def code_bytes(self, in_features: int, out_features: int) -> int:
        return 4 * (4 + self.extra_words) * self.blocks(in_features) * out_features

    def scale_bytes(self, in_features: int, out_features: int) -> int:
        """Bytes of scales and zeros of both orders, without outliers."""
        blocks, tiles, n = self.blocks(in_features), self.tiles(out_features), out_features
        if self.metadata == "paper":
            return 2 * blocks * n + 8 * blocks * tiles + 2 * n + ceil(n / 2)
        return 3 * blocks * n + 16 * blocks * tiles


def zero_base(width: int) -> int:
    """The zero point that zero code 0 stands for: a strip's zero is this plus its 2-bit code, the middle being 2."""
    return (1 << (width - 1)) - 2


MOST_AVERAGE_BITS = 5  # of mix64, which fills up odd matrices


@dataclass(frozen=True)
class MixRecipe:
    """How a `mix64` weight is filled (GPTQ's by GPTQ_RECIPE); the file says nothing of it but its provenance.

    order: of input channels, the "model" having been put in the order of their sensitivity, or "none": natural order,
    the most sensitive strips of each matrix gathered into the 4-bit places. ranking: what makes a channel or strip
    sensitive, "hessian" (2311.16442 v4) or its "range" alone (v1). ranges: of strips, found by a "search" for the least
    error or by "minmax". outliers: share of weights kept in 16 bits. correct: aim at the 16-bit model's outputs from
    inputs that the blocks before have changed (2504.02692), not at each matrix's own. average_bits: each matrix gets
    the fraction of 4-bit strips that lowers the model's errors most, within so many bits in all, for each weight
    of the model; the default gives way where blocks that zeros fill up leave no room for it. tune: steps of tuning all
    codes of a block together, against the outputs of the 16-bit block; 0 for none. damp: of the inputs' mean activity,
    added to every channel's before weights are rounded (2210.17323 section 3.3), so that less is made of what a short
    text happens to say.
    """

    order: str = "model"
    ranking: str = "hessian"
    ranges: str = "search"
    outliers: float = 0.0
    correct: bool = True
    average_bits: float | None = None
    tune: int = 0
    damp: float = 0.05

    def __post_init__(self) -> None:
        for name, allowed in (
            ("order", ("model", "none")),
            ("ranking", ("hessian", "range")),
            ("ranges", ("search", "minmax")),
        ):
            if getattr(self, name) not in allowed:
                raise SpecError(name, repr(getattr(self, name)), " or ".join(allowed), "choose one of them")
        if type(self.correct) is not bool:
            raise SpecError("correct", repr(self.correct), "true or false", "choose one of them")
        if not _is_number(self.outliers) or not 0 <= self.outliers <= MOST_OUTLIERS:
            raise SpecError(
                "outliers",
                repr(self.outliers),
                f"a share of all weights from 0 to {MOST_OUTLIERS}",
                "for example 0.002",
            )
        bits = self.average_bits
        if bits is not None and not (_is_number(bits) and 0 < bits <= MOST_AVERAGE_BITS):
            raise SpecError(
                "average_bits", repr(self.average_bits),
                f"about 2.41, 2 bits for all strips, to 4.41, 4 bits for all; {MOST_AVERAGE_BITS} with outliers",
                "for example 2.91",
            )  # fmt: skip
        if not _is_number(self.damp) or not 0 <= self.damp <= 1:
            raise SpecError("damp", repr(self.damp), "a share of the mean activity from 0 to 1", "for example 0.05")
        if type(self.tune) is not int or self.tune < 0:
            raise SpecError("tune", repr(self.tune), "a number of steps, 0 or more", "for example 100")
        if self.tune and not self.correct:
            raise SpecError(
                "tune", f"{self.tune} without correct", "tuning towards the 16-bit model's outputs", "leave one out"
            )

    def check(self, spec: QuantSpec | MixSpec) -> None:
        """Raise SpecError for what this format cannot hold."""
        what = ", ".join(f"{name} {value}" for name, value in spec.facts().items())
        if self.outliers and not (isinstance(spec, MixSpec) and 2 in spec.widths):
            raise SpecError(
                "outliers", f"{self.outliers:g} with {what}", "outliers in 2-bit strips only",
                "leave them out, or use bits 2",
            )  # fmt: skip
        if self.average_bits is not None and spec != MixSpec():
            raise SpecError(
                "average_bits", f"{self.average_bits:g} with {what}",
                "a fraction of 4-bit strips that is chosen for each matrix, metadata fine",
                "leave average_bits out, or bits, fraction_4bit and metadata",
            )  # fmt: skip
        if self.tune and not isinstance(spec, MixSpec):
            raise SpecError("tune", f"{self.tune} with {what}", "tuning in format mix64 only", "leave it out")


MIX_RECIPE = MixRecipe(average_bits=2.91)  # what MixSpec() is filled by when nothing else is asked for
GPTQ_RECIPE = MixRecipe(order="none", ranges="minmax", correct=False, damp=0.01)  # 2210.17323 as it is
# 2311.16442 as far as it is known (docs/accuracy.md says what is not): spec and recipe by the paper's version
PAPER_RECIPES = {
    "paper-v1": (MixSpec(metadata="paper"), replace(GPTQ_RECIPE, ranking="range", outliers=0.002)),
    "paper-v4": (MixSpec(metadata="paper"), replace(GPTQ_RECIPE, ranking="hessian", outliers=0.005)),
}


def _options(format: str) -> set[str]:
    """Of QuantSpec or MixSpec and of MixRecipe, those that a format has."""
    names = {field.name for field in (*fields(MixSpec if format == "mix64" else QuantSpec), *fields(MixRecipe))}
    return names if format == "mix64" else names - {"ranking", "ranges", "outliers", "average_bits", "tune"}


def requested(format: str, recipe: str | None, options: Mapping[str, Any]) -> tuple[QuantSpec | MixSpec, MixRecipe]:
    """What a user asks for: options of QuantSpec or MixSpec and of MixRecipe by name, None where left out.

    recipe: a name in PAPER_RECIPES, which then says all. Raises SpecError for an option that the format does not have.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if format not in ("mix64", "gptq"):
        raise SpecError("format", repr(format), "mix64 or gptq", "choose one of them")
    if recipe is not None:
        if recipe not in PAPER_RECIPES:
            raise SpecError("recipe", repr(recipe), " or ".join(PAPER_RECIPES), "choose one of them")
        if given or format != "mix64":
            raise SpecError(
                "recipe",
                f"{recipe} with {', '.join(given) or f'format {format}'}",
                "a recipe alone",
                "leave the rest out",
            )
        return PAPER_RECIPES[recipe]
    spec: QuantSpec | MixSpec
    if format == "mix64":
        spec = MixSpec(fraction_4bit=0.25 if given.get("bits", 2) == 2 else 0.0, bits=given.get("bits", 2))
        start = MixRecipe() if {"bits", "fraction_4bit", "metadata"} & given.keys() else MIX_RECIPE
    else:
        spec, start = QuantSpec(), GPTQ_RECIPE
    for name in given:
        if name not in _options(format):
            groups = f", whose groups are strips of {STRIP}" if name == "group_size" else ""
            other = "gptq" if format == "mix64" else "mix64"
            fix = f"leave it out, or choose format {other}" if given.keys() <= _options(other) else "leave it out"
            raise SpecError(name, repr(given[name]), f"the options of format {format}{groups}", fix)
    if {"average_bits", "fraction_4bit"} <= given.keys():
        raise SpecError(
            "average_bits", f"{given['average_bits']} with fraction_4bit {given['fraction_4bit']}",
            "a fraction of 4-bit strips that is chosen for each matrix", "leave one out",
        )  # fmt: skip
    own = {field.name for field in fields(spec)}
    wanted = replace(start, **{name: value for name, value in given.items() if name not in own})
    spec = replace(spec, **{name: value for name, value in given.items() if name in own})
    wanted.check(spec)
    return spec, wanted
