"""README.md and docs/accuracy.md say what benchmarks/results/accuracy holds."""

import re
import runpy
from pathlib import Path

import pytest

TABLE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "accuracy" / "table.py"))
DOCUMENTS = [path.read_text() for path in TABLE["DOCUMENTS"]]


def test_every_table_is_that_of_the_rows() -> None:
    assert set(re.findall(r"<!-- table (\S+) -->", "".join(DOCUMENTS))) == set(TABLE["tables"]())
    assert [*map(TABLE["written"], DOCUMENTS)] == DOCUMENTS, "run benchmarks/accuracy/table.py"


def test_a_wrong_number_is_mended() -> None:
    wrong = DOCUMENTS[1].replace("| **41.06** |", "| **14.06** |")
    assert wrong != DOCUMENTS[1] == TABLE["written"](wrong)


def test_a_table_that_is_not_known() -> None:
    with pytest.raises(KeyError, match="colours"):
        TABLE["written"]("<!-- table colours -->\n| | a |\n")


def test_a_models_rows_under_their_own_names() -> None:
    rows = TABLE["whole"]("gemma-3-270m").splitlines()
    assert rows[2].startswith("| 16-bit | 16.000 | 19.00 |")
    assert sum(row.startswith("| ours-2.9 |") for row in rows) == 1
