"""Documents of the tasks beside this file, read from local copies: no hub, no cache."""

from __future__ import annotations

import bz2
import json
import os
from pathlib import Path
from typing import Any

import datasets

FOLDER = Path(os.environ.get("EVAL_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "assets" / "eval")


def json_lines(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """One document for each line."""
    with (FOLDER / file).open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def hellaswag(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The text file of llama.cpp's perplexity tool: six lines a document, namely context, gold and four endings."""
    lines = bz2.decompress((FOLDER / file).read_bytes()).decode("utf-8").splitlines()
    starts = range(0, len(lines) - 5, 6)
    return {
        "test": datasets.Dataset.from_list(
            [{"query": lines[i], "gold": int(lines[i + 1]), "choices": lines[i + 2 : i + 6]} for i in starts]
        )
    }
