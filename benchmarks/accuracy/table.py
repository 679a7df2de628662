"""Print the accuracy tables in Markdown from the rows in benchmarks/results/accuracy, ablations apart.

python benchmarks/accuracy/table.py [MODEL ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
ABLATION = "ours-2.9-"  # how the names of rows begin in which one thing differs from `ours-2.9-damp-0.01`


def table(rows: list[dict[str, Any]]) -> str:
    """One model's rows, most bits first."""
    texts = [name for name in ("wiki", "plain", "c4", "code") if any(name in row["texts"] for row in rows)]
    columns = ["row", "bits", *texts, "KL", "top-1"]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in sorted(rows, key=lambda row: -row["bits"]):
        padded = row["details"].get("bits_of_padded")
        cells = [row["row"], f"{row['bits']:.3f}" + (f" ({padded:.3f} padded)" if padded else "")]
        cells += [_perplexity(row["texts"][name]["perplexity"]) if name in row["texts"] else "" for name in texts]
        divergence = row["texts"].get("wiki", {}).get("divergence")
        if divergence:
            cells += [f"{divergence['mean_kl']:.3f}", f"{100 * divergence['top1_agreement']:.1f} %"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def task_table(rows: list[dict[str, Any]]) -> str:
    """One model's rows in tasks, most bits first: acc_norm where a task has it, else acc, and their mean; per cent."""
    tasks = {score["task"]: "acc" for score in rows[0]["tasks"]}
    tasks |= {score["task"]: "acc_norm" for score in rows[0]["tasks"] if score["metric"] == "acc_norm"}
    columns = ["row", "bits", *(f"{task} {metric}" for task, metric in tasks.items()), "mean"]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in sorted(rows, key=lambda row: -row["bits"]):
        values = {(score["task"], score["metric"]): 100 * score["value"] for score in row["tasks"]}
        chosen = [values[task] for task in tasks.items()]
        cells = [row["row"], f"{row['bits']:.3f}", *(f"{value:.1f}" for value in (*chosen, mean(chosen)))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    by_model: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem.endswith("-windows"):  # fewer than in the tables
            continue
        row = json.loads(path.read_text())
        if "row" in row:  # else blocks.py has written it
            by_model.setdefault(row["model"], []).append(row)
    for model in sys.argv[1:] or by_model:
        tasks = [row for row in by_model[model] if "tasks" in row]
        rows = [row for row in by_model[model] if row not in tasks]
        ablation = [row for row in rows if row["row"].startswith(ABLATION)]
        print(f"### {model}\n\n{table([row for row in rows if row not in ablation])}\n")
        if ablation:
            print(f"One thing switched at a time\n\n{table(ablation)}\n")
        if tasks:
            print(f"Tasks\n\n{task_table(tasks)}\n")


if __name__ == "__main__":
    main()
