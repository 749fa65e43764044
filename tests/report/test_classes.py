"""Class by class: scores by hand, the map and the pairs that are confused most."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedlora.report.contenders import contenders
from fedlora.report.picture import Picture
from fedlora.report.plots import classes
from fedlora.report.runs import comparison, read

Write = Callable[..., Path]
COUNTS = np.array([[8, 2, 0], [4, 4, 0], [1, 0, 0]])  # rows: true class; nothing is taken for c


def show(write: Write, tmp_path: Path, counts: Any, **more: Any) -> Picture | None:
    names = [f"{'abcdefgh'[i % 8]}{i // 8 or ''}" for i in range(len(counts))]
    arrays = {t: {"confusion": x} for t, x in {2: counts, **more.pop("others", {})}.items()}
    folder = write(tmp_path / "run", {}, [0.1, 0.2, 0.3], arrays=arrays, label_names=names, **more)
    return classes.picture(contenders(comparison([read(folder)])))


def test_scores() -> None:
    """a: 8 right of 10, and of 13 predicted; c occurs, but is never predicted."""
    found = classes.scores(COUNTS)
    assert found.precision[:2] == pytest.approx([8 / 13, 4 / 6])
    assert np.isnan(found.precision[2])
    assert found.recall == pytest.approx([0.8, 0.5, 0.0])
    assert found.f1 == pytest.approx([16 / 23, 8 / 14, 0.0])
    assert found.examples.tolist() == [10, 8, 1]
    absent = classes.scores(np.array([[1, 0], [0, 0]]))
    assert np.isnan([absent.recall[1], absent.f1[1]]).all()


def test_worst_class_first(write: Write, tmp_path: Path) -> None:
    picture = show(write, tmp_path, COUNTS)
    assert picture is not None
    assert picture.finding == "Worst class: c with F1 0.0 %, best a with 69.6 %; b is taken for a most often, 4 times"
    assert picture.about.endswith("Shown: LoRA-A², after round 2.")
    scores, confused = picture.tables
    assert scores.rows == (
        ("c", "–", "0.0", "0.0", "1"),
        ("b", "66.7", "50.0", "57.1", "8"),
        ("a", "61.5", "80.0", "69.6", "10"),
    )
    assert confused.rows == (("b", "a", "4"), ("a", "b", "2"), ("c", "a", "1"))
    axes = Figure().subplots()
    picture.panels[0].draw(axes)
    assert axes.images[0].get_array().tolist() == [[80, 20, 0], [50, 50, 0], [100, 0, 0]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]


def test_the_round_that_is_reported(write: Write, tmp_path: Path) -> None:
    picture = show(write, tmp_path, COUNTS, others={3: COUNTS[:, ::-1].copy()}, written=2)
    assert picture is not None
    assert picture.about.endswith("after round 2.")


def test_of_many_classes_the_pairs_confused_most(write: Write, tmp_path: Path) -> None:
    counts = np.diag(np.full(31, 9))
    counts[3, 30], counts[30, 3], counts[0, 1] = 7, 2, 5
    picture = show(write, tmp_path, counts)
    assert picture is not None
    axes = Figure().subplots()
    picture.panels[0].draw(axes)
    assert [bar.get_width() for bar in axes.patches] == [7, 5, 2]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["d → g3", "a → b", "g3 → d"]
    assert len(picture.tables[0].rows) == 31


def test_several_methods_are_compared_class_by_class(write: Write, tmp_path: Path) -> None:
    runs = []
    for name, accuracy, counts in (("fedit", 0.5, [[3, 1], [2, 2]]), ("lora-a2", 0.9, [[4, 0], [0, 4]])):
        arrays = {1: {"confusion": np.array(counts)}}
        runs.append(read(write(tmp_path / name, {"method": {"name": name}}, [accuracy], arrays=arrays)))
    picture = classes.picture(contenders(comparison(runs)))
    assert picture is not None
    assert picture.finding.endswith("no two classes are confused")  # of the more accurate
    assert picture.tables[1].header == ("class", "LoRA-A²", "FedIT")
    assert picture.tables[1].rows == (("a", "100.0", "66.7"), ("b", "100.0", "57.1"))  # 6 / 9 and 4 / 7


def test_older_runs_have_none(write: Write, tmp_path: Path) -> None:
    assert classes.picture(contenders(comparison([read(write(tmp_path / "run", {}, [0.5]))]))) is None
