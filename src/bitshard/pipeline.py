"""`bitshard quantize`: a 16-bit model and a text to a low-bit checkpoint, one decoder block in memory.

First the model is put in order (ordering.choose_order), so that what follows meets every channel where it belongs. Then
each block is solved in the order its matrices are used ("true sequential"): q, k, v together, then o, then gate and up,
then down, each from the outputs of what is already quantized. A block is run up to the matrices in question and no
further, and what leads to inputs that are known already is left out, so all four steps cost little more than one pass
over it. Before that the 16-bit block runs on the 16-bit model's own hidden states where weights are to make up for what
the blocks before have changed (`MixRecipe.correct`).

Memory: one block in float32; one stage's Hessians (of a mixture: all experts'), and two to four matrices as large while
one is solved; the calibration's hidden states, what o and down read, and what the 16-bit block's matrices read or gave.
Tuning needs 21 bytes more for each of a block's weights.

An interrupted run leaves `OUT.partial` and continues from there to the same bytes: block i counts as done when its
shard is there, and what block i + 1 starts from is written before it. The same on one machine, with one torch and one
number of threads: products of larger matrices are summed in another order by two threads than by one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bitshard import __version__
from bitshard.blockwise import BlockwiseModel, Watcher, own_tensors, require_finite, trim
from bitshard.card import model_card
from bitshard.checkpoint import Checkpoint
from bitshard.edit import BlockEdit
from bitshard.errors import CheckpointError, FormatError, SpecError
from bitshard.layout import FORMAT_VERSION, GptqLayout, Mix64Layout
from bitshard.mixed import MixedWeight
from bitshard.models import Architecture, Shapes, mlp_paths
from bitshard.ordering import choose_order
from bitshard.plan import Padding, TPPlan, padding_for
from bitshard.progress import Progress, silent
from bitshard.quantconfig import QuantConfig
from bitshard.quantized import QuantizedWeight
from bitshard.records import why_not_read
from bitshard.reorder import ModelOrder
from bitshard.solver.allocate import relative_errors, spend
from bitshard.solver.gptq import SolveReport, gptq
from bitshard.solver.hessian import Hessian
from bitshard.solver.mixed import solve_mixed
from bitshard.solver.tune import judges, tune
from bitshard.sources import calibration_text, encode, load_tokenizer, resolve, tokens_before
from bitshard.spec import (
    BLOCK,
    FRACTIONS,
    GPTQ_RECIPE,
    MAX_SEED,
    MIX_RECIPE,
    STRIP,
    MixRecipe,
    MixSpec,
    QuantSpec,
    codes_per_pack,
)
from bitshard.writer import OUTSIDE, Task, Writer, block_shard

ORDER_FILE = "order.safetensors"
ORDER_SAMPLES = 8  # segments that an order is chosen from; four times as many move perplexity by less than 1 %

# With fewer bits than these blocks are run in bfloat16: its products are 0.2 % off, 2-bit strips 13 % and 8-bit ones
# 0.3 %. With 64 segments SmolLM2 at 2.91 bits has a perplexity of 45.0 and 57.2 (wiki, c4) instead of 45.4 and 56.6.
FLOAT32_BITS = 4

MOST_UNKNOWN = 0.5  # of a calibration text's tokens; a text in another script has most, real ones a few in a thousand

ALLOCATE_ROWS = 256  # of a matrix, that say how much it wants 4 bits
ORDERS = ("hidden_H", "values_LJD", "kv_groups_LJ")  # of ModelOrder; `intermediate` is one for each MLP

# hidden: what the next block reads, float32 [S, L, H]; exact: the same in the 16-bit model, with `correct`. solved: a
# row for each matrix so far, in the plan's order: relative error, damping, dead channels, 1 if no token reached it,
# share of the error in 4-bit strips, bytes. tuned: a row for each tuned block: the errors of Tuned.
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
        for name, least, usual in (("samples", 1, 32), ("length", 1, 512), ("seed", 0, 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_SEED:
                allowed = f"a whole number, {least} to {MAX_SEED}"
                raise SpecError(name, repr(value), allowed, f"leave it out for {usual}")


@dataclass(frozen=True)
class QuantizeReport:
    """What was done. average_bits: of the quantized matrices, counted from the bytes of all their tensors.

    model_bits: the same bytes for each weight that the model had before `max_tp` padded it. unseen: experts' matrices
    that no calibration token reached, rounded without feedback. padded: sizes that are larger now; filled: matrices
    whose input channels were filled up with zeros to whole blocks of 64, and how many were added. tuned: of every block
    that was tuned, the error of its outputs on held-out segments before and after; matrices' errors are those before.
    widest: input channels of the largest matrix; fewer calibration tokens say nothing of some of them. slow: matrices
    that no kernel reads on a processor, so that plain torch runs them, and why.
    """

    out: str
    average_bits: float
    model_bits: float
    matrices: Sequence[SolveReport]
    unseen: Sequence[str]
    padded: Mapping[str, int]
    filled: Mapping[str, int]
    tuned: Sequence[tuple[float, float]]
    widest: int
    slow: Mapping[str, str]


@dataclass(frozen=True)
class _Job:
    """One model, from `source` at its own sizes to `sizes`, which padding made larger, in its new order."""

    checkpoint: Checkpoint
    spec: QuantSpec | MixSpec
    recipe: MixRecipe
    samples: int  # segments that are learned from; those after them judge what tuning gained
    padding: Padding | None = None
    order: ModelOrder | None = None
    specs: Mapping[str, MixSpec] = field(default_factory=dict)  # of the matrices that differ from `spec`, by full name

    @property
    def plan(self) -> TPPlan:
        """The model as it is in the file."""
        return TPPlan(self.checkpoint.arch, self.checkpoint.sizes, lambda name: self.spec)

    @property
    def sizes(self) -> Shapes:
        return replace(self.checkpoint.sizes, **vars(self.padding)) if self.padding else self.checkpoint.sizes

    @property
    def padded_plan(self) -> TPPlan:
        """The model as it is quantized."""
        return replace(self.plan, sizes=self.sizes)

    @property
    def config_updates(self) -> dict[str, Any]:
        return self.padding.config_updates(self.checkpoint.arch, self.checkpoint.config) if self.padding else {}

    @property
    def fast(self) -> bool:
        """Whether bfloat16 is good enough for running the blocks."""
        if isinstance(self.spec, QuantSpec):
            return self.spec.bits < FLOAT32_BITS
        return (self.recipe.average_bits or sum(self.spec.widths) / len(self.spec.widths)) < FLOAT32_BITS

    @property
    def layout(self) -> GptqLayout | Mix64Layout:
        return Mix64Layout() if isinstance(self.spec, MixSpec) else _gptq_layout(self.spec)

    def edit(self, layer: int) -> BlockEdit:
        """What happens to a block's tensors before it is quantized."""
        edit = BlockEdit()
        if self.order:
            edit.order_block(self.plan, self.order, layer, self.checkpoint.names_in_block(layer))
        if self.padding:
            edit.pad(self.plan, self.padding, f"{self.checkpoint.arch.blocks}.{layer}.")
        return edit

    def read_block(self, layer: int) -> dict[str, torch.Tensor]:
        """A block's tensors by name, ordered and zero-padded, in the file's dtypes."""
        return self.edit(layer).apply_all(self.checkpoint.read(self.checkpoint.names_in_block(layer)))

    def read_outside(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors outside the blocks, ordered."""
        tensors, edit = self.checkpoint.read(names), BlockEdit()
        if self.order:
            edit.order_outside(self.order, tensors)
        return edit.apply_all(tensors)


def quantize(
    model: str | Path,
    out: Path,
    spec: QuantSpec | MixSpec,
    calibration: Calibration | None = None,
    recipe: MixRecipe | None = None,
    max_tp: int | None = None,
    progress: Progress = silent,
) -> QuantizeReport:
    """Quantize a 16-bit `model` (folder, .gguf file or hub id) into the new folder `out`; resumes an interrupted run.

    spec: a MixSpec writes `mix64`, a QuantSpec the public GPTQ format. recipe: left out, 2.91 bits on average for
    MixSpec(), plain GPTQ in natural order for GPTQ. Solved in float32, on a CUDA device where there is one; below 4
    bits blocks are run in bfloat16, where the device has it. max_tp: zero-pad MLP channels and whole KV groups until
    the matrices can be quantized and this tensor-parallel degree is legal; 1 is enough for odd sizes. Raises
    CheckpointError, FormatError, PlanError or SpecError before any work when something cannot be, SolverError with the
    matrix's name when numbers cannot; nothing is left under `out` then.
    """
    calibration = calibration or Calibration()
    recipe = recipe or _usual_recipe(spec)
    job = _prepare(resolve(str(model)), spec, recipe, calibration.samples, max_tp)
    text = calibration_text(calibration.path)
    tokens_SL = _segments(job.checkpoint, text, calibration, judges(job.samples) if recipe.tune else 0)
    provenance = {
        "source": _source_name(model),
        "quantizer": f"bitshard {__version__}",
        "calibration_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **{key: value for key, value in vars(calibration).items() if key != "path"},
        "recipe": vars(recipe),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = BlockwiseModel(job.checkpoint, job.sizes, job.config_updates, device, job.fast)
    provenance["bfloat16"] = blocks.bfloat16
    if recipe.average_bits:
        _budget(job, recipe.average_bits)  # refused here, before anything is written
    own = {key: value for key, value in vars(calibration).items() if key != "path"}
    task = Task(
        {
            "verb": "quantize", "layout": job.layout.name, **vars(spec), **vars(recipe), **own, "max_tp": max_tp,
            "device": device.type, "bfloat16": blocks.bfloat16, "bitshard": __version__,
            "format version": FORMAT_VERSION,
        },
        {
            "model": job.checkpoint.fingerprint(),
            "calibration text or tokenizer": hashlib.sha256(tokens_SL.numpy().tobytes()).hexdigest(),
        },
    )  # fmt: skip
    writer = Writer(out, [OUTSIDE, *map(block_shard, range(job.sizes.layers))], task, job.layout.name)
    if recipe.order == "model" or recipe.average_bits:
        order, activity = _order(job, writer, tokens_SL[: min(ORDER_SAMPLES, job.samples)], device, progress)
        if recipe.order == "model":
            job = replace(job, order=order)
            provenance["permutation_sha256"] = _digest(order)
        if recipe.average_bits:
            job = replace(job, specs=_allocate(job, activity, recipe.average_bits, progress))
    if not writer.has(OUTSIDE):
        writer.write(OUTSIDE, job.read_outside(job.checkpoint.names_outside_blocks()))
    done, state = _resume(job, blocks, tokens_SL, writer)
    label = f"quantizing, {done} of {job.sizes.layers} done before" if done else "quantizing"
    for layer in progress(range(done, job.sizes.layers), label):
        state = _quantize_block(job, blocks, writer, layer, state)
    section = {"version": FORMAT_VERSION, "layout": job.layout.name, "provenance": provenance}
    config = {**job.checkpoint.config, **job.config_updates}
    report = _report(job, out, state["solved"], state["tuned"])
    overrides = tuple((re.escape(name) + "$", {"fraction_4bit": own.fraction_4bit}) for name, own in job.specs.items())
    quantization = QuantConfig(spec, job.layout, overrides, section)
    errors = {m.name: m.relative_error for m in report.matrices}
    card = model_card(job.checkpoint.path, quantization, report.average_bits, errors)
    writer.finish(job.checkpoint.path, config, quantization.to_json(), _facts(job, report), card)
    return report


def _prepare(path: Path, spec: QuantSpec | MixSpec, recipe: MixRecipe, samples: int, max_tp: int | None = None) -> _Job:
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantization is not None:
        raise FormatError(
            str(path), "a quantized checkpoint", "a 16-bit model", "start from the model it was made from"
        )
    job = _Job(checkpoint, spec, recipe, samples)
    checkpoint.plan()  # refuses a matrix that is missing or has other sizes than config.json gives it
    if max_tp is not None:
        job = replace(job, padding=padding_for(job.plan, max_tp))
    recipe.check(spec)
    if isinstance(spec, QuantSpec):
        _check_gptq(job, spec)
    job = replace(job, checkpoint=own_tensors(checkpoint))
    if recipe.order == "model":
        _require_orderable(job.checkpoint)
    return job


def _require_orderable(checkpoint: Checkpoint) -> None:
    """Whatever lies outside the blocks has the residual stream's channels in its last dimension, or none at all."""
    hidden = checkpoint.sizes.hidden
    for name, shape in checkpoint.shapes(checkpoint.names_outside_blocks()).items():
        if shape and shape[-1] != hidden:
            raise FormatError(
                f"{checkpoint.files[name]}: {name}", f"shape {shape}",
                f"{hidden} channels in the last dimension, which are put in order",
                "take the tensor out, or leave channels in the file's order: --order none",
            )  # fmt: skip


def _check_gptq(job: _Job, spec: QuantSpec) -> None:
    """Every matrix can be cut into groups and packed into words, or SpecError with its name."""
    if spec.desc_act and job.recipe.order == "model":
        raise SpecError(
            "desc_act", "true with order model", "one of the two: an ordered model needs no act_order", "leave one out"
        )
    word = codes_per_pack(spec.bits)
    for name, linear in job.padded_plan.linears(0):
        k, n = linear.in_features, linear.out_features
        for size, what, unit, unit_name, fix in (
            (k, "input", spec.group(k), "groups", "choose a group_size that divides it, for example 32 or -1"),
            (k, "input", word, f"words of {spec.bits}-bit codes", "choose other bits"),
            (n, "output", word, f"words of {spec.bits}-bit zeros", "choose other bits"),
        ):
            # what lies between two matrices can be padded, the residual stream cannot
            padded = job.padding is None and (what == "input") == (linear.role == "row")
            if size % unit:
                fix += " or zero-pad the model (`--max-tp 1`)" if padded else ""
                raise SpecError(name, f"{size} {what} channels", f"whole {unit_name}, of {unit}", fix)


def _segments(checkpoint: Checkpoint, text: str, calibration: Calibration, more: int = 0) -> torch.Tensor:
    """Token ids [S, L] of the chosen segments, and of `more`."""
    samples, length = calibration.samples + more, calibration.length
    limit = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions", length))
    if length > limit:
        raise SpecError("length", f"{length} tokens", f"{limit}, the model's longest", "ask for fewer")
    tokenizer = load_tokenizer(checkpoint.path)
    tokens = torch.tensor(encode(tokenizer, text), dtype=torch.int64)
    first = torch.tensor(tokens_before(tokenizer), dtype=torch.int64)  # Gemma is lost without its <bos>
    own = length - len(first)
    if own < 1:
        raise SpecError(
            "calibration", f"segments of {length} tokens", f"{len(first) + 1} or more: the tokenizer puts {len(first)} "
            "before a text", "ask for more",
        )  # fmt: skip
    count = len(tokens) // own
    if count < samples:
        raise SpecError(
            str(calibration.path or "calibration"), f"a text of {len(tokens)} tokens, {count} segments of {length}",
            f"at least {samples} segments", "pass a longer text, or ask for fewer samples or a smaller length",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(calibration.seed)
    chosen = torch.randperm(count, generator=generator)[:samples] if calibration.seed else torch.arange(samples)
    segments_SL = torch.cat([first.expand(count, -1), tokens[: count * own].view(count, own)], dim=1)[chosen]
    largest = max(int(segments_SL.max()), tokenizer.vocab_size - 1)  # what was added later may never be used
    vocabulary = checkpoint.config.get("vocab_size", largest + 1)
    if largest >= vocabulary:
        raise CheckpointError(
            str(checkpoint.path), f"a tokenizer with tokens up to {largest}",
            f"0 to {vocabulary - 1}, as the model has them", "copy the model's own tokenizer files there",
        )  # fmt: skip
    unknown = float((segments_SL == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0
    if unknown > MOST_UNKNOWN:
        raise CheckpointError(
            str(checkpoint.path), f"a tokenizer that does not know {unknown:.0%} of the calibration text",
            f"at most {MOST_UNKNOWN:.0%}", "copy the model's own tokenizer files there, or pass a text that it reads",
        )  # fmt: skip
    return segments_SL


def _order(
    job: _Job, writer: Writer, tokens_SL: torch.Tensor, device: torch.device, progress: Progress
) -> tuple[ModelOrder, dict[str, torch.Tensor]]:
    """The model's order and its matrices' activity, as an earlier run found them or found now."""
    if not (writer.partial / ORDER_FILE).exists():
        mixed = isinstance(job.spec, MixSpec)
        model = BlockwiseModel(job.checkpoint, job.checkpoint.sizes, {}, device, job.fast)
        order, activity = choose_order(model, tokens_SL, job.recipe.ranking, mixed, progress)
        found = {name: getattr(order, name) for name in ORDERS}
        found |= {f"intermediate/{row}": perm_I for row, perm_I in order.intermediate.items()}
        writer.write_state(ORDER_FILE, found | {f"activity/{name}": active_K for name, active_K in activity.items()})
    tensors = load_file(writer.partial / ORDER_FILE)
    parts: dict[str, dict[str, torch.Tensor]] = {"intermediate": {}, "activity": {}}
    for kind, named in parts.items():
        named |= {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}
    order = ModelOrder(intermediate=parts["intermediate"], **{name: tensors[name] for name in ORDERS})
    order.check(job.checkpoint.arch, job.checkpoint.sizes)
    return order, parts["activity"]


def _allocate(
    job: _Job, activity: Mapping[str, torch.Tensor], average_bits: float, progress: Progress
) -> dict[str, MixSpec]:
    """How much of each matrix gets 4 bits, so that the sum of relative errors is least within the average."""
    errors, (sizes, budget) = [], _budget(job, average_bits)
    for layer in progress(range(job.sizes.layers), "allocating"):
        tensors, edit = job.read_block(layer), job.edit(layer)
        for name, linear in job.padded_plan.linears(layer):
            W_NK = tensors[f"{name}.weight"][:: ceil(linear.out_features / ALLOCATE_ROWS)].float()
            active_K = activity[name][edit.rows[name]] if name in edit.rows else activity[name]
            stored = ceil(linear.in_features / BLOCK) * BLOCK
            W_NK, active_K = (F.pad(values, (0, stored - values.shape[-1])) for values in (W_NK, active_K))
            errors.append(relative_errors(W_NK, active_K))
        trim()
    chosen = spend(errors, list(sizes.values()), budget)
    return {name: _with_fraction(job, FRACTIONS[choice]) for name, choice in zip(sizes, chosen, strict=True)}


def _with_fraction(job: _Job, fraction_4bit: float) -> MixSpec:
    assert isinstance(job.spec, MixSpec)
    return replace(job.spec, fraction_4bit=fraction_4bit)


def _budget(job: _Job, average_bits: float) -> tuple[dict[str, list[int]], int]:
    """Bytes of each matrix by its fraction of 4-bit strips, in FRACTIONS' order, and how many all may have together.

    So many for each weight; by default, where blocks that are filled up leave no room for that, for each of their
    places. Raises SpecError when the smallest ones are too many.
    """
    sizes, weights, places = {}, 0, 0
    for layer in range(job.sizes.layers):
        for name, linear in job.padded_plan.linears(layer):
            k, n = linear.in_features, linear.out_features
            sizes[name] = [_bytes(_with_fraction(job, fraction), job.recipe, k, n) for fraction in FRACTIONS]
            weights += k * n
            places += ceil(k / BLOCK) * BLOCK * n
    least, budget = sum(map(min, sizes.values())), int(average_bits * weights / 8)
    if least > budget and average_bits == MIX_RECIPE.average_bits:
        budget = int(average_bits * places / 8)
    if least > budget:
        default = ", the default" if average_bits == MIX_RECIPE.average_bits else ""
        raise SpecError(
            "average_bits", f"{average_bits:g}{default}", f"{ceil(8e3 * least / weights) / 1e3:.3f} or more",
            "allow so many" + (", or fewer outliers" if job.recipe.outliers else ""),
        )  # fmt: skip
    return sizes, budget


def _bytes(spec: MixSpec, recipe: MixRecipe, in_features: int, out_features: int) -> int:
    """Of all tensors of one matrix as this recipe fills it."""
    size = spec.code_bytes(in_features, out_features) + spec.scale_bytes(in_features, out_features)
    if recipe.outliers and 2 in spec.widths:
        size += 4 * round(recipe.outliers * in_features * out_features) + 4 * (out_features + 1)
    if recipe.order == "none" and len(set(spec.widths)) > 1:
        size += 2 * spec.blocks(in_features) * BLOCK // STRIP
    return size


def _digest(order: ModelOrder) -> str:
    digest = hashlib.sha256()
    for perm in (*(getattr(order, name) for name in ORDERS), *(p for _, p in sorted(order.intermediate.items()))):
        digest.update(perm.numpy().tobytes())
    return digest.hexdigest()


def _resume(job: _Job, model: BlockwiseModel, tokens_SL: torch.Tensor, writer: Writer) -> tuple[int, State]:
    """How many blocks an earlier run finished, and the state that the next one starts from."""
    hidden_SLH = model.embed(tokens_SL, job.read_outside)
    done = _blocks_done(writer, job.sizes.layers)
    if done:
        # cloned: where a mapped tensor lies, and so the last bit of a product, differs from the uninterrupted run's
        return done, {name: tensor.clone() for name, tensor in load_file(writer.partial / _state(done)).items()}
    facts = {"solved": torch.empty(0, 6, dtype=torch.float64), "tuned": torch.empty(0, 2, dtype=torch.float64)}
    return 0, {"hidden": hidden_SLH, **facts} | ({"exact": hidden_SLH} if job.recipe.correct else {})


def _state(layer: int) -> str:
    """The file with the inputs of a block, and what is known of the matrices before it."""
    return f"inputs-{layer}.safetensors"


def _blocks_done(writer: Writer, layers: int) -> int:
    """Up to the last state there is; that of the first missing shard, unless it or an earlier shard was damaged."""
    shards = next((layer for layer in range(layers) if not writer.has(block_shard(layer))), layers)
    return next((done for done in range(shards, 0, -1) if (writer.partial / _state(done)).exists()), 0)


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
    tensors, rows, after = job.read_block(layer), dict[str, list[float]](), dict(state)
    arch = job.checkpoint.arch
    model.load(layer, tensors)
    exact: dict[str, list[torch.Tensor]] = {}
    if job.recipe.correct:
        exact, after["exact"] = _run_exact(model, layer, state["exact"])
        require_finite(f"{arch.blocks}.{layer}: outputs", after["exact"])
    learned_SLH, known = state["hidden"][: job.samples], dict[str, torch.Tensor]()
    untuned, originals = dict[str, MixedWeight](), dict[str, torch.Tensor]()  # kept for tuning alone

    def store(name: str, weight: QuantizedWeight | MixedWeight) -> None:
        full, packed = f"{arch.blocks}.{layer}.{name}", _pack(weight)
        tensors.update({f"{full}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()})
        rows[full].append(sum(tensor.nbytes for tensor in packed.values()))

    for stage in _stages(arch, job.sizes):
        trim()
        hessians = _hessians(model, layer, learned_SLH, [names[0] for names in stage], exact, known)
        for names in stage:
            hessian = hessians.pop(0)
            linears = [model.linear(layer, name) for name in names]
            wanted_NK = hessian.corrected(torch.cat([linear.weight for linear in linears]))
            wanted = torch.split(wanted_NK, [linear.out_features for linear in linears])
            H_KK, reached = hessian.matrix(), hessian.count > 0
            del hessian  # solving takes two to four matrices as large
            for name, linear, W_NK in zip(names, linears, wanted, strict=True):
                full = f"{arch.blocks}.{layer}.{name}"
                weight, dequantized, report = _solve(job, W_NK, H_KK, full)
                linear.weight.copy_(dequantized)
                original = tensors.pop(f"{full}.weight")
                rows[full] = [report.relative_error, report.damp, report.dead, not reached, report.share_4bit]
                if job.recipe.tune and isinstance(weight, MixedWeight):
                    untuned[name], originals[name] = weight, original
                else:
                    store(name, weight)
        del H_KK, wanted_NK, wanted, W_NK
    if job.recipe.tune:
        known = {}  # down's inputs will be others
        parameters = {name: model.linear(layer, name).weight for name in untuned}
        run, targets_SLH = partial(model.run_some, layer), after["exact"]
        tuned = tune(untuned, originals, parameters, run, state["hidden"], targets_SLH, job.samples, job.recipe.tune)
        for name, weight in tuned.weights.items():
            store(name, weight)
        after["tuned"] = torch.cat([state["tuned"], torch.tensor([[tuned.before, tuned.after]], dtype=torch.float64)])
    after["hidden"] = model.run(layer, state["hidden"], known=known)
    require_finite(f"{arch.blocks}.{layer}: quantized outputs", after["hidden"])
    model.unload(layer)
    solved = torch.tensor([rows[name] for name, _ in job.plan.linears(layer)], dtype=torch.float64)
    after["solved"] = torch.cat([state["solved"], solved])
    writer.write_state(_state(layer + 1), after)
    writer.write(block_shard(layer), tensors)
    (writer.partial / _state(layer)).unlink(missing_ok=True)
    return after


def _outside_experts(arch: Architecture) -> tuple[list[str], list[str]]:
    """Column matrices, one for all with the same input, and row matrices that every token reaches."""
    columns, rows = [arch.attention.column[0]], [arch.attention.row]
    if not arch.mlp.experts:
        columns.append(arch.mlp.column[0])
        rows.append(arch.mlp.row)
    return columns, rows


def _run_exact(
    model: BlockwiseModel, layer: int, hidden_SLH: torch.Tensor
) -> tuple[dict[str, list[torch.Tensor]], torch.Tensor]:
    """What the 16-bit block's matrices are given, or for row matrices give, segment by segment, and its outputs.

    Nothing of experts: which tokens reach one differs between the two models.
    """
    columns, rows = _outside_experts(model.arch)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in (*columns, *rows)}

    def keep_output(name: str) -> Watcher:
        bias_N = model.linear(layer, name).bias
        return lambda y: seen[name].append(y if bias_N is None else y - bias_N)

    hidden_SLH = model.run(
        layer, hidden_SLH, {name: seen[name].append for name in columns}, {name: keep_output(name) for name in rows}
    )
    return seen, hidden_SLH


def _hessians(
    model: BlockwiseModel,
    layer: int,
    hidden_SLH: torch.Tensor,
    names: Sequence[str],
    exact: dict[str, list[torch.Tensor]],
    known: dict[str, torch.Tensor],
) -> list[Hessian]:
    """One Hessian for the inputs of each named matrix, with what the 16-bit model had there. Adds to `known`."""
    rows, hessians, watch = _outside_experts(model.arch)[1], [], {}
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names if name in rows}

    def watcher(name: str, hessian: Hessian) -> Watcher:
        others, weight_NK = iter(exact.pop(name, ())), model.linear(layer, name).weight

        def see(x: torch.Tensor) -> None:
            other = next(others, None)
            if other is None:
                hessian.add(x)
            else:  # the last ones may have more segments
                hessian.add(x, other[: len(x)] - (F.linear(x, weight_NK) if name in rows else x))
            if name in seen:
                seen[name].append(x)

        return see

    for name in names:
        drift_of = "outputs" if name in rows else "inputs"
        hessians.append(Hessian(model.linear(layer, name).in_features, model.device, drift_of))
        watch[name] = watcher(name, hessians[-1])
    model.run_as_far_as(layer, hidden_SLH, watch, known)
    known |= {name: torch.cat(parts) for name, parts in seen.items()}
    return hessians


def _solve(
    job: _Job, W_NK: torch.Tensor, H_KK: torch.Tensor, name: str
) -> tuple[QuantizedWeight | MixedWeight, torch.Tensor, SolveReport]:
    """One matrix: its logical value, what that dequantizes to [N, K], and how it went."""
    if isinstance(job.spec, MixSpec):
        mixed, report = solve_mixed(W_NK, H_KK, job.specs.get(name, job.spec), job.recipe, name)
        return mixed, mixed.dequantize(), report
    weight, report = gptq(W_NK, H_KK, job.spec, name, job.recipe.damp)
    return weight, weight.dequantize().T, report


def _pack(weight: QuantizedWeight | MixedWeight) -> dict[str, torch.Tensor]:
    return Mix64Layout().pack(weight) if isinstance(weight, MixedWeight) else _gptq_layout(weight.spec).pack(weight)


def _report(job: _Job, out: Path, solved: torch.Tensor, tuned: torch.Tensor) -> QuantizeReport:
    linears = [pair for layer in range(job.sizes.layers) for pair in job.padded_plan.linears(layer)]
    rows = list(zip((name for name, _ in linears), solved.tolist(), strict=True))
    own = [pair for layer in range(job.sizes.layers) for pair in job.plan.linears(layer)]
    weights, own_weights = (sum(m.in_features * m.out_features for _, m in some) for some in (linears, own))
    bits = 8 * float(solved[:, 5].sum())
    grown = job.padding is not None and job.sizes != job.checkpoint.sizes
    fill = {name: -linear.in_features % BLOCK for name, linear in linears}
    return QuantizeReport(
        out=str(out),
        average_bits=bits / weights,
        model_bits=bits / own_weights,
        matrices=[SolveReport(name, error, damp, int(dead), share) for name, (error, damp, dead, _, share, _) in rows],
        unseen=[name for name, (_, _, _, unseen, _, _) in rows if unseen],
        padded=vars(job.padding) if grown else {},
        filled={name: count for name, count in fill.items() if count and isinstance(job.spec, MixSpec)},
        tuned=[(before, after) for before, after in tuned.tolist()],
        widest=max(linear.in_features for _, linear in linears),
        slow={name: why for name, linear in linears if (why := why_not_read(job.spec, linear.in_features, "cpu"))},
    )


def _facts(job: _Job, report: QuantizeReport) -> dict[str, dict[str, float]]:
    """What `inspect` shows of each matrix and no tensor says."""
    layers = [layer for layer in range(job.sizes.layers) for _ in job.plan.linears(layer)]
    facts: dict[str, dict[str, float]] = {}
    for layer, m in zip(layers, report.matrices, strict=True):
        # of a tuned block only its own error is known: its matrices have others than they were solved with
        facts[m.name] = {"block_error": report.tuned[layer][1]} if report.tuned else {"error": m.relative_error}
        if isinstance(job.spec, MixSpec):
            facts[m.name]["share_4bit"] = m.share_4bit
    return facts


def _usual_recipe(spec: QuantSpec | MixSpec) -> MixRecipe:
    if isinstance(spec, QuantSpec):
        return GPTQ_RECIPE
    return MIX_RECIPE if spec == MixSpec() else MixRecipe()


def _gptq_layout(spec: QuantSpec) -> GptqLayout:
    """Version 1 where every reader agrees on it; asymmetric zeros need all their range, which only version 2 stores."""
    return GptqLayout(1 if spec.sym else 2)


def _source_name(model: str | Path) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)
