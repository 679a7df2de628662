"""docs/accuracy.md says what benchmarks/results/accuracy holds."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "accuracy.md").read_text()
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "accuracy" / "table.py"))


def test_every_table_is_that_of_the_rows() -> None:
    assert set(re.findall(r"<!-- table (\S+) -->", DOCUMENT)) == set(TABLE["tables"]())
    assert TABLE["written"](DOCUMENT) == DOCUMENT, "run benchmarks/accuracy/table.py"


def test_a_wrong_number_is_mended() -> None:
    wrong = DOCUMENT.replace("| **41.06** |", "| **14.06** |")
    assert wrong != DOCUMENT == TABLE["written"](wrong)


def test_a_table_that_is_not_known() -> None:
    with pytest.raises(KeyError, match="colours"):
        TABLE["written"]("<!-- table colours -->\n| | a |\n")


def test_a_models_rows_under_their_own_names() -> None:
    rows = TABLE["whole"]("gemma-3-270m").splitlines()
    assert rows[2].startswith("| 16-bit | 16.000 | 19.00 |")
    assert sum(row.startswith("| ours-2.9 |") for row in rows) == 1
