"""What `bench mlp` reports: its rows, the paper's own beside them, as a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from bitshard.bench import report
from bitshard.bench.mlp_config import Case
from bitshard.bench.timing import Times
from bitshard.parallel import STRATEGIES, Strategy


@dataclass(frozen=True)
class Checked:
    """What was found before timing.

    error: root mean square of the output against the wide unsharded reference, over that of torch unsharded in the same
    dtype, on the worst rank. collective_bytes: of the results of all collectives of one call, on each rank.
    weight_bytes: of the packed tensors, or dense matrices, that each rank holds.
    """

    error: float
    collectives: dict[str, int]
    collective_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class MlpRow:
    """One strategy of one case, on `ranks` ranks, for `tokens` tokens. mode: "eager", or "graph" for a CUDA graph."""

    case: Case
    ranks: int
    tokens: int
    mode: str
    strategy: Strategy
    times: Times
    checked: Checked


@dataclass(frozen=True)
class PaperRow:
    """Milliseconds printed in the paper for two 16-bit matrices in place of quantized ones, without a gate."""

    model: str
    gpu: str
    ranks: int
    tokens: int
    naive: float
    tp_aware: float


# arXiv 2402.04925, as far as its tables could be retrieved. Never add a number from memory.
PAPER = (
    PaperRow("llama-70b", "A100", 1, 1, 0.696, 0.688),
    PaperRow("llama-70b", "H100", 1, 1, 0.489, 0.481),
    PaperRow("llama-70b", "A100", 4, 8, 0.518, 0.285),
    PaperRow("llama-70b", "A100", 8, 4, 0.539, 0.291),
    PaperRow("granite-20b", "A100", 4, 16, 0.53, 0.29),
)
# (model, GPU, ranks) -> naive / tp-aware, averaged over tokens
PAPER_MEAN_SPEEDUP = {
    ("llama-70b", "A100", 2): 1.22,
    ("llama-70b", "A100", 4): 1.78,
    ("llama-70b", "A100", 8): 1.81,
}


@dataclass(frozen=True)
class MlpReport:
    """header: machine, versions, commit, date, load. config: the MlpBench as a dict, sizes included."""

    header: dict[str, Any]
    config: dict[str, Any]
    rows: tuple[MlpRow, ...]

    @property
    def paper(self) -> list[PaperRow]:
        return [row for row in PAPER if row.model in self.config["models"]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; milliseconds, bytes."""
        means = [
            {"model": model, "gpu": gpu, "ranks": ranks, "naive_over_tp_aware": speedup}
            for (model, gpu, ranks), speedup in PAPER_MEAN_SPEEDUP.items()
            if model in self.config["models"]
        ]
        return {
            "benchmark": "mlp",
            "header": self.header,
            "config": self.config,
            "rows": [asdict(row) for row in self.rows],
            "paper": {
                "source": "arXiv 2402.04925, on its own GPUs and at full size: not this machine's numbers",
                "rows": [asdict(row) for row in self.paper],
                "means_over_tokens": means,
            },
        }

    def by_strategy(self) -> Iterator[dict[Strategy, MlpRow]]:
        """The rows of the strategies that were timed together."""
        size = len(STRATEGIES)
        for start in range(0, len(self.rows), size):
            yield {row.strategy: row for row in self.rows[start : start + size]}

    def render(self) -> Group:
        """Two tables for a terminal: times, and what each rank holds and sends."""
        return Group(self._times_table(), self._bytes_table())

    def _times_table(self) -> Table:
        rows = []
        for together in self.by_strategy():
            times = {name: row.times for name, row in together.items()}
            first, aware = together["naive"], times["tp-aware"].median
            cells = [f"{t.median:.3g} ±{50 * (t.p90 - t.p10) / t.median:.0f}%" for t in times.values()]
            speedups = [f"{times[name].median / aware:.2f}x" for name in ("naive", "local-sort")]
            name = str(first.case) if first.mode == "eager" else f"{first.case} {first.mode}"
            rows.append([name, str(first.ranks), str(first.tokens), *cells, *speedups])
        for row in self.paper:
            cells = [f"{row.naive:.3g}", "-", f"{row.tp_aware:.3g}", f"{row.naive / row.tp_aware:.2f}x", "-"]
            rows.append([f"{row.model} paper {row.gpu} full", str(row.ranks), str(row.tokens), *cells])
        columns = ["MLP", "T", "M", *STRATEGIES, "naive/aware", "local/aware"]
        title = f"MLP on T ranks, ms: median ± half of 10th to 90th percentile; sizes / {self.config['scale']}"
        return report.table(title, columns, rows, report.caption(self.header))

    def _bytes_table(self) -> Table:
        rows = []
        for together in self.by_strategy():
            first = together["naive"]
            if first.tokens != self.config["tokens"][0] or first.mode != "eager":
                continue
            held = [f"{row.checked.weight_bytes / 1e6:.3f}" for row in together.values()]
            sent = [f"{row.checked.collective_bytes // row.tokens:,}" for row in together.values()]
            rows.append([str(first.case), str(first.ranks), *held, *sent])
        columns = ["MLP", "T", *(f"{s} MB" for s in STRATEGIES), *(f"{s} B" for s in STRATEGIES)]
        note = "B: bytes of the results of a call's collectives, on each rank"
        return report.table("MB of weights on a rank, and B per token through collectives", columns, rows, note)

    def write(self, path: Path) -> None:
        """The JSON file `path` and the picture of the same name beside it."""
        report.write_json(path, self.to_dict())
        cases = dict.fromkeys((row.case, row.mode) for row in self.rows)
        panels = [[self._panel(case, mode, ranks) for ranks in self.config["ranks"]] for case, mode in cases]
        title = f"MLP on T ranks, sizes / {self.config['scale']}"
        report.plot(path.with_suffix(".png"), title, panels, "tokens", report.caption(self.header))

    def _panel(self, case: Case, mode: str, ranks: int) -> report.Panel:
        rows = [row for row in self.rows if (row.case, row.mode, row.ranks) == (case, mode, ranks)]
        lines: dict[str, list[tuple[float, Times]]] = {
            s: [(row.tokens, row.times) for row in rows if row.strategy == s] for s in STRATEGIES
        }
        return report.Panel(f"{case}, {mode}, T={ranks}", lines)
