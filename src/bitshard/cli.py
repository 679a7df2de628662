"""The command line: arguments in, one library call, a table or JSON out. Exit codes: 0 done, 1 failed, 2 usage.

Results go to stdout, progress and errors to stderr. Every command imports what it needs itself, so `--help` is quick.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from bitshard import __version__
from bitshard.errors import BitshardError, CheckpointError, SpecError
from bitshard.spec import MAX_SEED

if TYPE_CHECKING:
    from bitshard.evaluate import Perplexity
    from bitshard.inspection import Inspection
    from bitshard.planning import ModelPlan

T = TypeVar("T")
HELP = """Low-bit language models, ordered so that tensor parallelism costs nothing at run time.

Results on stdout, progress and errors on stderr.

Exit codes: 0 done, 1 refused, failed or interrupted, 2 not understood."""
SECONDS_BETWEEN_LINES = 30  # of progress, where stderr is no terminal
INTERRUPTED = 130  # what typer makes of Ctrl-C
ZEROS = {1: "stored minus one (v1)", 2: "stored as they are (v2)"}
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
bench_app = typer.Typer(no_args_is_help=True, help="Measure; refuses to time what fails its check.")
app.add_typer(bench_app, name="bench")
# names and texts of others are printed as they are: a bracket or a colon in them is no markup
out_console, err_console = (Console(stderr=stderr, markup=False, emoji=False) for stderr in (False, True))

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Strategy = Annotated[str, typer.Option(help="How ranks meet: naive, local-sort or tp-aware.")]
KERNELS = ("cpu-int8", "cpu", "decode", "triton", "reference")  # bitshard.kernels', which imports torch
Backend = Annotated[str, typer.Option(help=f"exact; auto, with 8-bit activations; or a kernel: {', '.join(KERNELS)}.")]
Bits = Annotated[int | None, typer.Option(help="2, 3, 4 or 8 (default: mix64 2, gptq 4).")]
Fraction4Bit = Annotated[float | None, typer.Option(help="mix64: 4-bit strips of every matrix, 0, 0.25, 0.5 or 1.")]
Metadata = Annotated[str | None, typer.Option(help="mix64: fine or paper (default: fine).")]
GroupSize = Annotated[int | None, typer.Option(help="gptq: input channels per scale; -1 for all (default: 128).")]
Tp = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree: how many ranks to start.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point: errors the user can act on become one sentence and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too: in a log they are one long line
    try:
        app()
    except SpecError as error:
        _fail(_options_named(error))
    except BitshardError as error:
        _fail(str(error))
    except SystemExit as end:
        if end.code == INTERRUPTED:
            goes_on = not {"quantize", "convert"}.isdisjoint(sys.argv[1:2])
            kept = "; what was finished is kept: run the same command again to go on"
            _fail(f"interrupted{kept if goes_on else ''}")
        raise


def _patient() -> None:
    """Let torch's threads sleep instead of spin for each other, which is only read before torch is there.

    On cores that others use too, quantizing a small model took 8 times as long with spinning threads. Generating, whose
    products take microseconds, keeps them: asleep they cost a sixth of its speed.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _options_named(error: SpecError) -> str:
    """Its sentence with fields of a specification under the names that they have here: fraction_4bit, --fraction-4bit.

    Only where a field is spoken of: in no path and no text of the user's, and a plain word like bits at its head alone.
    """
    commands = {**typer.main.get_group(app).commands, **typer.main.get_group(bench_app).commands}
    options = {
        name: {p.name for p in command.params if p.name and p.param_type_name == "option"}
        for name, command in commands.items()
    }
    fields = set().union(*options.values())
    words = "|".join(field for field in sorted(fields) if "_" in field)

    def named(text: str) -> str:
        return re.sub(rf"(?<![\w/.'-])({words})(?![\w/.'-])", lambda found: f"--{found[0].replace('_', '-')}", text)

    known = error.where in fields
    where, found = (named(error.where), named(error.found)) if known else (error.where, error.found)
    if any(where in options.get(word, ()) for word in sys.argv[1:3]):
        where = f"--{where}"
    return str(SpecError(where, found, named(error.allowed), named(error.fix)))


def _fail(sentence: str) -> None:
    print(f"bitshard: {sentence}", file=sys.stderr)
    sys.exit(1)


def _progress(items: Sequence[T], label: str, /) -> Iterable[T]:
    """A bar with time left on stderr, lines where that is no terminal; see bitshard.progress.Progress."""
    if not err_console.is_terminal:
        yield from _lines(items, label)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    # time left from all steps so far: one of a large model takes longer than the 30 s that rich looks back
    with Bars(*columns, TimeRemainingColumn(), console=err_console, speed_estimate_period=float("inf")) as bars:
        yield from bars.track(items, description=label)


def _lines(items: Sequence[T], label: str) -> Iterable[T]:
    """A line at the end, and before it as often as a log can bear."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= SECONDS_BETWEEN_LINES:
            left = timedelta(seconds=round((now - start) / done * (len(items) - done)))
            print(f"{label} {done}/{len(items)} {timedelta(seconds=round(now - start))} left {left}", file=sys.stderr)
            last = now
        yield item
    taken = timedelta(seconds=round(time.monotonic() - start))
    print(f"{label} {len(items)}/{len(items)} {taken}", file=sys.stderr)


def _emit(result: Any, as_json: bool, *renderables: Any) -> None:
    """A dataclass as JSON, or what stands for it in a terminal."""
    try:
        if as_json:
            value = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
            print(json.dumps(value, indent=1))
        else:
            for renderable in renderables:
                out_console.print(renderable, soft_wrap=isinstance(renderable, str), highlight=False)
        print(end="", flush=True)
    except BrokenPipeError:  # whoever reads wants no more
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or leaving Python tries once more
        raise CheckpointError(
            "stdout", f"{error.strerror}, when all work was done", "room for the result", "print it somewhere else"
        ) from None


def _facts(title: str, facts: Mapping[str, object]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", box=box.SIMPLE)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def _columns(title: str | None, *names: str, left: Sequence[str] = ()) -> Table:
    """A narrow table: numbers to the right, the columns named in `left` to the left."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="16-bit HF folder, .gguf file or hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    format: Annotated[str, typer.Option(help="mix64 or gptq.")] = "mix64",
    bits: Bits = None,
    fraction_4bit: Fraction4Bit = None,
    average_bits: Annotated[
        float | None,
        typer.Option(help="mix64: choose that fraction for each matrix, within these bits in all (default: 2.91)."),
    ] = None,
    outliers: Annotated[
        float | None, typer.Option(help="mix64: share of weights kept in 16 bits (default: 0).")
    ] = None,
    metadata: Metadata = None,
    order: Annotated[str | None, typer.Option(help="model or none (default: mix64 model, gptq none).")] = None,
    ranking: Annotated[str | None, typer.Option(help="mix64: hessian or range (default: hessian).")] = None,
    ranges: Annotated[str | None, typer.Option(help="mix64: search or minmax (default: search).")] = None,
    correct: Annotated[
        bool | None,
        typer.Option("--correct/--no-correct", help="Make up for earlier blocks (default: mix64 yes, gptq no)."),
    ] = None,
    damp: Annotated[
        float | None,
        typer.Option(
            help="0 to 1: of the mean activity, added to each channel's in rounding (default: mix64 0.05, gptq 0.01)."
        ),
    ] = None,
    tune: Annotated[
        int | None, typer.Option(help="mix64: steps of tuning each block; try twice the samples (default: 0).")
    ] = None,
    group_size: GroupSize = None,
    desc_act: Annotated[bool | None, typer.Option("--desc-act", help="gptq: group by falling sensitivity.")] = None,
    static_groups: Annotated[bool | None, typer.Option("--static-groups", help="gptq: fix groups first.")] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="gptq: zero point in the middle (default: yes).")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="paper-v1 or paper-v4 of 2311.16442, instead of options.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text, or JSON lines with `text` (default: wiki text of the package exllamav3).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration segments.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in a segment.")] = 512,
    seed: Annotated[int, typer.Option(help="0: the first segments; else a random choice.", min=0, max=MAX_SEED)] = 0,
    max_tp: Annotated[int | None, typer.Option(help="Zero-pad until this degree is legal; 1 for odd sizes.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize a 16-bit model, one decoder block in memory; an interrupted run goes on where it stopped."""
    _patient()
    from bitshard.pipeline import Calibration
    from bitshard.pipeline import quantize as run
    from bitshard.sources import packaged_text
    from bitshard.spec import requested

    spec, how = requested(
        format,
        recipe,
        {
            "bits": bits, "fraction_4bit": fraction_4bit, "metadata": metadata, "outliers": outliers, "order": order,
            "ranking": ranking, "ranges": ranges, "correct": correct, "group_size": group_size, "sym": sym,
            "desc_act": desc_act, "static_groups": static_groups, "average_bits": average_bits, "tune": tune,
            "damp": damp,
        },
    )  # fmt: skip
    segments = Calibration(calibration, samples, length, seed)
    if calibration is None:
        packaged_text()  # missing, it is refused before the model is read
        print("calibrating with wiki text of the package exllamav3; --calibration takes your own", file=sys.stderr)
    report = run(model, out, spec, segments, how, max_tp, _progress)
    worst = sorted(report.matrices, key=lambda m: m.relative_error, reverse=True)[:5]
    when = " before tuning" if report.tuned else ""
    title = f"{out}: {report.average_bits:.3f} bits, {len(report.matrices)} matrices, the worst five{when}"
    table = _columns(title, "matrix", "relative output error", left=["matrix"])
    for matrix in worst:
        table.add_row(matrix.name, f"{matrix.relative_error:.2e}")
    notes = [f"no calibration token reached {name}: rounded without feedback" for name in report.unseen]
    if report.padded:
        sizes = ", ".join(f"{name} {size}" for name, size in report.padded.items())
        notes.append(f"padded with zeros to {sizes}: {report.model_bits:.3f} bits for each weight that the model had")
    if report.filled:
        counts = sorted(set(report.filled.values()))
        notes.append(
            f"input channels of {len(report.filled)} matrices filled up to whole blocks of 64, with "
            f"{' or '.join(map(str, counts))} zero channels that the kernel never sees"
        )
    if report.tuned:
        before, after = (sum(errors) / len(report.tuned) for errors in zip(*report.tuned, strict=True))
        gained = f"took {1 - after / before:.1%} off" if after < before else "gained nothing and left"
        notes.append(f"tuning {gained} the error of blocks' outputs on held-out text: {before:.3e} to {after:.3e}")
    tokens, widest = samples * length, report.widest
    if tokens < widest:
        notes.append(
            f"{tokens:,} calibration tokens are fewer than the {widest:,} channels that the largest matrix reads: "
            f"expect it to be much worse than with --samples {-(-2 * widest // length)} and more"
        )
    for why, count in Counter(report.slow.values()).items():
        notes.append(f"on a processor plain torch runs {count} of {len(report.matrices)} matrices: {why}")
    for note in notes if as_json else ():  # JSON has the facts, but not what they mean
        print(note, file=sys.stderr)
    then = f"bitshard convert {out} {out}-tp" if desc_act else f"bitshard inspect {out}"
    _emit(report, as_json, table, *notes, f"next: {then}")


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="GPTQ folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    pad_to: Annotated[int | None, typer.Option(help="Zero-pad until this degree is legal.")] = None,
    as_json: Json = False,
) -> None:
    """Reorder a GPTQ checkpoint for tensor parallelism: the same codes, no gather inside the MLP."""
    from bitshard.convert import convert as run
    from bitshard.sources import resolve

    report = run(resolve(checkpoint), out, pad_to, _progress)
    kept = list(report.kept.items())
    facts: dict[str, object] = {
        "MLPs reordered": report.mlps_reordered,
        "attentions reordered": report.attentions_reordered,
        "legal TP degrees": ", ".join(map(str, report.degrees)),
        "gathers of a norm's output": f"{report.input_gathers}, each on its own rank, without a collective",
        "desc_act": report.desc_act,
    }
    if report.padded:
        facts["padded to"] = ", ".join(f"{k} {v}" for k, v in report.padded.items())
    if kept:
        cost = ", ".join(f"{_size(b)} at TP {t}" for t, b in kept[0][1].items() if t > 1)
        facts["keep a local order"] = f"{len(kept)} output projections, {kept[0][0]} first; no collective comes of it"
        facts["which costs each"] = f"{cost or 'nothing at TP 1'} a rank, of repeated scales and zeros"
    _emit(report, as_json, _facts(str(out), facts), f"next: bitshard verify {out} --against {checkpoint}")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Quantized folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="gptq or compressed-tensors.")] = "gptq",
    as_json: Json = False,
) -> None:
    """The same weights, exactly, for engines that know nothing of us; what a format cannot hold is refused by name."""
    from bitshard.export import export as run
    from bitshard.sources import resolve

    report = run(resolve(checkpoint), out, to, _progress)
    engine = {"gptq": "GPTQModel", "compressed-tensors": "vLLM"}[to]
    said = f"{out}: {report.matrices} matrices as {to}, {report.average_bits:.2f} bits; {engine} runs it as it is"
    _emit(report, as_json, said)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id; config.json is enough.")],
    format: Annotated[str, typer.Option(help="mix64 or gptq, to plan a 16-bit model with.")] = "mix64",
    bits: Bits = None,
    fraction_4bit: Fraction4Bit = None,
    metadata: Metadata = None,
    group_size: GroupSize = None,
    pad: Annotated[int | None, typer.Option(help="Show the zero-padding that makes this degree legal.")] = None,
    gb_per_s: Annotated[float | None, typer.Option(help="Memory bandwidth of one device, for the time floor.")] = None,
    as_json: Json = False,
) -> None:
    """A dry run from shapes alone: bits, bytes per rank, legal TP degrees and why the others are not."""
    from bitshard.plan import how_to_pad
    from bitshard.planning import plan_model
    from bitshard.sources import resolve
    from bitshard.spec import QuantSpec, requested

    options = {"bits": bits, "fraction_4bit": fraction_4bit, "metadata": metadata, "group_size": group_size}
    spec, _ = requested(format, None, options)
    report = plan_model(resolve(model, weights=False), spec, pad, gb_per_s)
    if report.quantized and (format != "mix64" or any(value is not None for value in options.values())):
        print(f"{model} is quantized already: planned as it is, without these options", file=sys.stderr)
    notes = _not_legal(report)
    if pad and report.padding and report.padding_cost is not None:
        sizes = ", ".join(f"{k} {v}" for k, v in report.padding.items())
        notes.append(
            f"padded to {sizes}, TP {pad} is legal; {report.padding_cost:+.1%} bytes. "
            f"Do it: {how_to_pad(report.spec, pad) if report.quantized else f'`quantize --max-tp {pad}`'}"
        )
    if report.gathered:
        cure = "`bitshard convert` reorders the MLPs'" if isinstance(report.spec, QuantSpec) else "they cannot be cut"
        notes.append(f"{len(report.gathered)} row matrices want their input in another order; {cure}")
    facts = ", ".join(f"{name} {value}" for name, value in report.spec.facts().items())
    counted = f"{report.average_bits:.2f} bits with scales and zeros; no embeddings, no g_idx"
    _emit(report, as_json, f"{model}: {report.layers} blocks, {facts}", counted, _plan_table(report), *notes)


def _plan_table(report: ModelPlan) -> Table:
    """The legal degrees."""
    table = _columns(None, "TP", "weights/rank", "floor/token", "AllReduce/token, 16 bits")
    for degree in report.degrees:
        if not degree.obstacles:
            floor = "-" if degree.floor_ms is None else f"{degree.floor_ms:.3g} ms"
            traffic = f"{degree.allreduces} x {_size(degree.allreduce_bytes / max(degree.allreduces, 1))}"
            table.add_row(str(degree.tp_size), _size(degree.bytes_per_rank or 0), floor, traffic)
    return table


def _not_legal(report: ModelPlan) -> list[str]:
    """A line for each reason that comes first at some degrees; --json has all of them."""
    reasons: dict[str, list[str]] = {}
    for degree in report.degrees:
        for obstacle in degree.obstacles[:1]:
            reason = re.sub(rf"(by|/) {degree.tp_size}\b", r"\1 TP", _below_block(obstacle))
            reasons.setdefault(reason, []).append(str(degree.tp_size))
    return [f"not legal: TP {', '.join(degrees)}; {reason}" for reason, degrees in reasons.items()]


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Quantized folder or hub id.")],
    layers: Annotated[bool, typer.Option("--layers", help="Every matrix, not one line for each kind.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw a heat map, layers x linears.")] = None,
    as_json: Json = False,
) -> None:
    """What a checkpoint says it is: method, layout, order, sizes, TP degrees, provenance."""
    from bitshard.inspection import draw
    from bitshard.inspection import inspect as run
    from bitshard.sources import resolve

    report = run(resolve(checkpoint))
    if picture:
        picture = draw(report, picture)
    facts = {
        "model": report.model_type,
        "method, layout": f"{report.method}, {report.layout} version {report.version}",
        **({"zeros": ZEROS[report.zeros_version]} if report.zeros_version else {}),
        "spec": _settings(report.spec),
        "average bits": f"{report.average_bits:.3f}, everything counted",
        **({"order": report.matrices[0].order} if len({m.order for m in report.matrices}) == 1 else {}),
        **({"outliers": f"{report.outlier_share:.3%} of the weights"} if report.outlier_share else {}),
        "legal TP degrees": ", ".join(map(str, report.degrees)),
        "kernels": _kernels(report),
        **{f"from: {k}": _origin(v) for k, v in report.provenance.items()},
    }
    drawn = [f"picture: {picture}"] if picture else []
    _emit(report, as_json, _facts(report.path, facts), _matrix_table(report, layers), *drawn)


def _kernels(report: Inspection) -> str:
    """Which run on this machine, and why plain torch where it does."""
    counts = Counter((m.kernel, m.prompt_kernel, m.slow) for m in report.matrices)
    found = []
    for (kernel, prompt_kernel, slow), count in counts.items():
        of = f" for {count} matrices" if len(counts) > 1 else ""
        prompts = f", {prompt_kernel} for long prompts" if prompt_kernel != kernel else ""
        found.append(f"{kernel}{of}{prompts}{slow and f': {slow}'}")
    return "; ".join(found)


def _origin(value: object) -> object:
    """A fact of the provenance as a line has room for it; --json has every digit of a hash."""
    if isinstance(value, dict):
        return _settings(value)
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else _said(value)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_said(value)}" for name, value in values.items() if value is not None)


def _said(value: object) -> object:
    return ("no", "yes")[value] if isinstance(value, bool) else value


def _matrix_table(report: Inspection, every: bool) -> Table:
    """A line for each matrix or kind of matrix; settings where they differ, the rest of the spec stands above."""
    facts = [m.spec.facts() for m in report.matrices]
    settings = [name for name in facts[0] if any(f.get(name) != facts[0][name] for f in facts)]
    columns: dict[str, list[float | int | None]] = {
        "average": [m.average_bits for m in report.matrices],
        "outliers": [m.outliers or None for m in report.matrices],
        "error": [m.error for m in report.matrices],
        "block's error": [m.block_error for m in report.matrices],
        "in 4-bit": [m.share_4bit for m in report.matrices],
    }
    shown = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    ordered = all(m.order == report.matrices[0].order for m in report.matrices)
    orders = [] if ordered else ["order"]
    layer, count = (["layer"], []) if every else ([], ["count"])
    table = _columns(None, *layer, "matrix", "K x N", *settings, *orders, *shown, *count, left=["matrix", "order"])
    for column in table.columns:
        column.no_wrap = column.header != "matrix"
    below = {re.sub(r"\.\d+\.", ".*.", _below_block(m.name)) for m in report.matrices}
    short = {name: name.rpartition(".")[2] for name in below}
    unique = len(set(short.values())) == len(short)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for i, m in enumerate(report.matrices):
        below_block = _below_block(m.name)
        kind = re.sub(r"\.\d+\.", ".*.", below_block)
        name = short[kind] if unique and (kind == below_block or not every) else below_block if every else kind
        order = [] if ordered else [m.order]
        size, own = f"{m.in_features} x {m.out_features}", [facts[i][setting] for setting in settings]
        row = (*([_layer(m.name)] if every else []), name, size, *own, *order)
        kinds.setdefault(row, []).append(i)
    first = list(dict.fromkeys(row[0] for row in kinds))
    for row, members in sorted(kinds.items(), key=lambda kind: first.index(kind[0][0])):
        means = [_mean(values[i] for i in members) for values in shown.values()]
        table.add_row(*row, *means, *([] if every else [str(len(members))]))
    return table


def _layer(name: str) -> str:
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else "-"


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4g}" if known else "-"


def _below_block(name: str) -> str:
    """A matrix's name without its block's: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="Quantized folder or hub id.")],
    against: Annotated[str | None, typer.Option(help="The checkpoint it was converted from.")] = None,
    logits: Annotated[bool, typer.Option(help="Also compare logits, which runs both models.")] = True,
    as_json: Json = False,
) -> None:
    """Check every tensor's shape, dtype and meaning; with --against, prove that both hold the same weights."""
    from bitshard.sources import resolve
    from bitshard.verify import verify as run

    report = run(resolve(checkpoint), resolve(against) if against else None, logits, _progress)
    lines = [f"{report.matrices} modules in the blocks checked: shapes, order, scales, zeros"]
    if report.equal_matrices is not None:
        lines.append(f"{report.equal_matrices} equal to those of {against}, bit for bit under the permutations")
    if report.logits_error is not None:
        lines.append(f"logits differ by {report.logits_error:.1e} of the largest")
    if against is None:
        lines.append("codes can be any numbers: whether they are the right ones, only --against shows")
    _emit(report, as_json, *lines)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id, quantized or 16-bit.")],
    text: Annotated[Path | None, typer.Option(help="Text, or JSON lines with `text`, to predict.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window; --context if left out.")] = None,
    windows: Annotated[int | None, typer.Option(help="How many windows; all that fit if left out.")] = None,
    against: Annotated[str | None, typer.Option(help="Reference for KL divergence: the 16-bit model.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; all if left out.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more lm-eval tasks.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Add what was found on the text to its model card.")] = False,
    backend: Backend = "exact",
    as_json: Json = False,
) -> None:
    """Perplexity on a text, divergence from the 16-bit model, and lm-eval tasks: --text, --tasks or both."""
    from bitshard.card import add_measurement, require_card
    from bitshard.evaluate import TaskOptions, TextOptions
    from bitshard.evaluate import evaluate as run
    from bitshard.sources import resolve

    if text is None and tasks is None:
        raise typer.BadParameter("name a text, tasks or both", param_hint="--text, --tasks")
    if text is None and against is not None:
        raise typer.BadParameter("is measured on a --text", param_hint="--against")
    if text is None and card:
        raise typer.BadParameter("has what was found on a --text", param_hint="--card")
    path, reference = resolve(checkpoint), None if against is None else resolve(against)
    if card:
        require_card(path, reference)
    text_options = None if text is None else TextOptions(text, context, stride, windows, reference)
    task_options = None if tasks is None else TaskOptions(tasks.split(","), limit, include_path)
    report = run(path, text_options, task_options, _progress, backend)
    lines: list[str | Table] = []
    if report.text:
        lines += _perplexity_lines(report.text, against)
    if report.tasks:
        table = _columns(None, "task", "metric", "value", "+/-", "documents", "shots", left=["task", "metric"])
        for score in report.tasks:
            error = "-" if score.standard_error is None else f"{score.standard_error:.4f}"
            counts = ["-" if count is None else str(count) for count in (score.documents, score.shots)]
            table.add_row(score.task, score.metric, f"{score.value:.4f}", error, *counts)
        lines.append(table)
    _emit(report, as_json, *lines)
    if card and text is not None and report.text:
        add_measurement(path, text, backend, asdict(report.text))


def _perplexity_lines(report: Perplexity, against: str | None) -> list[str]:
    spread = "" if report.standard_error is None else f" +/- {report.standard_error:.4f}"
    where = (
        f"context {report.context}, stride {report.stride}, {report.windows} windows, {report.tokens} tokens, "
        f"{report.seconds:.1f} s"
    )
    lines = [f"perplexity {report.perplexity:.4f}{spread} ({where})"]
    if report.divergence:
        d = report.divergence
        quantiles = f"median {d.median_kl:.5f}, 99 % {d.kl_quantile_99:.5f}"
        lines += [
            f"{against}: perplexity {d.reference_perplexity:.4f} on the same tokens",
            f"KL divergence from it {d.mean_kl:.5f} nats per token ({quantiles})",
            f"same most likely token {d.top1_agreement:.2%}",
        ]
    return lines


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Folder, .gguf file or hub id, quantized or 16-bit.")],
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    tp: Tp = 1,
    strategy: Strategy = "tp-aware",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 for greedy decoding.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.", min=0, max=MAX_SEED)] = 0,
    chat: Annotated[bool, typer.Option(help="Use the chat template, if there is one.")] = True,
    backend: Backend = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile a token's step first, for 10 to 100 s: for long texts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Text, streamed to the terminal, on one rank or on T. Under torchrun, this process is one of the ranks."""
    from bitshard.generate import GenerateOptions
    from bitshard.generate import generate as run
    from bitshard.parallel import parse_strategy
    from bitshard.sources import resolve

    options = GenerateOptions(
        max_new_tokens, temperature, seed, chat, stream=not as_json, backend=backend, compile=compile
    )
    if compile and tp == 1:
        err_console.print("compiling a token's step first: 10 to 100 s", highlight=False)
    report = run(resolve(checkpoint), prompt, options, tp, parse_strategy(strategy))
    if os.environ.get("RANK", "0") != "0":
        return
    sent = f"{report.traffic.total_calls} collectives and {_size(report.traffic.total_bytes)} per token"
    compiled = "" if report.compile_seconds is None else f", after {report.compile_seconds:.0f} s of compiling"
    if not report.text.strip():
        err_console.print("the model ended its answer at once: ask otherwise, or try --no-chat", highlight=False)
    err_console.print(f"{report.tokens_per_second:.2f} tokens/s on {tp} rank(s), {sent}{compiled}", highlight=False)
    _emit(report, as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id, quantized or 16-bit.")],
    engine: Annotated[str, typer.Option(help="Whose server: transformers or vllm.")] = "transformers",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    backend: Backend = "auto",
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel degree, of vllm.")] = 1,
) -> None:
    """OpenAI's chat and completion calls, by an engine's own server; options that are not listed here go to it."""
    from bitshard.serve import ServeOptions, command
    from bitshard.sources import make_hub_cache, resolve

    options = ServeOptions(engine, host, port, backend, tp, context.args)
    folder = resolve(checkpoint)
    arguments, environment = command(folder, options)
    where = f"http://{host}:{port}/v1 when it has loaded the model, which requests call {folder}"
    err_console.print(f"{engine} serves at {where}", highlight=False)
    make_hub_cache()
    os.execve(arguments[0], arguments, environment)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can run, and the line that installs what is missing."""
    from bitshard.doctor import examine

    findings = examine()
    names = ("what", "status", "found", "to do")
    table = _columns(None, *names, left=names)
    for finding in findings:
        table.add_row(finding.subject, finding.status, finding.detail, finding.fix)
    _emit([asdict(finding) for finding in findings], as_json, table)


@app.command()
def demo(
    model: Annotated[str | None, typer.Argument(help="HF folder, .gguf file or hub id; SmolLM2 if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, demo.json and demo.png.")] = Path("build/demo"),
    as_json: Json = False,
) -> None:
    """The whole way once: quantize to mix64 and to GPTQ, convert that, verify; one prompt on 1 rank and on several."""
    _patient()
    from bitshard.demo import demo as run

    report = run(model, out, progress=_progress, say=lambda line: err_console.print(line, highlight=False))
    names = ("run", "tok/s", "AllReduce", "AllGather", "bytes", "weights")
    title = f"{report.model}; collectives per token, weights per rank"
    table = _columns(title, *names, left=["run"])
    for name, one in report.runs.items():
        calls = [str(one.traffic.calls.get(name, 0)) for name in ("AllReduce", "AllGather")]
        sizes = _size(one.traffic.total_bytes), _size(one.weight_bytes_per_rank)
        table.add_row(name, f"{one.tokens_per_second:.2f}", *calls, *sizes)
    same = "each checkpoint gave the same answer on 1 rank and on several"
    answer = same if report.texts_agree else "answers on 1 rank and on several differ: rounding took over"
    texts = [f"{name}: {one.text}".replace("\n", " ") for name, one in report.runs.items() if one.tp_size == 1]
    mixed = out / f"{report.model}-mix64"
    where = f"picture: {out / 'demo.png'}", f"next: bitshard inspect {mixed}", f'next: bitshard generate {mixed} "..."'
    _emit(report.to_dict(), as_json, *texts, f"({answer})", table, *where)


@bench_app.command("mlp")
def bench_mlp(
    model: Annotated[list[str] | None, typer.Option(help="llama-70b, granite-20b; both if left out.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="dense, gptq; both if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp16, bf16, fp32.")] = None,
    ranks: Annotated[str, typer.Option(help="Tensor-parallel degrees, separated by commas.")] = "1,2,4,8",
    tokens: Annotated[str, typer.Option(help="M: rows of the input, separated by commas.")] = "1,2,4,8,16",
    scale: Annotated[int, typer.Option(help="Divide all sizes by this, for small machines.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repetitions: Annotated[int, typer.Option(help="Timed calls of each.")] = 50,
    out: Annotated[Path | None, typer.Option(help="Write this .json, and a .png beside it.")] = None,
    as_json: Json = False,
) -> None:
    """An MLP under naive, local-sort and tp-aware tensor parallelism, side by side in one run."""
    from bitshard.bench.mlp import bench_mlp as run
    from bitshard.bench.mlp_config import MODELS, WEIGHTS, MlpBench

    config = MlpBench(
        models=tuple(model or MODELS),
        weights=tuple(weights or WEIGHTS),
        dtypes=tuple(dtype or ["fp16"]),
        ranks=_numbers("--ranks", ranks),
        tokens=_numbers("--tokens", tokens),
        scale=scale,
        device=device,
        repetitions=repetitions,
    )
    report = run(config, out, _progress)
    if os.environ.get("RANK", "0") == "0":
        _emit(report.to_dict(), as_json, report.render())


@bench_app.command("kernels")
def bench_kernels(
    shapes: Annotated[
        str, typer.Option(help="N x K of the matrices, as 4096x11008,576x1536; none: those of 7B and 70B models.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="M: rows of the input, separated by commas; none: 1 to 512.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, separated by commas.")] = "1",
    repetitions: Annotated[int, typer.Option(help="Timed calls of each.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write this .json, and a .png beside it.")] = None,
    as_json: Json = False,
) -> None:
    """Every kernel beside torch and ggml in one run, and what memory and arithmetic allow."""
    from bitshard.bench.kernels import KernelBench
    from bitshard.bench.kernels import bench_kernels as run

    sizes = []
    for shape in shapes.split(",") if shapes else ():
        n, _, k = shape.partition("x")
        if not n or not k:
            raise typer.BadParameter(f"{shape!r} is no N x K such as 4096x11008", param_hint="--shapes")
        sizes.append((_numbers("--shapes", n)[0], _numbers("--shapes", k)[0]))
    numbers = _numbers("--tokens", tokens) if tokens else ()
    config = KernelBench(tuple(sizes), numbers, _numbers("--threads", threads), repetitions, device)
    report = run(config, out, _progress)
    _emit(report.to_dict(), as_json, report.render())
    report.require_all()


@bench_app.command("e2e")
def bench_e2e(
    model: Annotated[str, typer.Argument(help="16-bit HF folder, .gguf file or hub id.")],
    checkpoint: Annotated[str, typer.Argument(help="Quantized folder or hub id of the same model.")],
    gguf: Annotated[Path | None, typer.Option(help="File of the same model for llama.cpp, Q2_K for example.")] = None,
    batches: Annotated[str, typer.Option(help="Prompts at once, separated by commas.")] = "1,4",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "128,512",
    new_tokens: Annotated[int, typer.Option(help="Tokens after the first.")] = 32,
    ranks: Annotated[str, typer.Option(help="Tensor-parallel degrees, separated by commas.")] = "1,2",
    repetitions: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write this .json, and a .png beside it.")] = None,
    as_json: Json = False,
) -> None:
    """Whole models in transformers, vLLM and llama.cpp: time to the first token, tokens a second, memory."""
    from bitshard.bench.e2e import E2eBench
    from bitshard.bench.e2e import bench_e2e as run
    from bitshard.sources import resolve

    config = E2eBench(
        _numbers("--batches", batches),
        _numbers("--contexts", contexts),
        new_tokens,
        _numbers("--ranks", ranks),
        repetitions,
    )
    report = run(resolve(model), resolve(checkpoint), gguf, config, out, _progress)
    _emit(report.to_dict(), as_json, report.render())
    report.require_all()


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas; anything else is wrong usage."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 1,2,4", param_hint=option) from None
