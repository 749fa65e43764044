"""Pictures as files, and as elements of a page that need nothing from outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedlora.report.looks import Look
from fedlora.report.picture import Panel, Picture, Table, inline, label, save, spread_apart, wrap
from fedlora.report.plots import lines
from fedlora.report.plots.labels import arrange, box, overlap


def paint(axes: Any) -> None:
    axes.plot([1, 2], [3, 4], marker="o")
    axes.imshow(np.eye(2), extent=(0, 1, 0, 1))
    axes.set_xlabel("costs $5 & <b>")


PICTURE = Picture(
    "some-name", 'the "finding"', "how to read it", (Panel("one", paint), Panel("", paint)), (Table("t", ("a",), (("1",),)),)
)


def test_files(tmp_path: Path) -> None:
    save(PICTURE, tmp_path / "figures")
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"some-name.png", "some-name.svg"}
    height, width, _ = image.imread(tmp_path / "figures" / "some-name.png").shape
    assert width > 2 * height  # two panels side by side
    assert width == pytest.approx(150 * 2 * 4.1, abs=1)  # at 150 dots an inch
    assert (tmp_path / "figures" / "some-name.svg").read_text().startswith("<?xml")


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        save(PICTURE, tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / "first" / f"some-name.{kind}").read_bytes() == (tmp_path / "second" / f"some-name.{kind}").read_bytes()


def test_an_element_of_a_page() -> None:
    first, second = inline(PICTURE, 0), inline(PICTURE, 1)
    assert first.startswith("<svg viewBox=")
    for outside in ("http", "xmlns", "<metadata", "<?xml", "<!"):
        assert outside not in first
    assert 'role="img" aria-label="one: the &quot;finding&quot;. how to read it"' in first
    assert "costs $5 &amp; &lt;b&gt;" in first  # text stays text
    ids = [part.split('"')[0] for svg in (first, second) for part in svg.split(' id="')[1:]]
    assert ids  # clip paths
    assert len(set(ids)) == len(ids)


def test_a_label_without_a_heading() -> None:
    assert label(PICTURE, 1) == 'the "finding". how to read it'


def test_values_far_apart_stay() -> None:
    assert spread_apart([5.0, 1.0, 9.0], 2, 0, 10) == [5, 1, 9]


def test_close_values_are_spread_in_their_order() -> None:
    assert spread_apart([5.0, 5.0, 5.5], 2, 0, 10) == [5, 7, 9]
    assert spread_apart([9.5, 9.0], 2, 0, 10) == [10, 8]


@pytest.mark.parametrize("count", [1, 5, 40])
def test_there_is_always_room(count: int) -> None:
    placed = sorted(spread_apart([10.0] * count, 1, 0, 10))
    assert placed[0] >= -1e-9
    assert placed[-1] <= 10 + 1e-9
    assert len(set(placed)) == count


def test_labels_avoid_each_other_and_what_is_there() -> None:
    marks = [np.array([95.0, 95, 105, 105]), np.array([97.0, 95, 107, 105])]
    texts = [(100.0, 100.0, "first name"), (102.0, 100.0, "second name")]
    chosen = arrange(texts, marks, np.array([0.0, 0, 300, 200]))
    boxes = [box(x + dx, y + dy, 4.64 * len(text), 10.0) for (x, y, text), (dx, dy) in zip(texts, chosen, strict=True)]
    assert overlap(*boxes) == 0
    assert not [1 for one in boxes for mark in marks if overlap(one, mark)]


def test_overlap() -> None:
    assert overlap(box(0, 0, 4, 2), box(1, 1, 4, 2)) == 3  # 3 wide, 1 high
    assert overlap(box(0, 0, 4, 2), box(9, 0, 4, 2)) == 0
    assert overlap(box(0, 0, 4, 2), box(3, 3, 2, 2)) == 0  # apart in both directions


LONG = (
    "On the frontier at Dir(0.01), common model: WWWWWWWW rank 8, MMMMMMMMMM rank 16, FLexLoRA rank 32, LoRA-A² and 4 more methods"
)


def outside(figure: Figure) -> list[str]:
    """The texts of a figure, those at ticks apart, that are not wholly within it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    ticks = {id(text) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels(which="both")}
    boxes = {
        text.get_text(): text.get_window_extent() for text in figure.findobj(Text) if id(text) not in ticks and text.get_text()
    }
    return [text for text, box in boxes.items() if min(box.x0, box.y0) < -1 or box.x1 > width + 1 or box.y1 > height + 1]


@pytest.mark.parametrize("panels", [1, 2])
def test_titles_and_names_are_within_the_picture(panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a long title, of panels' headings and of the names of lines is seen."""
    look = Look("#000000", (0, ()), "o")
    names = [
        "LoRA-A² criterion magnitude lr = 0.0005 in attention.self.query",
        "Wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww",
    ]

    def draw(axes: Any) -> None:
        lines.draw(axes, [lines.Line(name, look, np.arange(3), np.arange(3.0) + i) for i, name in enumerate(names)], (0, 5))

    figures: list[Figure] = []
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda self, *_, **__: figures.append(self.figure))
    save(Picture("wide", LONG, "", tuple(Panel(f"{LONG} in panel {i}", draw) for i in range(panels)), ()), tmp_path)
    (figure,) = figures
    assert outside(figure) == []
    words = " ".join(text.get_text() for text in figure.findobj(Text)).split()
    assert "".join(words).count("".join(LONG.split())) == panels + 1
    assert all("".join(name.split()) in "".join(words) for name in names)


def test_a_text_is_wrapped_by_its_width() -> None:
    """In DejaVu Sans an i is narrower than a W; a word that is wider than a line is broken."""
    assert wrap("iiii iiii", 10, 50) == "iiii iiii"
    assert wrap("WWWW WWWW", 10, 50) == "WWWW\nWWWW"
    assert wrap("WWWWWWWW", 10, 50).replace("\n", "") == "WWWWWWWW"
    assert wrap("WWWWWWWW", 10, 50).count("\n") >= 1


def test_one_round_has_no_axis_of_fractions() -> None:
    for values, ticks in (([1], [1]), ([3], [3]), ([1, 2], [1, 2])):
        axes = Figure().subplots()
        axes.plot(values, values, marker="o")
        lines.round_axis(axes)
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == ticks
