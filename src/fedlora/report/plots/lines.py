"""Lines with a band, named at their right end."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.contenders import Contender, by_panel
from fedlora.report.looks import SOLID, Look
from fedlora.report.picture import spread_apart
from fedlora.report.plots.labels import Label, annotate

MOST = 8  # lines of a panel that are told apart; the worst ones of more are grey
LONGEST = 28  # characters of a line of a name
LINE_HEIGHT = 0.07  # of a label, as a share of the axes' height


@dataclass(frozen=True)
class Line:
    """x, y and the band [low, high], all (points,)."""

    name: str
    look: Look
    x: NDArray[Any]
    y: NDArray[Any]
    low: NDArray[Any] | None = None
    high: NDArray[Any] | None = None


def draw(axes: Any, lines: Sequence[Line], limits: tuple[float, float], beside: bool = False, better: str = "higher") -> None:
    """The lines and their names: in the right margin at the height where they end, or, where lines end apart, beside their ends."""
    order = sorted(lines, key=lambda line: float(line.y[-1]), reverse=better == "higher")
    named = set(map(id, order[:MOST]))
    for line in reversed(order):
        if id(line) not in named:
            axes.plot(line.x, line.y, color="#c4c9cf", linewidth=1, zorder=1, gid="rest")
            continue
        look, every = line.look, max(1, math.ceil(len(line.x) / 8))
        axes.plot(
            line.x,
            line.y,
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markerfacecolor=look.face,
            markevery=((len(line.x) - 1) % every, every),
            label=line.name,
        )
        if line.low is not None and line.high is not None and (line.high > line.low).any():
            axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.15, linewidth=0)
    axes.set_ylim(*limits)
    axes.grid(axis="y")
    shown = [line for line in lines if id(line) in named]
    if beside:
        _name_beside(axes, shown)
    else:
        _name_in_margin(axes, shown, limits)


def _name_beside(axes: Any, lines: Sequence[Line]) -> None:
    ends = [(float(line.x[-1]), float(line.y[-1])) for line in lines]
    labels = [Label(*end, fold(line.name), line.look.text) for line, end in zip(lines, ends, strict=True)]
    annotate(axes, labels, ends, [list(zip(line.x, line.y, strict=True)) for line in lines])


def _name_in_margin(axes: Any, lines: Sequence[Line], limits: tuple[float, float]) -> None:
    """Names at the right margin, far enough apart to be read, tied to the lines' ends by thin strokes."""
    low, high = limits
    ends = [float(np.clip(line.y[-1], low, high)) for line in lines]
    deepest = max(fold(line.name).count("\n") for line in lines) + 1
    places = spread_apart(ends, LINE_HEIGHT * deepest * (high - low), low, high)
    for line, end, place in zip(lines, ends, places, strict=True):
        axes.annotate(
            fold(line.name),
            (line.x[-1], end),
            xytext=(1.03, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            ha="left",
            fontsize=8.5,
            color=line.look.text,
            arrowprops={
                "arrowstyle": "-",
                "color": line.look.colour,
                "linewidth": 0.6,
                "linestyle": SOLID,
                "shrinkA": 0,
                "shrinkB": 2,
            },
            annotation_clip=False,
        )


def fold(name: str) -> str:
    """A name in lines that are short enough for a picture."""
    return "\n".join(textwrap.wrap(name, LONGEST)) or name


def row_height(names: Sequence[str]) -> float:
    """Inches of a row of a bar chart whose rows have these names."""
    return 0.11 + 0.135 * max(fold(name).count("\n") + 1 for name in names)


def panel_size(contenders: Sequence[Contender]) -> tuple[float, float]:
    """Wide enough for the names beside the lines, in inches."""
    longest = max(len(line) for contender in contenders for line in fold(contender.line).split("\n"))
    return 4.1 + 0.065 * max(0, longest - 10), 3.0


def columns(contenders: Sequence[Contender]) -> int:
    """Panels side by side where there is one for each place and rank: ranks in columns, as far as they fit."""
    ranks, panels = len({contender.rank for contender in contenders}), len(by_panel(contenders))
    return {1: 2 if panels in (2, 4) else 3, 3: 3}.get(ranks, 2)


def limits(values: Sequence[float], unit: str) -> tuple[float, float]:
    """Of an axis around scores: whole tens of percent, or somewhat more than their range, from 0 where that is not far."""
    if unit == "%":
        return percent_limits(values)
    if not len(values):
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    return (0.0 if 0 <= low <= high / 2 else low - room), high + room


def percent_limits(values: Sequence[float], step: int = 10) -> tuple[float, float]:
    """Limits in whole tens around percentages, from 0 unless all are high."""
    if not len(values):
        return 0.0, 100.0
    low, high = min(values), max(values)
    top = min(100.0, step * math.ceil((high + 1) / step))
    return (0.0 if low < 50 else step * math.floor((low - 1) / step)), top


def upload_axis(axes: Any, values: Sequence[float], left: float, right: float) -> None:
    """A log axis of megabytes around `values`, by the factors `left` and `right` wider; linear where one of them is 0.

    Its ticks are plain numbers: decades, or 1, 2 and 5 where there are few of them.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel("uploaded by all clients, MB")
    low, high = min(values), max(values)
    if low <= 0:
        axes.set_xlim(0, high * right or 1)
        return
    axes.set_xscale("log")
    axes.set_xlim(low / left, high * right)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def round_axis(axes: Any) -> None:
    axes.set_xlabel("round")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # of one round, its own tick alone
