"""Where a model may be cut for tensor parallelism. Integers only: no tensor is ever seen here.

Column-parallel matrices are cut along N, row-parallel ones along K. A cut must fall between heads, between quantization
groups (unless every rank holds all scales) and between the 32-bit words that hold the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, lcm
from typing import Any

from bitshard.errors import PlanError
from bitshard.models import Architecture, Linear, Shapes, block_linears, shapes
from bitshard.spec import MixSpec, QuantSpec

CANDIDATE_DEGREES = (*range(1, 17), 24, 32, 48, 64)

# The spec of one matrix by its full name, or None where it stays 16-bit.
SpecOf = Callable[[str], QuantSpec | MixSpec | None]


@dataclass(frozen=True)
class Obstacle:
    """Why a degree is not legal: the matrix, its sizes, and what the cut would split."""

    name: str
    reason: str


@dataclass(frozen=True)
class TPPlan:
    """All that cutting one model needs to know.

    gathered: row-parallel matrices that ask for their input in another order (an irregular `g_idx`, a `strip_order`).
    outliers: how many weights of a matrix are stored beside its codes.
    """

    arch: Architecture
    sizes: Shapes
    spec_of: SpecOf
    gathered: frozenset[str] = frozenset()
    outliers: Mapping[str, int] = field(default_factory=dict)

    def linears(self, layer: int) -> list[tuple[str, Linear]]:
        """(full name, matrix) of one decoder block."""
        prefix = f"{self.arch.blocks}.{layer}."
        return [(prefix + linear.name, linear) for linear in block_linears(self.arch, self.sizes)]

    def obstacles(self, tp_size: int) -> list[Obstacle]:
        """Everything that forbids this degree; empty when it is legal. One entry per kind of matrix and reason."""
        found: dict[str, Obstacle] = {}
        heads, kv_heads = self.sizes.heads, self.sizes.kv_heads
        attention = f"{self.arch.blocks}.0.{self.arch.attention.row}"
        if heads % tp_size:
            found["heads"] = Obstacle(attention, f"{heads} heads do not divide by {tp_size}")
        elif kv_heads % tp_size and not self._replicates_kv:
            found["heads"] = Obstacle(attention, f"{kv_heads} KV heads do not divide by {tp_size}")
        for layer in range(self.sizes.layers):
            for name, linear in self.linears(layer):
                reason = self._obstacle(name, linear, tp_size)
                if reason:
                    found.setdefault(f"{linear.name} {reason}", Obstacle(name, reason))
        return list(found.values())

    @property
    def _replicates_kv(self) -> bool:
        """Multi-query attention: the one KV head is small and every rank computes it."""
        return self.sizes.kv_heads == 1 and self.arch.attention.fused

    def _obstacle(self, name: str, linear: Linear, tp_size: int) -> str:
        spec = self.spec_of(name)
        if linear.role == "row":
            k = linear.in_features
            unit, what = spec.row_cut(k, name in self.gathered) if spec else (1, "a channel")
            return "" if _divides(k, unit, tp_size) else f"{k} input channels / {tp_size} splits {what}"
        for width in self._column_widths(linear):
            unit, what = spec.column_cut(width) if spec else (1, "a channel")
            if not _divides(width, unit, tp_size):
                return f"{width} output channels / {tp_size} splits {what}"
        return ""

    def _column_widths(self, linear: Linear) -> list[int]:
        """Widths that are cut one by one inside a column-parallel matrix: q and k, v of a fused one, gate and up."""
        d = self.sizes.head_dim
        if linear.name not in self.arch.attention.column:
            return [self.sizes.intermediate]
        if not self.arch.attention.fused:
            return [linear.out_features]
        q = self.sizes.heads * d
        return [q] if self._replicates_kv else [q, self.sizes.kv_heads * d]

    def legal_degrees(self) -> list[int]:
        return [t for t in CANDIDATE_DEGREES if t <= self.sizes.heads and not self.obstacles(t)]

    def require(self, tp_size: int) -> None:
        """Raise PlanError with layer, sizes and the legal list unless `tp_size` is legal."""
        obstacles = self.obstacles(tp_size)
        if obstacles:
            fix = "choose one of these"
            with suppress(PlanError):  # no padding would do
                padding_for(self, tp_size)
                fix += f", or zero-pad: {how_to_pad(self.spec_of(self.linears(0)[0][0]), tp_size)}"
            raise PlanError(
                obstacles[0].name,
                f"tensor-parallel degree {tp_size}: {obstacles[0].reason}",
                "degrees " + ", ".join(map(str, self.legal_degrees())),
                fix,
            )

    def columns(self, linear_name: str, rank: int, tp_size: int) -> list[tuple[int, int]]:
        """Column ranges [start, stop) of a column-parallel matrix that a rank holds, in order."""
        arch, sizes = self.arch, self.sizes
        if linear_name in arch.attention.column:
            widths = [sizes.heads * sizes.head_dim]
            if arch.attention.fused:
                widths += [sizes.kv_heads * sizes.head_dim] * 2
            elif linear_name != arch.attention.column[0]:
                widths = [sizes.kv_heads * sizes.head_dim]
        else:
            widths = [sizes.intermediate] * arch.mlp.parts
        ranges, start = [], 0
        for i, width in enumerate(widths):
            if i > 0 and self._replicates_kv and linear_name in arch.attention.column:
                ranges.append((start, start + width))
            else:
                part = width // tp_size
                ranges.append((start + rank * part, start + (rank + 1) * part))
            start += width
        return ranges

    def bytes_per_rank(self, tp_size: int) -> int:
        """Bytes of the decoder blocks' matrices that one rank holds: codes, scales, zeros, its share of outliers."""
        total = 0
        for layer in range(self.sizes.layers):
            for name, linear in self.linears(layer):
                total += self._bytes(name, linear, tp_size)
        return total

    def _bytes(self, name: str, linear: Linear, tp_size: int) -> int:
        spec = self.spec_of(name)
        k, n = linear.in_features, linear.out_features
        if linear.role == "column":
            n = sum(stop - start for start, stop in self.columns(linear.name, 0, tp_size))
        local_k = k // tp_size if linear.role == "row" else k
        if spec is None:
            return 2 * local_k * n
        outliers = 4 * (n + 1) + 4 * ceil(self.outliers[name] / tp_size) if name in self.outliers else 0
        return spec.code_bytes(local_k, n) + spec.scale_bytes(k if name in self.gathered else local_k, n) + outliers

    def replicated_scale_bytes(self, name: str, linear: Linear, tp_size: int) -> int:
        """Extra bytes of scales and zeros a rank holds because a row-parallel matrix keeps an irregular `g_idx`."""
        spec = self.spec_of(name)
        if spec is None or name not in self.gathered:
            return 0
        whole = spec.scale_bytes(linear.in_features, linear.out_features)
        return whole - whole // tp_size


def _divides(size: int, unit: int, tp_size: int) -> bool:
    return size % tp_size == 0 and (size // tp_size) % unit == 0


@dataclass(frozen=True)
class Padding:
    """Zero-padding that makes a degree legal: new sizes, and what they cost."""

    intermediate: int
    heads: int
    kv_heads: int

    def config_updates(self, arch: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json entries to rewrite."""
        keys, before = arch.keys, shapes(arch, config)
        updates: dict[str, Any] = {keys["intermediate"]: self.intermediate, keys["heads"]: self.heads}
        if self.heads != before.heads:  # a head's length that is not named would be hidden / heads
            updates[keys["head_dim"]] = before.head_dim
        if config.get(keys["kv_heads"]) is not None:
            updates[keys["kv_heads"]] = self.kv_heads
        return updates


def how_to_pad(spec: QuantSpec | MixSpec | None, tp_size: int) -> str:
    """What makes `tp_size` legal for a quantized model."""
    mixed = isinstance(spec, MixSpec)
    return f"quantize its 16-bit model with --max-tp {tp_size}" if mixed else f"`convert --pad-to {tp_size}`"


def padding_for(plan: TPPlan, tp_size: int) -> Padding:
    """The smallest zero-padding of MLP channels and whole KV groups that makes `tp_size` legal.

    Raises PlanError when no padding can: a multi-query model's one KV head is never multiplied.
    """
    if not 1 <= tp_size <= CANDIDATE_DEGREES[-1]:
        raise PlanError("tensor-parallel degree", str(tp_size), f"1 to {CANDIDATE_DEGREES[-1]}", "choose one")
    sizes = plan.sizes
    mlp_unit = attention_unit = 1  # what a rank holds of a width must be a multiple of these
    for layer in range(sizes.layers):
        for name, linear in plan.linears(layer):
            spec = plan.spec_of(name)
            if spec is None:
                continue
            if linear.name in (*plan.arch.attention.column, plan.arch.attention.row):
                attention_unit = lcm(attention_unit, spec.padding_unit(linear.role))
            else:
                mlp_unit = lcm(mlp_unit, spec.padding_unit(linear.role))
    step = mlp_unit * tp_size
    intermediate = ceil(sizes.intermediate / step) * step
    per_group = sizes.heads // sizes.kv_heads
    # KV heads of a rank: of as many numbers in a row as the unit has channels, one is a multiple of it
    first, divides = ceil(sizes.kv_heads / tp_size), plan.arch.attention.divides
    most = sizes.hidden // per_group + 1 if divides else 0
    counts = range(tp_size * first, max(tp_size * (first + attention_unit), most), tp_size)
    for kv_heads in [sizes.kv_heads] if plan._replicates_kv else counts:
        if divides and kv_heads != sizes.kv_heads and sizes.hidden % (kv_heads * per_group):
            continue
        padded = Shapes(
            sizes.hidden, intermediate, kv_heads * per_group, kv_heads, sizes.head_dim, sizes.layers, sizes.experts
        )
        if not TPPlan(plan.arch, padded, plan.spec_of, plan.gathered).obstacles(tp_size):
            return Padding(intermediate, kv_heads * per_group, kv_heads)
    raise PlanError(
        f"{plan.arch.blocks}.0.{plan.arch.attention.row}",
        f"{sizes.heads} heads of {sizes.head_dim} that no zero-padding cuts into {tp_size}",
        "another degree" + "".join(f", {degree} without padding" for degree in plan.legal_degrees()[-1:]),
        "choose one that divides the heads more evenly",
    )
