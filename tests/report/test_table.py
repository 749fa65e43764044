"""The tables of a split on the terminal."""

import numpy as np
import pytest

from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.partition import Parts
from fedlora.report.table import print_split


def part(*labels: int) -> Split:
    return Split(("text",) * len(labels), np.array(labels, dtype=np.int64))


def lines(capsys: pytest.CaptureFixture[str], parts: Parts, data: Dataset) -> list[str]:
    capsys.readouterr()
    print_split(parts, data)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def rows(*each: list[int]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(mine, dtype=np.int64) for mine in each)


def test_validation_has_a_column_where_there_is_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    data = Dataset("mine", part(0, 1, 1), part(0, 1), Schema(("x", "y")), ("a note",), validation=part(0, 1, 1, 0))
    parts = Parts(rows([0], [1, 2]), rows([0], [1]), ("al", "bo"), "IID", rows([0, 1, 2], [3]))
    found = lines(capsys, parts, data)
    assert "note: a note" in found
    assert "mine: 3 training, 2 test and 4 validation examples of 2 classes, IID, 2 clients" in found
    assert "al x (100%) 1 1 1 1 3" in found and "bo y (100%) 2 1 1 1 1" in found
    assert "most examples 2 1 3" in found and "fewest classes 1 1 1" in found
    assert not any("held out" in line for line in found)
    plain = lines(
        capsys, Parts(parts.train, parts.test, parts.names, "IID"), Dataset("mine", data.train, data.test, Schema(("x", "y")))
    )
    assert "mine: 3 training and 2 test examples of 2 classes, IID, 2 clients" in plain
    assert "al x (100%) 1 1 1 1" in plain and not any("validation" in line for line in plain)


def test_who_is_held_out_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    data = Dataset("mine", part(0, 1, 1), part(0, 1), Schema(("x", "y")))
    found = lines(capsys, Parts(rows([0], [1], [2]), rows([0], [1], []), ("al", "bo", "cy"), "IID", held_out=2), data)
    assert "mine: 3 training and 2 test examples of 2 classes, IID, 3 clients, 2 of them held out" in found
    assert "al x (100%) 1 1 1 1" in found
    assert "bo (held out) y (100%) 1 1 1 1" in found and "cy (held out) y (100%) 1 1 0 0" in found
