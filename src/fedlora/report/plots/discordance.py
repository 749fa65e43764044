"""How far the average of the factors is from the average of the updates, by round: what motivates exact aggregation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedlora.report.contenders import Cell, by_panel, hardest, spread
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, panel_size, round_axis

ABOUT = (
    "Distance of mean(B)·mean(A) from mean(B·A) in percent of the round's mean update (Frobenius norm, all modules): "
    "the error that averaging the factors apart makes, or would make, with these clients' updates."
)


def picture(cells: Sequence[Cell]) -> Picture | None:
    """A line for each contender; None where no round measured it."""
    lines = {id(cell): _line(cell) for cell in cells}
    shown = [cell for cell in cells if len(lines[id(cell)].x)]
    if not shown:
        return None
    panels = by_panel(shown)
    top = max(1.0, 1.08 * max(float(lines[id(cell)].y.max()) for cell in shown))
    here = [cell for cell in shown if cell.where == hardest(shown)]
    worst = max(here, key=lambda cell: float(lines[id(cell)].y[-1]))
    last = lines[id(worst)]
    exact = [cell.line for cell in here if not lines[id(cell)].y.any()]
    at = worst.at if len(panels) > 1 else ""
    finding = f"Averaging {worst.name}'s factors apart misses the mean update by {last.y[-1]:.0f} %{at} in round {last.x[-1]}"
    if not last.y.any():
        finding = "Averaging the factors apart loses nothing here: in no round did both factors move"
    elif exact:
        finding += f"; for {' and '.join(dict.fromkeys(exact))} it is exact"
    rounds = sorted({int(t) for cell in shown for t in lines[id(cell)].x})
    rows = []
    for cell in shown:
        at_round = dict(zip(map(int, lines[id(cell)].x), lines[id(cell)].y, strict=True))
        rows.append((cell.where, cell.name, *(f"{at_round[t]:.2f}" if t in at_round else "–" for t in rounds)))
    return Picture(
        "discordance",
        finding,
        ABOUT,
        tuple(
            Panel(name if len(panels) > 1 else "", partial(_paint, [lines[id(cell)] for cell in group], top), panel_size(shown))
            for name, group in panels.items()
        ),
        (Table("Discordance in percent", ("data", "method", *(f"round {t}" for t in rounds)), tuple(rows), heads=2),),
        columns(shown),
    )


def _line(cell: Cell) -> Line:
    by_round: dict[int, list[float]] = {}
    for run in cell.runs:
        for row in run.rows:
            if row.get("discordance") is not None:
                by_round.setdefault(row["round"], []).append(100 * row["discordance"])
    spreads = [(t, s) for t, values in sorted(by_round.items()) if (s := spread(values))]
    columns = [np.array([getattr(s, field) for _, s in spreads]) for field in ("mean", "low", "high")]
    return Line(cell.line, cell.look, np.array([t for t, _ in spreads], dtype=int), *columns)


def _paint(lines: Sequence[Line], top: float, axes: Any) -> None:
    draw(axes, lines, (0, top))
    round_axis(axes)
    axes.set_ylabel("discordance, %")
