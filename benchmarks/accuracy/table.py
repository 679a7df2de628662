"""Write the tables of README.md and docs/accuracy.md from the rows in benchmarks/results/accuracy, or print a model's.

python benchmarks/accuracy/table.py [MODEL ...]

In a document a table stands below the comment that names it; one without is left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "accuracy.md")
TEXTS = ("wiki", "plain", "c4", "code")

OURS = "**`bitshard quantize`**"
GROUPS = ", group {group_size}"  # as the row's file says
LABELS = {  # of the rows of a model's own table; ours are bold
    "16-bit": "16-bit",
    "ours-2.9": OURS,
    **{f"ours-{bits}": f"**`bitshard quantize --average-bits {bits}`**" for bits in ("2.5", "3.3", "4.2")},
    "ours-tuned-2.9": "**`bitshard quantize --tune 128`**",
    "ours-gptq-4": f"**`bitshard quantize --format gptq --bits 4 --order model`{GROUPS}**",
    **{f"gptq-{bits}": f"GPTQModel 7.6.0, {bits} bits{GROUPS}, act_order" for bits in (2, 3, 4)},
    "autoround-light-3": f"AutoRound 0.16.1, 3 bits{GROUPS}, its light recipe",
    "paper-v1": "`--recipe paper-v1`",
    "paper-v4": "`--recipe paper-v4`",
    "Q2_K-file": "llama.cpp's own Q2_K file",
    "Q3_K_S-file": "llama.cpp's own Q3_K_S file",
    "Q2_K-padded": "ggml Q2_K, K padded with zeros to 256",
    "Q2_K-padded-imatrix": "ggml Q2_K with an importance matrix, padded",
    "Q3_K-padded": "ggml Q3_K, padded",
}  # fmt: skip
SMOLLM2, QWEN, GEMMA = "smollm2-135m", "qwen2.5-coder-0.5b", "gemma-3-270m"
MODELS = {SMOLLM2: "SmolLM2-135M-Instruct", QWEN: "Qwen2.5-Coder-0.5B-Instruct", GEMMA: "Gemma-3-270M"}
TASKS = ("lambada_openai", "arc_easy", "piqa")

OVERVIEW = {
    "16-bit": "16-bit",
    "ours-2.9": OURS,
    "ours-tuned-2.9": LABELS["ours-tuned-2.9"],
    "gptq-3": "GPTQModel, 3 bits, act_order",
    "Q2_K-padded-imatrix": "ggml Q2_K, importance matrix, K padded to 256",
    "paper-v1": "the 2-bit paper's recipe, v1, as we read it",
    "paper-v4": "the same, v4",
}


def beside_the_prototype(model: str, windows: int, rows: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Rows on a text's first windows, each with what the prototype had: label to row and that."""
    return {f"{label} ({had})": f"{model}-{row}-{windows}-windows" for label, (row, had) in rows.items()}


def of_each_model(rows: dict[str, str]) -> dict[str, str]:
    """The same rows of all models."""
    models = {"SmolLM2": SMOLLM2, "Qwen2.5-Coder": QWEN, "Gemma": GEMMA}
    return {f"{name}, {label}": f"{model}-{row}" for name, model in models.items() for label, row in rows.items()}


# name: the first column's head, the others, and each row's label and file
OTHERS: dict[str, tuple[str, Sequence[str], dict[str, str]]] = {
    "correction": (
        "damping of the correction, SmolLM2",
        ("wiki", "c4", "KL wiki"),
        {
            "0.1 (`ours-2.9-correction-0.1`)": f"{SMOLLM2}-ours-2.9-correction-0.1",
            "**0.3** (`ours-2.9-damp-0.01`)": f"{SMOLLM2}-ours-2.9-damp-0.01",
            "no correction (`ours-2.9-no-correct`)": f"{SMOLLM2}-ours-2.9-no-correct",
        },
    ),
    "damping": (
        "`--damp`",
        ("wiki", "KL wiki", "plain", "KL plain", "c4", "KL c4", "code", "KL code"),
        of_each_model({"0.01": "ours-2.9-damp-0.01", "**0.05**": "ours-2.9"}),
    ),
    "switched": (
        "",
        ("bits", "wiki", "c4", "KL wiki", "top-1 wiki"),
        {
            OURS: f"{SMOLLM2}-ours-2.9",
            "rounding damped by 1 % (`--damp 0.01`)": f"{SMOLLM2}-ours-2.9-damp-0.01",
            "natural order, strips gathered in each matrix (`--order none`)": f"{SMOLLM2}-ours-2.9-natural-order",
            "min-max ranges (`--ranges minmax`)": f"{SMOLLM2}-ours-2.9-minmax",
            "0.2 % of outliers, paid for with 4-bit strips (`--outliers 0.002`)": f"{SMOLLM2}-ours-2.9-outliers",
            "0.5 % of outliers, paid for likewise (`--outliers 0.005`)": f"{SMOLLM2}-ours-2.9-more-outliers",
            "channels ranked by range, not by the Hessian (`--ranking range`)": f"{SMOLLM2}-ours-2.9-ranked-by-range",
            "one fraction of 4-bit strips for all (`--fraction-4bit 0.25`)": f"{SMOLLM2}-ours-2.9-one-fraction",
            "the same with the paper's second order (`--metadata paper`)": (
                f"{SMOLLM2}-ours-2.9-one-fraction-paper-metadata"
            ),
            "targets not corrected (`--no-correct`)": f"{SMOLLM2}-ours-2.9-no-correct",
            "32 segments (the default of `--samples`)": f"{SMOLLM2}-ours-2.9-32-segments",
        },
    ),
    "spaces": (
        "Qwen2.5-Coder-0.5B",
        ("bits", "wiki", "plain", "KL wiki", "KL plain"),
        {
            "16-bit": f"{QWEN}-16-bit",
            OURS: f"{QWEN}-ours-2.9",
            "the same, `--damp 0.01`": f"{QWEN}-ours-2.9-damp-0.01",
            "`--damp 0.01 --ranges minmax`": f"{QWEN}-ours-2.9-minmax",
            "`bitshard quantize --average-bits 2.5`": f"{QWEN}-ours-2.5",
            "`--recipe paper-v1`": f"{QWEN}-paper-v1",
            "GPTQModel, 3 bits, group 128, act_order": f"{QWEN}-gptq-3",
            "ggml Q2_K with an importance matrix, padded": f"{QWEN}-Q2_K-padded-imatrix",
        },
    ),
    "prototype": (
        "SmolLM2, the first 8 windows, and in brackets what the prototype had",
        ("bits", "wiki", "KL wiki"),
        beside_the_prototype(
            SMOLLM2,
            8,
            {
                "16-bit": ("16-bit", "29.2"),
                OURS: ("ours-2.9", "2.906 bits: 62.7, with its search"),
                "`--damp 0.01`": ("ours-2.9-damp-0.01", "the same"),
                "`--damp 0.01 --ranges minmax`": ("ours-2.9-minmax", "103"),
                "`--damp 0.01 --order none`": ("ours-2.9-natural-order", "78.6; 198 with min-max"),
                "`--damp 0.01 --outliers 0.002`": ("ours-2.9-outliers", "2.97 bits: 61.1"),
                "`--damp 0.01 --outliers 0.005`": ("ours-2.9-more-outliers", "3.07 bits: 58.5"),
                "`--recipe paper-v1`": ("paper-v1", "strips by range, natural order: 2,561"),
                "`--recipe paper-v4`": ("paper-v4", "2.94 bits, another reading of it: 221"),
                "GPTQ, 3 bits, group 64, act_order": ("gptq-3", "its own: 77.2; 116 with min-max"),
            },
        ),
    ),
    "first-8-windows": (
        "Qwen2.5-Coder-0.5B, first 8 blocks, first 3 windows of C4, and in brackets the prototype on its text",
        ("c4", "KL c4"),
        beside_the_prototype(
            QWEN,
            3,
            {
                "16-bit": ("16-bit", "32.75"),
                OURS: ("ours-2.9-first-8", "39.7, with its search"),
                "`--damp 0.01 --ranges minmax`": ("ours-2.9-minmax-first-8", "35.8"),
                "GPTQ, 3 bits, group 128, act_order": ("gptq-3-first-8", "its own: 38.8; 37.1 with min-max"),
            },
        ),
    ),
    "first-8": (
        "Qwen2.5-Coder-0.5B",
        ("wiki", "plain", "c4"),
        {
            "16-bit": f"{QWEN}-16-bit",
            "first 8 blocks by GPTQModel, 3 bits, group 128, act_order (3.15 bits)": f"{QWEN}-gptq-3-first-8",
            "first 8 blocks by `bitshard quantize` (2.84 bits of its 2.91)": f"{QWEN}-ours-2.9-first-8",
            "the same, rounding damped by 1 %": f"{QWEN}-ours-2.9-damp-0.01-first-8",
            "damped by 1 %, with min-max ranges": f"{QWEN}-ours-2.9-minmax-first-8",
            "damped by 1 %, one fraction for all (2.91 bits)": f"{QWEN}-ours-2.9-one-fraction-first-8",
            "all 24 by GPTQModel": f"{QWEN}-gptq-3",
            "all 24 by `bitshard quantize`": f"{QWEN}-ours-2.9",
        },
    ),
    "ranges": (
        "",
        ("wiki", "plain", "c4", "KL wiki", "KL plain", "KL c4"),
        of_each_model({"min-max": "ours-2.9-minmax", "**the search**": "ours-2.9-damp-0.01"}),
    ),
}


def read(stem: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((RESULTS / f"{stem}.json").read_text())
    return row


def cell(row: dict[str, Any], column: str) -> str:
    """One number: of bits, a text's perplexity, divergence or agreement, a task's score, or nothing measured."""
    if column == "bits":
        padded = row.get("details", {}).get("bits_of_padded")  # tasks have no details
        return f"{row['bits']:.3f}" + (f" ({padded:.3f} padded)" if padded else "")
    if column in TASKS or column == "mean":
        values = [100 * score(row, task) for task in (TASKS if column == "mean" else [column])]
        return f"{mean(values):.1f}"
    kind, _, name = column.rpartition(" ")
    text = row["texts"].get(name)
    if not kind:
        return "" if text is None else f"{text['perplexity']:{',.0f' if text['perplexity'] >= 1000 else '.2f'}}"
    divergence = text and text.get("divergence")
    if not divergence:
        return ""
    return f"{divergence['mean_kl']:.3f}" if kind == "KL" else f"{100 * divergence['top1_agreement']:.1f} %"


def score(row: dict[str, Any], task: str) -> float:
    """Its accuracy by length of the answer where the task has that, else its accuracy."""
    values = {one["metric"]: one["value"] for one in row["tasks"] if one["task"] == task}
    return float(values.get("acc_norm", values["acc"]))


def table(head: str, columns: Sequence[str], rows: Iterable[tuple[str, dict[str, Any]]]) -> str:
    return markdown(head, columns, [(label, [cell(row, column) for column in columns]) for label, row in rows])


def markdown(head: str, columns: Sequence[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """Rows of a bold label are bold."""
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for label, cells in rows:
        if label.startswith("**`") and label.endswith("**"):
            cells = [f"**{one}**" if one else "" for one in cells]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "".join(line + "\n" for line in lines)


def named(label: str, row: dict[str, Any]) -> str:
    """The label with the group_size of what was quantized, where it has a place for that."""
    return label.format(group_size=row["details"].get("quantization_config", {}).get("group_size"))


def main_table(model: str) -> str:
    """All rows that are bitshard's or another program's at its best, the nearest to the 16-bit model first."""
    rows = []
    for name, label in LABELS.items():
        if (RESULTS / f"{model}-{name}.json").exists():
            row = read(f"{model}-{name}")
            rows.append((named(label, row), row))
    rows.sort(key=lambda row: float(cell(row[1], "KL wiki") or 0))
    texts = [text for text in TEXTS if text in ("wiki", "c4") or (text == "code" and model == QWEN)]
    return table(MODELS[model], ("bits", *texts, "KL wiki", "top-1 wiki"), rows)


def task_table(model: str) -> str:
    names = ("16-bit", "ours-2.9", "gptq-3")
    rows = [(named(LABELS[name], read(f"{model}-{name}")), read(f"tasks-{model}-{name}")) for name in names]
    return table(MODELS[model], ("bits", *TASKS, "mean"), rows)


def overview() -> str:
    """README.md's: every model in a column, perplexity on two texts in a cell."""
    lines = []
    for name, label in OVERVIEW.items():
        rows = [read(f"{model}-{name}") for model in MODELS]
        bits = sorted({f"{row['bits']:.2f}" for row in rows}, key=float)
        cells = [" to ".join(dict.fromkeys((bits[0], bits[-1])))]
        lines.append((label, cells + [f"{cell(row, 'wiki')}, {cell(row, 'c4')}" for row in rows]))
    return markdown("perplexity: wiki, c4", ("bits", *MODELS.values()), lines)


def tables() -> dict[str, str]:
    """By name."""
    return {
        "overview": overview(),
        **{model: main_table(model) for model in MODELS},
        **{f"tasks-{model}": task_table(model) for model in MODELS},
        **{
            name: table(head, columns, ((label, read(stem)) for label, stem in rows.items()))
            for name, (head, columns, rows) in OTHERS.items()
        },
    }


def written(document: str) -> str:
    """The document with each named table as it is now. KeyError for a name that is not known."""
    by_name = tables()
    return re.sub(r"(<!-- table (\S+) -->\n)(\|.*\n)*", lambda found: found[1] + by_name[found[2]], document)


def whole(model: str) -> str:
    """Every row of a model in texts, under its own name."""
    stems = sorted(path.stem for path in RESULTS.glob(f"{model}-*.json") if not path.stem.endswith("-windows"))
    rows = [(row["row"], row) for row in map(read, stems)]
    texts = [text for text in TEXTS if any(text in row["texts"] for _, row in rows)]
    return table(model, ("bits", *texts, "KL wiki", "top-1 wiki"), sorted(rows, key=lambda row: -row[1]["bits"]))


if __name__ == "__main__":
    if sys.argv[1:]:
        print("\n".join(map(whole, sys.argv[1:])))
    else:
        for document in DOCUMENTS:
            document.write_text(written(document.read_text()))
