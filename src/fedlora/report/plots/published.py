"""Ours beside the published numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedlora.report.answers import params, scored
from fedlora.report.contenders import Contender, Spread, by_place
from fedlora.report.looks import INK, QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import fold, percent_limits, row_height
from fedlora.report.runs import published_row

CLOSE = 2.0  # percent points


@dataclass(frozen=True)
class Pair:
    """A contender and what was published for it, in percent."""

    contender: Contender
    ours: Spread
    theirs: float
    spread: float | None
    upload_params: float | None

    @property
    def difference(self) -> float:
        return self.ours.mean - self.theirs


def pairs(contenders: Sequence[Contender], published: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The contenders that have a published accuracy."""
    out = []
    for contender in contenders:
        row = published_row(published, contender.runs[0].config)
        if row and row.get("accuracy") not in (None, "") and contender.final():
            spread, upload = (float(row[key]) if row.get(key) not in (None, "") else None for key in ("spread", "upload_params"))
            out.append(Pair(contender, scored(contender), float(row["accuracy"]), spread, upload))
    return out


def picture(contenders: Sequence[Contender], published: Sequence[Mapping[str, Any]]) -> Picture | None:
    """A row for each contender, ours and the published accuracy on one scale; None where nothing was published."""
    found = pairs(contenders, published)
    if not found:
        return None
    by_contender = {id(pair.contender): pair for pair in found}
    panels = by_place([pair.contender for pair in found])
    limits = percent_limits([x for pair in found for x in (pair.ours.low, pair.ours.high, pair.theirs)])
    header = ("data", "method", "ours, %", "published, %", "difference, points", "our upload", "published upload")
    rows = tuple(_row(pair) for pair in found)
    high = 0.9 + row_height([pair.contender.name for pair in found]) * max(map(len, panels.values()))
    return Picture(
        "published",
        _finding(found),
        "Final test accuracy in percent: ours filled, with its range over seeds, the published one hollow. Uploads in parameters.",
        tuple(
            Panel(where if len(panels) > 1 else "", partial(_paint, [by_contender[id(c)] for c in here], limits), (4.4, high))
            for where, here in panels.items()
        ),
        (Table("Ours beside the published numbers, cell by cell", header, rows, heads=2),),
        columns=2,
    )


def _finding(found: Sequence[Pair]) -> str:
    worst = max(found, key=lambda pair: abs(pair.difference))
    close = sum(abs(pair.difference) <= CLOSE for pair in found)
    where = worst.contender.at if len(by_place([pair.contender for pair in found])) > 1 else ""
    return (
        f"{close} of {len(found)} cells are within {CLOSE:g} points of the published accuracy; "
        f"{worst.contender.name}{where} differs most, by {_signed(worst.difference)} points"
    )


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _row(pair: Pair) -> tuple[str, ...]:
    theirs = f"{pair.theirs:.2f}" + (f" ± {pair.spread:.2f}" if pair.spread is not None else "")
    upload = params(pair.upload_params) if pair.upload_params is not None else "–"
    return (
        pair.contender.where,
        pair.contender.name,
        str(pair.ours),
        theirs,
        _signed(pair.difference),
        params(pair.contender.total("upload_params")),
        upload,
    )


def _paint(found: Sequence[Pair], limits: tuple[float, float], axes: Any) -> None:
    for i, pair in enumerate(found):
        look = pair.contender.look
        axes.plot([pair.theirs, pair.ours.mean], [i, i], color="#b9c0c7", linewidth=2, zorder=1)
        axes.plot([pair.ours.low, pair.ours.high], [i, i], color=look.colour, linewidth=1)
        axes.plot(
            [pair.theirs], [i], marker="o", markersize=7, markerfacecolor="white", color=QUIET, linestyle="none", clip_on=False
        )
        axes.plot([pair.ours.mean], [i], marker="o", markersize=5.5, color=look.colour, linestyle="none", clip_on=False)
        text = _signed(pair.difference)
        axes.text(1.02, i, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(found)), [fold(pair.contender.name) for pair in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(*limits)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("test accuracy, %   (ours ●  published ○, right: difference)")
