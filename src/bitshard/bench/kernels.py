"""`bench kernels`: one matrix times M tokens, every kernel beside what a user would pick instead, and the two floors.

A case's kernels run in turn within one loop. Each has as many copies of its matrix as fill `STREAMED` bytes and takes
the next one every time, so that weights come from memory, as they do in a model, and not from a cache; but some calls
in a row, so that the program does come from one: Python and torch that the other kernels have driven out cost 0.1 to
0.5 ms a call. On a GPU one pass over all copies is a CUDA graph, so that Python and launches do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bitshard.bench import contenders, report
from bitshard.bench.contenders import CHECKED_ROWS, Contender, said
from bitshard.bench.timing import Call, Times, capture, cpu_seconds, cuda_seconds
from bitshard.errors import BenchError, SpecError
from bitshard.kernels import why_not_arranged
from bitshard.progress import Progress, silent
from bitshard.spec import BLOCK

MOST_WEIGHTS = 1 << 31  # of one matrix, and inputs and outputs of a case: 8 GB in float32
MOST_THREADS = 1024  # torch dies of 100,000
MOST_ELEMENTS = 256 << 20  # float32, that are copied on a GPU; its product has as many entries
IN_A_ROW = 8  # calls of one kernel on a processor, each with another copy
LONG_SECONDS = 0.02  # of a call that needs no others
LEAST_CALLS = 32  # of one graph
AWAKE_SECONDS = 0.1  # of work before anything is timed
Turn = Callable[[], float]  # some calls of one contender; seconds of one of them
SHAPES = {  # (N, K) of one matrix: 7B and 70B models' on a GPU
    "cpu": ((4096, 4096), (4096, 11008), (8192, 28672)),
    "cuda": ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672)),
}
TOKENS = {"cpu": (1, 8, 16, 32, 512), "cuda": (1, 2, 4, 8, 16, 32, 64)}


@dataclass(frozen=True)
class KernelBench:
    """What to measure. shapes: (N, K), K whole blocks of 64. tokens: M. threads: of torch, and of ggml's own pool.

    device: cpu, or cuda, where threads do not matter. No shapes or tokens: the device's own.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, ...] = ()
    threads: tuple[int, ...] = (1,)
    repetitions: int = 15
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in SHAPES:
            raise SpecError("device", repr(self.device), " or ".join(SHAPES), "choose one of them")
        object.__setattr__(self, "shapes", self.shapes or SHAPES[self.device])
        object.__setattr__(self, "tokens", self.tokens or TOKENS[self.device])
        for n, k in self.shapes:
            if n < 16 or n % 16 or k < BLOCK or k % BLOCK:
                raise SpecError(
                    "shapes", f"{n}x{k}", f"rows in sixteens, columns in blocks of {BLOCK}", "choose others"
                )
            if (most := max(n * k, max((n, k)) * max(self.tokens, default=1))) > MOST_WEIGHTS:
                found = f"{most} numbers in a matrix, or in its inputs or outputs"
                raise SpecError("shapes and tokens", found, f"{MOST_WEIGHTS} or fewer", "choose smaller ones")
        for name, most in (("tokens", MOST_WEIGHTS), ("threads", MOST_THREADS)):
            if not getattr(self, name) or not all(1 <= number <= most for number in getattr(self, name)):
                raise SpecError(name, str(getattr(self, name)), f"numbers from 1 to {most}", "choose others")
        if self.repetitions < 3:
            raise SpecError("repetitions", str(self.repetitions), "3 or more", "ask for more")


@dataclass(frozen=True)
class Floors:
    """Of this machine, measured in the same run: bytes a second that memory gives, operations a second.

    On a processor of a sum and of a float32 product, on a GPU of a copy, read and written, and of a float16 product.
    """

    bytes_per_second: float
    flops: float

    def seconds(self, n: int, k: int, tokens: int, nbytes: int) -> float:
        return max(nbytes / self.bytes_per_second, 2 * n * k * tokens / self.flops)


@dataclass(frozen=True)
class KernelRow:
    """One kernel at one case. nbytes: of its weights. error: relative, of the outputs that were checked."""

    kernel: str
    n: int
    k: int
    tokens: int
    threads: int
    nbytes: int
    error: float
    times: Times

    @property
    def weights_per_second(self) -> float:
        return self.n * self.k * self.tokens / self.times.median * 1e3


@dataclass(frozen=True)
class KernelReport:
    """floors: by threads. refused: why nothing was timed, by kernel and case. cases_left: not come to yet."""

    header: dict[str, Any]
    config: KernelBench
    floors: dict[int, Floors]
    rows: list[KernelRow]
    refused: dict[str, str]
    cases_left: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "kernels",
            "header": self.header,
            "config": asdict(self.config),
            "floors": {str(threads): asdict(floors) for threads, floors in self.floors.items()},
            "rows": [asdict(row) for row in self.rows],
            "refused": self.refused,
            "cases_left": self.cases_left,
        }

    def require_all(self) -> None:
        """Raises BenchError for all kernels that were not timed."""
        report.require_timed(
            self.refused, "bench kernels", "that were not timed", "kernels that run here and are right"
        )

    def render(self) -> Table:
        lines = []
        for row in self.rows:
            floor = self.floors[row.threads].seconds(row.n, row.k, row.tokens, row.nbytes)
            lines.append(
                (
                    f"{row.n}x{row.k}, {row.tokens}, {row.threads}", row.kernel, f"{row.times.median:.3g}",
                    f"{row.times.p10:.3g}-{row.times.p90:.3g}", f"{row.weights_per_second / 1e9:.1f}",
                    f"{100 * floor * 1e3 / row.times.median:.0f} %",
                )
            )  # fmt: skip
        columns = ("N x K, M, threads", "kernel", "ms", "10-90 %", "Gw/s", "floor")
        return report.table("one matrix times M tokens", columns, lines, report.caption(self.header))

    def write(self, out: Path) -> None:
        report.write_json(out, self.to_dict())
        self.draw(out.with_suffix(".png"))

    def draw(self, path: Path) -> None:
        """Operations a second over operations a byte, under the two floors; a panel for each number of threads."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6 * len(self.floors) + 1, 5), layout="constrained")
        axes = figure.subplots(1, len(self.floors), squeeze=False)[0]
        for axis, (threads, floors) in zip(axes, self.floors.items(), strict=True):
            for kernel in dict.fromkeys(row.kernel for row in self.rows):
                own = [row for row in self.rows if (row.kernel, row.threads) == (kernel, threads)]
                x = [2 * row.n * row.k * row.tokens / row.nbytes for row in own]
                axis.plot(x, [2 * row.weights_per_second for row in own], "o", markersize=4, label=kernel)
            ridge, ends = floors.flops / floors.bytes_per_second, (0.4, 2e4)
            roof = (floors.bytes_per_second * ends[0], floors.flops, floors.flops)
            axis.plot((ends[0], ridge, ends[1]), roof, "k-", linewidth=1)
            axis.set(xscale="log", yscale="log", title=f"{threads} threads", xlabel="operations a byte of weights")
            axis.grid(alpha=0.3)
        figure.axes[0].set_ylabel("operations a second")
        if self.rows:
            figure.axes[0].legend(fontsize=8)
        figure.supxlabel(report.caption(self.header), fontsize=7)
        figure.savefig(path, dpi=100)


def bench_kernels(config: KernelBench, out: Path | None = None, progress: Progress = silent) -> KernelReport:
    """Check, then time, and write `out` (.json after every case, .png beside it at the end) if given.

    A kernel with a wrong output, or none, is not timed; `require_all` of the report says so.
    """
    if out is not None:
        report.require_json_path(out)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("bench kernels", "no GPU that torch sees", "an NVIDIA GPU", "use --device cpu")
    if why := why_not_arranged(config.device):
        raise BenchError("bench kernels", f"no kernels for {config.device}", "a machine that has them", why)
    header, threads_before = report.header(config.device), torch.get_num_threads()
    rows, refused = list[KernelRow](), dict[str, str]()
    contend, turn_of, _ = _OF_DEVICE[config.device]
    cases = [(shape, m, t) for shape in config.shapes for t in config.threads for m in config.tokens]
    floors: dict[int, Floors] = {}
    try:
        for threads in config.threads:
            torch.set_num_threads(threads)
            floors[threads] = floors_of(config.device)
        found: dict[tuple[int, int], list[Contender]] = {}
        for left, (shape, m, threads) in zip(range(len(cases) - 1, -1, -1), progress(cases, "measuring"), strict=True):
            torch.set_num_threads(threads)
            if shape not in found:
                found.clear()  # one shape's weights in memory
                found[shape], absent = contend(*shape)
                refused |= absent
            fit = [contender for contender in found[shape] if m <= contender.most_tokens]
            rows += _measure(fit, shape, m, threads, config, turn_of, refused)
            if out is not None:  # what has been measured stays, whatever ends the run
                report.write_json(out, KernelReport(header, config, floors, rows, refused, left).to_dict())
    finally:
        torch.set_num_threads(threads_before)
    header["load_after"] = report.load()
    result = KernelReport(header, config, floors, rows, refused)
    if out is not None:
        result.write(out)
    return result


def floors_of(device: str) -> Floors:
    return _OF_DEVICE[device][2]()


def _processor_floors() -> Floors:
    values, square = torch.ones(64 << 20), torch.randn(2048, 2048)
    read = min(cpu_seconds(values.sum) for _ in range(5))
    multiply = min(cpu_seconds(lambda: square @ square) for _ in range(5))
    return Floors(values.nbytes / read, 2 * 2048**3 / multiply)


def _measure(
    fit: list[Contender],
    shape: tuple[int, int],
    m: int,
    threads: int,
    config: KernelBench,
    turn_of: Callable[[list[Call]], Turn],
    refused: dict[str, str],
) -> list[KernelRow]:
    (n, k), x_MK = shape, torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
    if config.device == "cuda":
        x_MK = x_MK.half().to(contenders.GPU)
    ready = list[tuple[Contender, float, Turn]]()
    for contender in fit:
        try:
            copies, output = contender.prepare(x_MK, threads)
            copies[0]()
            exact_MR, found_MR = x_MK.float() @ contender.W_RK.T, output()[:, :CHECKED_ROWS].float()
            error, most = float((found_MR - exact_MR).norm() / exact_MR.norm()), contender.most_error
            why = "" if error <= most else f"error {error:.2g}, at most {most:g} allowed"
            # two kernels may share copies: one must not find in a cache what the other has just read
            start = len(ready) * len(copies) // len(fit)
            turn = turn_of([*copies[start:], *copies[:start]])
        except Exception as problem:  # other people's programs raise anything
            why = said(problem)
        if why:
            refused[f"{contender.name}, {n}x{k}, M={m}, {threads} threads"] = why
        else:
            ready.append((contender, error, turn))
    rows = []
    for (contender, error, _), own in zip(ready, _times([turn for *_, turn in ready], config.repetitions), strict=True):
        rows.append(KernelRow(contender.name, n, k, m, threads, contender.nbytes, error, Times.of(own)))
    return rows


def _times(turns: list[Turn], repetitions: int) -> list[list[float]]:
    """Milliseconds of a call of each, in turn; not counted until the device is awake."""
    begun = time.perf_counter()
    while True:
        for turn in turns:
            turn()
        if time.perf_counter() - begun >= AWAKE_SECONDS:
            break
    taken = [[turn() * 1e3 for turn in turns] for _ in range(repetitions)]
    return [[times[i] for times in taken] for i in range(len(turns))]


def _processor_turn(copies: list[Call]) -> Turn:
    """Seconds of one of IN_A_ROW calls, as a model makes them, behind one that is not counted unless it is long."""
    calls = cycle(copies)

    def turn() -> float:
        first = cpu_seconds(next(calls))
        return first if first > LONG_SECONDS else cpu_seconds(partial(_call_all, islice(calls, IN_A_ROW))) / IN_A_ROW

    return turn


def _gpu_turn(copies: list[Call]) -> Turn:
    """Seconds of a call in a pass over all copies, a graph of so many that what it takes to begin does not count."""
    calls = copies * -(-LEAST_CALLS // len(copies))
    replay = capture(partial(_call_all, calls))
    replay()
    return lambda: cuda_seconds(replay) / len(calls)


def _call_all(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def _gpu_floors() -> Floors:
    side, device = int(MOST_ELEMENTS**0.5), contenders.GPU
    source, square = torch.ones(MOST_ELEMENTS, device=device), torch.randn(side, side, device=device).half()
    target = torch.empty_like(source)
    copy = min(cuda_seconds(lambda: target.copy_(source)) for _ in range(10))
    multiply = min(cuda_seconds(lambda: square @ square) for _ in range(10))
    return Floors(2 * source.nbytes / copy, 2 * side**3 / multiply)


_OF_DEVICE = {
    "cpu": (contenders.of_processor, _processor_turn, _processor_floors),
    "cuda": (contenders.of_gpu, _gpu_turn, _gpu_floors),
}
