"""`bitshard plan`: what a model would weigh and where it could be cut, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitshard.checkpoint import INDEX, Checkpoint, read_json
from bitshard.errors import SpecError
from bitshard.models import architecture, shapes
from bitshard.plan import CANDIDATE_DEGREES, TPPlan, padding_for
from bitshard.spec import MixSpec, QuantSpec


@dataclass(frozen=True)
class Degree:
    """One tensor-parallel degree: legal when `obstacles` is empty; sizes in bytes, per rank.

    allreduce_bytes: of one decoded token with 16-bit activations, one AllReduce per MLP and one per attention block.
    floor_ms: time to read a rank's matrices once at the given bandwidth, None when none was given.
    """

    tp_size: int
    obstacles: Sequence[str]
    bytes_per_rank: int | None
    allreduces: int
    allreduce_bytes: int
    floor_ms: float | None


@dataclass(frozen=True)
class ModelPlan:
    """gathered: row matrices that want their input in another order. padding: new sizes that make pad_to legal.

    quantized: the checkpoint is, and was planned as it is.
    """

    model: str
    model_type: str
    layers: int
    spec: QuantSpec | MixSpec
    average_bits: float
    quantized: bool
    gathered: Sequence[str]
    degrees: Sequence[Degree]
    padding: Mapping[str, int] | None
    padding_cost: float | None


def plan_model(
    path: Path, spec: QuantSpec | MixSpec, pad_to: int | None = None, gb_per_s: float | None = None
) -> ModelPlan:
    """Plan a checkpoint folder. A quantized one is planned as it is, any other as if quantized with `spec`.

    Only config.json is needed of a 16-bit model. gb_per_s: memory bandwidth of one device, for the floor.
    """
    if gb_per_s is not None and not gb_per_s > 0:
        raise SpecError("gb_per_s", str(gb_per_s), "more than 0", "give the device's bandwidth, or leave it out")
    plan, own_spec = _plan(path, spec)
    parameters = sum(
        linear.in_features * linear.out_features
        for layer in range(plan.sizes.layers)
        for _, linear in plan.linears(layer)
    )
    padding = None if pad_to is None else padding_for(plan, pad_to)
    cost = None
    if padding:
        sizes = vars(plan.sizes) | vars(padding)
        padded = replace(plan, sizes=type(plan.sizes)(**sizes))
        cost = padded.bytes_per_rank(1) / plan.bytes_per_rank(1) - 1
    return ModelPlan(
        model=str(path),
        model_type=plan.arch.model_types[0],
        layers=plan.sizes.layers,
        spec=own_spec or spec,
        quantized=own_spec is not None,
        average_bits=plan.bytes_per_rank(1) * 8 / parameters,
        gathered=sorted(plan.gathered),
        degrees=[_degree(plan, t, gb_per_s) for t in CANDIDATE_DEGREES if t <= max(plan.sizes.heads, pad_to or 1)],
        padding=vars(padding) if padding else None,
        padding_cost=cost,
    )


def _degree(plan: TPPlan, tp_size: int, gb_per_s: float | None) -> Degree:
    obstacles = [f"{o.name}: {o.reason}" for o in plan.obstacles(tp_size)]
    size = None if obstacles else plan.bytes_per_rank(tp_size)
    calls = 2 * plan.sizes.layers if tp_size > 1 else 0
    return Degree(
        tp_size=tp_size,
        obstacles=obstacles,
        bytes_per_rank=size,
        allreduces=calls,
        allreduce_bytes=calls * plan.sizes.hidden * 2,
        floor_ms=size / gb_per_s / 1e6 if size and gb_per_s else None,
    )


def _plan(path: Path, spec: QuantSpec | MixSpec) -> tuple[TPPlan, QuantSpec | MixSpec | None]:
    """Of a quantized checkpoint with its own spec, of any other with `spec` and None."""
    if (path / INDEX).exists() or any(path.glob("*.safetensors")):
        checkpoint = Checkpoint.open(path)
        if checkpoint.quantization is not None:
            return checkpoint.plan(), checkpoint.quantization.spec
    file = path / "config.json"
    config = read_json(file)
    arch = architecture(config, str(file))
    return TPPlan(arch, shapes(arch, config, str(file)), lambda name: spec), None
