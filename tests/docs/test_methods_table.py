"""docs/methods.md is what `python -m fedlora.runs.costs docs/methods.md` writes."""

import re
from pathlib import Path

import pytest

from fedlora import methods
from fedlora.runs import costs

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def without_costs(row: str) -> str:
    return re.sub(r"(\| [\d.]+ ){4}\|", "|", row, count=1)


def test_every_method_has_its_row() -> None:
    rows, nothing = costs.rows_of(PAGE.read_text()), costs.Cost(0, 0)
    want = {name: costs._row(name, methods.find(name).FACTS, nothing, nothing) for name in methods.names()}
    old = sorted(name for name in {*rows, *want} if without_costs(rows.get(name, "")) != without_costs(want.get(name, "")))
    known = " ".join(name for name in old if name in want)
    assert not old, f"docs/methods.md is behind: python -m fedlora.runs.costs docs/methods.md --only {known}"
    assert list(rows) == methods.names()
    assert PAGE.read_text().splitlines()[: len(costs.HEADING)] == costs.HEADING


@pytest.mark.slow
def test_the_costs_are_measured() -> None:
    assert PAGE.read_text() == costs.table()
