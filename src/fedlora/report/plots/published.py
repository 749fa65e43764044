"""Ours beside the published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedlora.report.answers import params, scored
from fedlora.report.contenders import Contender, Spread, by_place
from fedlora.report.looks import INK, QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import fold, limits, row_height
from fedlora.report.runs import published_row
from fedlora.report.units import headed, signed, within
from fedlora.tasks.metrics import Metric

CLOSE = 2.0  # percent points
SHARE = 0.05  # of a published number in another unit


@dataclass(frozen=True)
class Pair:
    """A contender and what was published for it, in points."""

    contender: Contender
    ours: Spread
    theirs: float
    spread: float | None
    upload_params: float | None

    @property
    def difference(self) -> float:
        return self.ours.mean - self.theirs

    @property
    def close(self) -> bool:
        return abs(self.difference) <= (CLOSE if self.contender.metric.unit == "%" else SHARE * abs(self.theirs))


def pairs(contenders: Sequence[Contender], published: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The contenders for which a score by the name of their metric was published."""
    out = []
    for contender in contenders:
        row = published_row(published, contender.runs[0].config)
        name = contender.metric.name
        if row and row.get(name) not in (None, "") and contender.final():
            spread, upload = (float(row[key]) if row.get(key) not in (None, "") else None for key in ("spread", "upload_params"))
            out.append(Pair(contender, scored(contender), float(row[name]), spread, upload))
    return out


def picture(contenders: Sequence[Contender], published: Sequence[Mapping[str, Any]]) -> Picture | None:
    """A row for each contender, ours and the published score on one scale, all of one metric; None where nothing was published."""
    found = pairs(contenders, published)
    if not found:
        return None
    by_contender = {id(pair.contender): pair for pair in found}
    panels = by_place([pair.contender for pair in found])
    metric = found[0].contender.metric
    axis = limits([x for pair in found for x in (pair.ours.low, pair.ours.high, pair.theirs)], metric.unit)
    gap = "points" if metric.unit == "%" else metric.unit
    scores = headed("ours", metric.unit), headed("published", metric.unit), headed("difference", gap)
    header = ("data", "method", *scores, "our upload", "published upload")
    rows = tuple(_row(pair) for pair in found)
    high = 0.9 + row_height([pair.contender.name for pair in found]) * max(map(len, panels.values()))
    return Picture(
        "published",
        _finding(found),
        f"Final test {metric.title}{within(metric.unit)}: ours filled, with its range over seeds, the published one hollow. "
        "Uploads in parameters.",
        tuple(
            Panel(where if len(panels) > 1 else "", partial(_paint, [by_contender[id(c)] for c in here], axis, metric), (4.4, high))
            for where, here in panels.items()
        ),
        (Table("Ours beside the published numbers, cell by cell", header, rows, heads=2),),
        columns=2,
    )


def _finding(found: Sequence[Pair]) -> str:
    metric = found[0].contender.metric
    worst = max(found, key=lambda pair: abs(pair.difference))
    where = worst.contender.at if len(by_place([pair.contender for pair in found])) > 1 else ""
    near, points = (f"{CLOSE:g} points", " points") if metric.unit == "%" else (f"{100 * SHARE:g} %", f" {metric.unit}".rstrip())
    return (
        f"{sum(pair.close for pair in found)} of {len(found)} cells are within {near} of the published {metric.title}; "
        f"{worst.contender.name}{where} differs most, by {signed(worst.difference, metric.unit)}{points}"
    )


def _row(pair: Pair) -> tuple[str, ...]:
    unit = pair.contender.metric.unit
    theirs, spread = (None if x is None else f"{x:.2f}" if unit == "%" else f"{x:.3g}" for x in (pair.theirs, pair.spread))
    upload = params(pair.upload_params) if pair.upload_params is not None else "–"
    return (
        pair.contender.where,
        pair.contender.name,
        str(pair.ours),
        f"{theirs} ± {spread}" if spread is not None else f"{theirs}",
        signed(pair.difference, unit),
        params(pair.contender.total("upload_params")),
        upload,
    )


def _paint(found: Sequence[Pair], limits: tuple[float, float], metric: Metric, axes: Any) -> None:
    for i, pair in enumerate(found):
        look = pair.contender.look
        axes.plot([pair.theirs, pair.ours.mean], [i, i], color="#b9c0c7", linewidth=2, zorder=1)
        axes.plot([pair.ours.low, pair.ours.high], [i, i], color=look.colour, linewidth=1)
        axes.plot(
            [pair.theirs], [i], marker="o", markersize=7, markerfacecolor="white", color=QUIET, linestyle="none", clip_on=False
        )
        axes.plot([pair.ours.mean], [i], marker="o", markersize=5.5, color=look.colour, linestyle="none", clip_on=False)
        text = signed(pair.difference, metric.unit)
        axes.text(1.02, i, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(found)), [fold(pair.contender.name) for pair in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(*limits)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{headed(f'test {metric.title}', metric.unit)}   (ours ●  published ○, right: difference)")
