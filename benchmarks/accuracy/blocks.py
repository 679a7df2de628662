"""What single steps gain in a model's first blocks: the tables on ranges and on tuning in docs/accuracy.md.

    python benchmarks/accuracy/blocks.py --model smollm2-135m=SmolLM2.gguf --blocks 6 ranges
    python benchmarks/accuracy/blocks.py --model smollm2-135m=SmolLM2.gguf --blocks 1 tuning --steps 64,128

`ranges`: every matrix is solved with min-max ranges and with the search, on the same inputs and Hessian; error of its
outputs with the search (and the second pass over all strips that goes with it) over that with min-max. `tuning`: every
block is tuned with each number of steps and each rate; error of its outputs on held-out segments over that before.
Segments as in run.py. One JSON file in benchmarks/results/accuracy.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from run import HERE, LENGTH, RESULTS, SAMPLES

from bitshard import pipeline
from bitshard.bench.report import header
from bitshard.pipeline import Calibration, quantize
from bitshard.progress import Progress
from bitshard.solver import tune as tuning
from bitshard.spec import MIX_RECIPE, MixRecipe, MixSpec

T = TypeVar("T")


class Enough(Exception):
    """As many blocks as were asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME=PATH", help="a 16-bit folder or .gguf file")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--texts", type=Path, default=HERE.parents[1] / "build" / "accuracy" / "texts")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "accuracy")
    parser.add_argument("what", choices=("ranges", "tuning"))
    parser.add_argument("--steps", default="128")
    parser.add_argument("--rates", default=str(tuning.CODE_RATE), help="of codes, in the first step")
    arguments = parser.parse_args()
    name, _, path = arguments.model.partition("=")
    settings = [
        (int(steps), float(rate)) for steps in arguments.steps.split(",") for rate in arguments.rates.split(",")
    ]
    rows: list[dict[str, Any]] = []
    recipe = compare_ranges(rows) if arguments.what == "ranges" else compare_tuning(rows, settings)
    out = arguments.work / f"{name}-{arguments.what}"
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # from the first block on: what an earlier run found was not kept
    progress: Progress = lambda items, label: some(items, label, arguments.blocks)  # noqa: E731
    calibration = Calibration(arguments.texts / "mix.txt", SAMPLES, LENGTH)
    try:
        quantize(path, out, MixSpec(), calibration, recipe, progress=progress)
    except Enough:
        shutil.rmtree(partial)
    shutil.rmtree(out, ignore_errors=True)  # where the model has no more blocks than that
    result = {**header("cpu"), "model": name, "blocks": arguments.blocks, "rows": rows}
    if arguments.what == "ranges":
        ratios = [row["search"] / row["minmax"] for row in rows]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        result |= {"matrices": len(ratios), "least": min(ratios), "geometric_mean": mean, "most": max(ratios)}
    (RESULTS / f"blocks-{name}-{arguments.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"} | {"rows": rows[:20]}, indent=1))


def some(items: Sequence[T], label: str, blocks: int) -> Iterator[T]:
    """Everything that comes before, and as many blocks."""
    for done, item in enumerate(items):
        if label == "quantizing" and done == blocks:
            raise Enough
        yield item


def compare_ranges(rows: list[dict[str, Any]]) -> MixRecipe:
    solve = pipeline.solve_mixed

    def both(W_NK: Any, H_KK: Any, spec: MixSpec, recipe: MixRecipe, name: str) -> Any:
        solved = solve(W_NK, H_KK, spec, recipe, name)
        minmax = solve(W_NK, H_KK, spec, replace(recipe, ranges="minmax"), name)
        rows.append({"matrix": name, "search": solved[1].relative_error, "minmax": minmax[1].relative_error})
        return solved

    pipeline.solve_mixed = both
    return MIX_RECIPE


def compare_tuning(rows: list[dict[str, Any]], settings: Sequence[tuple[int, float]]) -> MixRecipe:
    tune = pipeline.tune

    def each(*given: Any) -> Any:
        for steps, rate in settings:
            tuning.CODE_RATE = rate
            tuned = tune(*given[:-1], steps)
            rows.append({"steps": steps, "rate": rate, "before": tuned.before, "after": tuned.after})
        return tuned  # of the last settings; the next block starts from what it left

    pipeline.tune = each
    return replace(MIX_RECIPE, tune=settings[-1][0])


if __name__ == "__main__":
    main()
