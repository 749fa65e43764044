"""How far the average of the factors is from the average of the updates, by round: what motivates exact aggregation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedlora.report.contenders import Contender, by_panel, hardest, spread
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, panel_size, round_axis

ABOUT = (
    "Distance of mean(B)·mean(A) from mean(B·A) in percent of the round's mean update (Frobenius norm, all modules): "
    "the error that averaging the factors apart makes, or would make, with these clients' updates."
)


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """A line for each contender; None where no round measured it."""
    lines = {id(contender): _line(contender) for contender in contenders}
    shown = [contender for contender in contenders if len(lines[id(contender)].x)]
    if not shown:
        return None
    panels = by_panel(shown)
    top = max(1.0, 1.08 * max(float(lines[id(contender)].y.max()) for contender in shown))
    here = [contender for contender in shown if contender.where == hardest(shown)]
    worst = max(here, key=lambda contender: float(lines[id(contender)].y[-1]))
    last = lines[id(worst)]
    exact = [contender.line for contender in here if not lines[id(contender)].y.any()]
    at = worst.at if len(panels) > 1 else ""
    finding = f"Averaging {worst.name}'s factors apart misses the mean update by {last.y[-1]:.0f} %{at} in round {last.x[-1]}"
    if not last.y.any():
        finding = "Averaging the factors apart loses nothing here: in no round did both factors move"
    elif exact:
        finding += f"; for {' and '.join(dict.fromkeys(exact))} it is exact"
    rounds = sorted({int(t) for contender in shown for t in lines[id(contender)].x})
    rows = []
    for contender in shown:
        at_round = dict(zip(map(int, lines[id(contender)].x), lines[id(contender)].y, strict=True))
        rows.append((contender.where, contender.name, *(f"{at_round[t]:.2f}" if t in at_round else "–" for t in rounds)))
    return Picture(
        "discordance",
        finding,
        ABOUT,
        tuple(
            Panel(
                name if len(panels) > 1 else "",
                partial(_paint, [lines[id(contender)] for contender in group], top),
                panel_size(shown),
            )
            for name, group in panels.items()
        ),
        (Table("Discordance in percent", ("data", "method", *(f"round {t}" for t in rounds)), tuple(rows), heads=2),),
        columns(shown),
    )


def _line(contender: Contender) -> Line:
    by_round: dict[int, list[float]] = {}
    for run in contender.runs:
        for row in run.rows:
            if row.get("discordance") is not None:
                by_round.setdefault(row["round"], []).append(100 * row["discordance"])
    spreads = [(t, s) for t, values in sorted(by_round.items()) if (s := spread(values))]
    columns = [np.array([getattr(s, field) for _, s in spreads]) for field in ("mean", "low", "high")]
    return Line(contender.line, contender.look, np.array([t for t, _ in spreads], dtype=int), *columns)


def _paint(lines: Sequence[Line], top: float, axes: Any) -> None:
    draw(axes, lines, (0, top))
    round_axis(axes)
    axes.set_ylabel("discordance, %")
