"""Names beside points, where they cover neither each other nor a point."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

FONT = 8.0
GLYPH = 0.58 * FONT  # the mean width of a character, points
MARK = 9.0  # the side of a point's marker, points
STROKE = 4.0  # the side of the boxes that stand for a line


Boxes = NDArray[np.float64]  # (..., 4): left, bottom, right, top, in points (1/72 inch)


@dataclass(frozen=True)
class Label:
    """Text for the point (x, y) in data units."""

    x: float
    y: float
    text: str
    colour: str


def annotate(
    axes: Any, labels: Sequence[Label], points: Sequence[tuple[float, float]], strokes: Sequence[Sequence[tuple[float, float]]] = ()
) -> None:
    """Write the labels; the axes' limits and scales must be final. Marks at `points` and lines along `strokes` are kept clear."""
    from matplotlib.transforms import Bbox

    inner: Bbox = axes.get_position()
    size = axes.figure.get_size_inches()
    wide, high = 72 * size[0] * inner.width, 72 * size[1] * inner.height
    to_axes = axes.transData + axes.transAxes.inverted()

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = to_axes.transform((x, y))
        return float(u) * wide, float(v) * high

    marks = [box(*place(x, y), MARK, MARK) for x, y in points]
    lines = [box(*spot, STROKE, STROKE) for stroke in strokes for spot in _along([place(x, y) for x, y in stroke])]
    frame = np.array([0, 0, wide, high])
    chosen = arrange([(*place(label.x, label.y), label.text) for label in labels], [*marks, *lines], frame)
    for label, (dx, dy) in zip(labels, chosen, strict=True):
        far = math.hypot(dx, dy) > 2.5 * MARK
        axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=FONT,
            color=label.colour,
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3} if far else None,
        )


def arrange(labels: Sequence[tuple[float, float, str]], taken: Sequence[Boxes], frame: Boxes) -> list[tuple[float, float]]:
    """For each label (x, y, text), all in points, the offset of its centre from its point: near, within the frame, and over as
    little as can be of the boxes that are taken and of the labels before."""
    taken, out = list(taken), []
    for x, y, text in labels:
        lines = text.split("\n")
        wide, high = GLYPH * max(map(len, lines)), (FONT + 2) * len(lines)
        offsets = _offsets(wide, high)
        boxes = box(x + offsets[:, 0], y + offsets[:, 1], wide, high)
        covered = overlap(boxes[:, None], np.array(taken)).sum(1) if taken else 0
        outside = wide * high - overlap(boxes, frame)
        best = int(np.argmin(10 * covered + 6 * outside + 0.2 * np.hypot(*offsets.T)))
        taken.append(boxes[best])
        out.append((float(offsets[best, 0]), float(offsets[best, 1])))
    return out


def overlap(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """The area that boxes have in common, broadcast."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.asarray(np.clip(sides, 0, None).prod(-1))


def box(x: Any, y: Any, wide: float, high: float) -> Boxes:
    """The boxes around centres."""
    return np.stack([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2], axis=-1)


def _along(stroke: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Places along a line of straight pieces, no farther apart than the side of their boxes."""
    for (x0, y0), (x1, y1) in pairwise(stroke):
        count = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / STROKE))
        yield from ((x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count))


def _offsets(wide: float, high: float) -> NDArray[np.float64]:
    """Around the point, right first, then farther away: (places, 2)."""
    angle, distance = np.meshgrid(np.linspace(0, 2 * np.pi, 16, endpoint=False), [MARK / 2 + 2, 14, 24, 36, 50])
    return np.stack([(distance + wide / 2) * np.cos(angle), (distance + high / 2) * np.sin(angle)], axis=-1).reshape(-1, 2)
