"""docs/methods.md is what `python -m fedlora.runs.costs` prints."""

import re
from pathlib import Path

import pytest

from fedlora import methods
from fedlora.runs import costs

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def without_costs(row: str) -> str:
    return re.sub(r"(\| [\d.]+ ){4}\|", "|", row, count=1)


def test_every_method_has_its_row() -> None:
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| `")]
    nothing = costs.Cost(0, 0)
    want = [costs._row(name, methods.find(name).FACTS, nothing, nothing) for name in methods.names()]
    assert [without_costs(row) for row in rows] == [without_costs(row) for row in want]
    assert PAGE.read_text().splitlines()[: len(costs.HEADING)] == costs.HEADING


@pytest.mark.slow
def test_the_costs_are_measured() -> None:
    assert PAGE.read_text() == costs.table()
