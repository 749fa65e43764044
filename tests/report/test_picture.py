"""Pictures as files, and as elements of a page that need nothing from outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from fedlora.report.picture import Panel, Picture, Table, inline, label, save, spread_apart
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
