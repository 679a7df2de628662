"""`bitshard quantize`: a 16-bit model and a text to a GPTQ checkpoint, one decoder block in memory.

Each block is solved in the order its matrices are used ("true sequential"): q, k, v together, then o, then gate and up,
then down, each from the outputs of what is already quantized. A block is run up to the matrices in question and no
further, so all four steps cost little more than one pass over it. Memory: one block in float32, one stage's Hessians
(of a mixture: all experts') and the calibration's hidden states.

An interrupted run leaves `OUT.partial` and continues from there to the same bytes: block i counts as done when its
shard is there, and what block i + 1 starts from is written before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from bitshard import __version__
from bitshard.blockwise import BlockwiseModel
from bitshard.checkpoint import Checkpoint
from bitshard.edit import BlockEdit
from bitshard.errors import CheckpointError, FormatError, SpecError
from bitshard.layout import FORMAT_VERSION, GptqLayout
from bitshard.models import Architecture, Shapes, mlp_paths
from bitshard.plan import Padding, TPPlan, padding_for
from bitshard.progress import Progress, silent
from bitshard.quantconfig import QuantConfig
from bitshard.solver.gptq import SolveReport, gptq
from bitshard.sources import calibration_text, resolve
from bitshard.spec import QuantSpec, codes_per_pack
from bitshard.writer import Writer

OUTSIDE = "outside the blocks"

# hidden: what the next block reads, float32 [S, L, H]. solved: a row for each matrix so far, in the plan's order:
# relative error, damping, dead channels, 1 if no token reached it.
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """A text that stands for what the model will read, and which `samples` segments of `length` tokens of it to use.

    path: plain text, or JSON lines with a `text` field; None for the packaged text. seed: 0 takes the first segments,
    any other number chooses segments of the whole text at random.
    """

    path: Path | None = None
    samples: int = 32
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 1:
            raise SpecError(
                "calibration", f"{self.samples} samples of {self.length} tokens", "at least one of each",
                "leave them out for 32 of 512",
            )  # fmt: skip


@dataclass(frozen=True)
class QuantizeReport:
    """What was done. unseen: experts' matrices that no calibration token reached, rounded without feedback."""

    out: str
    matrices: Sequence[SolveReport]
    unseen: Sequence[str]
    padded: Mapping[str, int]


@dataclass(frozen=True)
class _Job:
    """One model, from `source` at its own sizes to `sizes`, which padding made larger."""

    checkpoint: Checkpoint
    spec: QuantSpec
    padding: Padding | None

    @property
    def plan(self) -> TPPlan:
        """The model as it is in the file."""
        return TPPlan(self.checkpoint.arch, self.checkpoint.sizes, lambda name: self.spec)

    @property
    def sizes(self) -> Shapes:
        return replace(self.checkpoint.sizes, **vars(self.padding)) if self.padding else self.checkpoint.sizes

    @property
    def config_updates(self) -> dict[str, Any]:
        return self.padding.config_updates(self.checkpoint.arch, self.checkpoint.config) if self.padding else {}

    def read_block(self, layer: int) -> dict[str, torch.Tensor]:
        """A block's tensors by name, zero-padded, in the file's dtypes."""
        tensors = self.checkpoint.read(self.checkpoint.names_in_block(layer))
        if self.padding:
            edit = BlockEdit()
            edit.pad(self.plan, self.padding, f"{self.checkpoint.arch.blocks}.{layer}.")
            for name in {*edit.longer, *edit.wider}:
                own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == name}
                tensors |= {f"{name}.{suffix}": t for suffix, t in edit.apply_dense(name, own).items()}
        return tensors


def quantize(
    model: str | Path,
    out: Path,
    spec: QuantSpec,
    calibration: Calibration | None = None,
    pad_to: int | None = None,
    progress: Progress = silent,
) -> QuantizeReport:
    """Quantize a 16-bit `model` (folder, .gguf file or hub id) into the new folder `out`; resumes an interrupted run.

    Solved in float32, on a CUDA device where there is one. pad_to: zero-pad MLP channels and whole KV groups until the
    matrices can be quantized and this tensor-parallel degree is legal; 1 is enough for odd sizes.
    Raises CheckpointError, FormatError, PlanError or SpecError before any work when something cannot be, SolverError
    with the matrix's name when numbers cannot; nothing is left under `out` then.
    """
    calibration = calibration or Calibration()
    job = _prepare(resolve(str(model)), spec, pad_to)
    text = calibration_text(calibration.path)
    tokens_SL = _segments(job.checkpoint, text, calibration)
    provenance = {
        "source": _source_name(model),
        "quantizer": f"bitshard {__version__}",
        "calibration_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **{key: value for key, value in vars(calibration).items() if key != "path"},
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blockwise = BlockwiseModel(job.checkpoint, job.sizes, job.config_updates, device)
    task = {
        "verb": "quantize",
        "source": job.checkpoint.fingerprint(),
        "spec": vars(spec),
        "pad_to": pad_to,
        "device": device.type,
        "provenance": provenance,
        "version": FORMAT_VERSION,
    }
    writer = Writer(out, [OUTSIDE, *map(_shard, range(job.sizes.layers))], task)
    if not writer.has(OUTSIDE):
        writer.write(OUTSIDE, job.checkpoint.read(job.checkpoint.names_outside_blocks()))
    done, state = _resume(job, blockwise, tokens_SL, writer)
    for layer in progress(range(done, job.sizes.layers), "quantizing"):
        state = _quantize_block(job, blockwise, writer, layer, state)
    section = {"version": FORMAT_VERSION, "layout": GptqLayout.name, "provenance": provenance}
    config = {**job.checkpoint.config, **job.config_updates}
    writer.finish(job.checkpoint.path, config, QuantConfig(spec, _layout(spec), (), section))
    return _report(job, out, state["solved"])


def _prepare(path: Path, spec: QuantSpec, pad_to: int | None) -> _Job:
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantization is not None:
        raise FormatError(
            str(path), "a quantized checkpoint", "a 16-bit model", "start from the model it was made from"
        )
    job = _Job(checkpoint, spec, None)
    checkpoint.plan()  # refuses a matrix that is missing or has other sizes than config.json gives it
    if pad_to is not None:
        job = replace(job, padding=padding_for(job.plan, pad_to))
    _check_spec(job)
    return job


def _check_spec(job: _Job) -> None:
    """Every matrix can be cut into groups and packed into words, or SpecError with its name."""
    spec = job.spec
    word = codes_per_pack(spec.bits)
    for name, linear in replace(job.plan, sizes=job.sizes).linears(0):
        k, n = linear.in_features, linear.out_features
        for size, what, unit, unit_name, fix in (
            (k, "input", spec.group(k), "groups", "choose a group_size that divides it, for example 32 or -1"),
            (k, "input", word, f"words of {spec.bits}-bit codes", "choose other bits"),
            (n, "output", word, f"words of {spec.bits}-bit zeros", "choose other bits"),
        ):
            # what lies between two matrices can be padded, the residual stream cannot
            padded = job.padding is None and (what == "input") == (linear.role == "row")
            if size % unit:
                fix += " or zero-pad the model (`--pad-to 1`)" if padded else ""
                raise SpecError(name, f"{size} {what} channels", f"whole {unit_name}, of {unit}", fix)


def _segments(checkpoint: Checkpoint, text: str, calibration: Calibration) -> torch.Tensor:
    """Token ids [S, L] of the chosen segments."""
    samples, length = calibration.samples, calibration.length
    limit = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions", length))
    if length > limit:
        raise SpecError("calibration", f"segments of {length} tokens", f"{limit}, the model's longest", "ask for less")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(checkpoint.path), f"no usable tokenizer ({type(error).__name__})", "the model's tokenizer files",
            "copy them there",
        ) from None  # fmt: skip
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = len(tokens) // length
    if count < samples:
        raise SpecError(
            "calibration", f"a text of {count} segments of {length} tokens", f"at least {samples}",
            "pass a longer text, or ask for fewer samples or a smaller length",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(calibration.seed)
    chosen = torch.randperm(count, generator=generator)[:samples] if calibration.seed else torch.arange(samples)
    return tokens[: count * length].view(count, length)[chosen]


def _resume(job: _Job, model: BlockwiseModel, tokens_SL: torch.Tensor, writer: Writer) -> tuple[int, State]:
    """How many blocks an earlier run finished, and the state that the next one starts from."""
    hidden_SLH = model.embed(tokens_SL)
    done = _blocks_done(writer, job.sizes.layers)
    if done:
        # cloned: where a mapped tensor lies, and so the last bit of a product, differs from the uninterrupted run's
        return done, {name: tensor.clone() for name, tensor in load_file(writer.partial / _state(done)).items()}
    return 0, {"hidden": hidden_SLH, "solved": torch.empty(0, 4, dtype=torch.float64)}


def _shard(layer: int) -> str:
    return f"block {layer}"


def _state(layer: int) -> str:
    """The file with the inputs of a block, and what is known of the matrices before it."""
    return f"inputs-{layer}.safetensors"


def _blocks_done(writer: Writer, layers: int) -> int:
    done = next((layer for layer in range(layers) if not writer.has(_shard(layer))), layers)
    return done if (writer.partial / _state(done)).exists() else 0


def _stages(arch: Architecture, sizes: Shapes) -> list[list[tuple[str, ...]]]:
    """Matrices in the order they are used. Those of a stage are solved together, those of a tuple share an input."""
    mlps = mlp_paths(arch, sizes)
    return [
        [arch.attention.column],
        [(arch.attention.row,)],
        [columns for columns, _ in mlps],
        [(row,) for _, row in mlps],
    ]


def _quantize_block(job: _Job, model: BlockwiseModel, writer: Writer, layer: int, state: State) -> State:
    """Quantize every matrix of one block, write its shard, and return the state that the next block starts from."""
    arch, layout, tensors = model.arch, _layout(job.spec), job.read_block(layer)
    rows: dict[str, list[float]] = {}
    model.load(layer, tensors)
    for stage in _stages(arch, job.sizes):
        hessians = model.hessians(layer, state["hidden"], [names[0] for names in stage])
        for names, hessian in zip(stage, hessians, strict=True):
            H_KK = hessian.matrix()
            for name in names:
                full, linear = f"{arch.blocks}.{layer}.{name}", model.linear(layer, name)
                weight, report = gptq(linear.weight, H_KK, job.spec, full)
                linear.weight.copy_(weight.dequantize().T)
                del tensors[f"{full}.weight"]
                tensors |= {f"{full}.{suffix}": tensor.cpu() for suffix, tensor in layout.pack(weight).items()}
                rows[full] = [report.relative_error, report.damp, report.dead, not hessian.count]
    solved = torch.tensor([rows[name] for name, _ in job.plan.linears(layer)], dtype=torch.float64)
    state = {"hidden": model.run(layer, state["hidden"]), "solved": torch.cat([state["solved"], solved])}
    model.unload(layer)
    writer.write_state(_state(layer + 1), state)
    writer.write(_shard(layer), tensors)
    (writer.partial / _state(layer)).unlink(missing_ok=True)
    return state


def _report(job: _Job, out: Path, solved: torch.Tensor) -> QuantizeReport:
    names = [name for layer in range(job.sizes.layers) for name, _ in job.plan.linears(layer)]
    rows = list(zip(names, solved.tolist(), strict=True))
    grown = job.padding is not None and job.sizes != job.checkpoint.sizes
    return QuantizeReport(
        out=str(out),
        matrices=[SolveReport(name, error, damp, int(dead)) for name, (error, damp, dead, _) in rows],
        unseen=[name for name, (_, _, _, unseen) in rows if unseen],
        padded=vars(job.padding) if grown else {},
    )


def _layout(spec: QuantSpec) -> GptqLayout:
    """Version 1 where every reader agrees on it; asymmetric zeros need all their range, which only version 2 stores."""
    return GptqLayout(1 if spec.sym else 2)


def _source_name(model: str | Path) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)
