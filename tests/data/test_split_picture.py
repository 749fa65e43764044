"""The picture of a split is drawn for every shape that a split can have, and its title says what it shows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.partition import Parts, dirichlet, iid
from fedlora.report import split as picture


def dataset(classes: int, each: int, names: tuple[str, ...] | None = None) -> Dataset:
    labels = np.arange(classes * each, dtype=np.int64) % classes
    part = Split(tuple("text" for _ in labels), labels)
    return Dataset("toy", part, part, Schema(names or tuple(f"class {c}" for c in range(classes))))


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (10, 20), (30, 77), pytest.param(300, 200, marks=pytest.mark.slow)])
def test_a_picture_of_every_size(tmp_path: Path, clients: int, classes: int) -> None:
    data = dataset(classes, 30)
    picture.plot_split(dirichlet(data, clients, 0.1, 1, 0), data, tmp_path / "split.png")
    height, width, _ = image.imread(tmp_path / "split.png").shape
    assert 500 < height < 2600
    assert 1000 < width < 3000


def test_names_that_are_mathematics_long_or_in_another_script(tmp_path: Path) -> None:
    data = dataset(3, 4, ("costs $5 and $", "x" * 300, "猫"))
    parts = Parts((np.arange(12),), (np.arange(0),), ("$a_$b",), "by column '$'")
    picture.plot_split(parts, data, tmp_path / "split.png")
    assert image.imread(tmp_path / "split.png").shape[1] < 3000


def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from now on."""
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    return figures


def test_what_is_drawn_does_not_grow_with_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand lines and bars thinner than a pixel took half a minute and 700 MB."""
    figures = kept(monkeypatch)
    for clients in (400, 4000):
        data = dataset(20, clients // 4)
        picture.plot_split(iid(data, clients, 0), data, tmp_path / "split.png")
    few, many = (len(figure.findobj()) for figure in figures)
    assert many <= few + 200


def draw(path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int = 0, kind: str = "classes") -> Figure:
    """The figure for two clients: 3 and 2 training examples, of the classes 0, 1, 2 and of 0 alone."""
    figures = kept(monkeypatch)
    data = Dataset("toy", Split(("",) * 5, np.array([0, 1, 2, 0, 0])), Split(("",), np.array([1])), Schema(("x", "y", "z")))
    parts = Parts(
        (np.array([0, 1, 2]), np.array([3, 4])), (np.array([0]), np.array([], dtype=np.int64)), ("a", "b"), "Dirichlet(0.5)"
    )
    picture.plot_split(replace(parts, held_out=held_out), replace(data, strata_kind=kind), path)
    return figures[0]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    return draw(tmp_path / "split.png", monkeypatch)


def test_the_title_says_the_finding(drawn: Figure) -> None:
    assert drawn.get_suptitle() == "toy, Dirichlet(0.5): clients hold 1 to 3 of 3 classes, 2 to 3 examples"


def test_what_is_drawn(drawn: Figure) -> None:
    grid, sizes = drawn.axes[:2]
    shown = grid.images[0].get_array()
    assert np.array_equal(shown.filled(0), [[1, 1, 1], [2, 0, 0]])
    assert np.array_equal(shown.mask, [[False, False, False], [False, True, True]])  # none is white
    assert [label.get_text() for label in grid.get_xticklabels()] == ["x", "y", "z"]
    assert [label.get_text() for label in grid.get_yticklabels()] == ["a", "b"]
    assert [bar.get_width() for bar in sizes.patches] == [3, 2, 1, 0]


def test_who_is_held_out_stands_below_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Figure) -> None:
    figure = draw(tmp_path / "split.png", monkeypatch, 1)
    assert figure.get_suptitle().replace("\n", " ") == (
        "toy, Dirichlet(0.5): clients hold 1 to 3 of 3 classes, 2 to 3 examples; those below the line, 1 of 2, never train"
    )
    for axes, plain in zip(figure.axes[:2], drawn.axes[:2], strict=True):
        (line,) = axes.lines
        assert list(line.get_ydata()) == [0.5, 0.5] and not plain.lines  # between the first client, at 0, and the second


def test_a_range_of_one_is_a_number(tmp_path: Path) -> None:
    data = dataset(2, 600)
    assert picture._finding(iid(data, 1, 0), data) == "toy, IID: clients hold 2 of 2 classes, 1,200 examples"


def test_strata_are_called_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Figure) -> None:
    assert drawn.axes[2].get_xlabel() == "training examples of a class (white: none)"
    figure = draw(tmp_path / "split.png", monkeypatch, kind="tenths of the numbers")
    assert figure.get_suptitle() == "toy, Dirichlet(0.5): clients hold 1 to 3 of 3 tenths of the numbers, 2 to 3 examples"
    assert figure.axes[2].get_xlabel() == "training examples of a tenth of the numbers (white: none)"
