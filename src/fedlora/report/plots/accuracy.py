"""Accuracy by round, and by what was uploaded until then."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlora.report.answers import answers, params, scored, size
from fedlora.report.contenders import Cell, Curve, by_panel, hardest, joined
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, panel_size, percent_limits, round_axis, upload_axis


def pictures(cells: Sequence[Cell]) -> list[Picture]:
    """By round and by uploaded bytes; none where nothing was scored."""
    curves = {id(cell): cell.curve() for cell in cells}
    shown = [cell for cell in cells if len(curves[id(cell)].rounds)]
    if not shown:
        return []
    limits = percent_limits([x for cell in shown for x in (*curves[id(cell)].low, *curves[id(cell)].high)])
    panels = by_panel(shown)
    seeds = max(len(cell.runs) for cell in shown)
    band = f" Lines are means over {seeds} seeds, bands go from the lowest to the highest." if seeds > 1 else " One seed."
    uploads = "megabytes uploaded by all clients so far (log axis)"
    sides = (
        (_by_round, "accuracy-by-round", _ends(shown), "round", _table(shown, curves)),
        (_by_upload, "accuracy-by-upload", _costs(shown), uploads, _uploads(shown, curves)),
    )
    box = panel_size(shown)
    return [
        Picture(
            name,
            finding,
            f"Test accuracy in percent by {x}.{band}",
            tuple(
                Panel(heading if len(panels) > 1 else "", partial(paint, [(c, curves[id(c)]) for c in here], limits), box)
                for heading, here in panels.items()
            ),
            (table,),
            columns(shown),
        )
        for paint, name, finding, x, table in sides
    ]


def _by_round(curves: Sequence[tuple[Cell, Curve]], limits: tuple[float, float], axes: Any) -> None:
    lines = [Line(cell.line, cell.look, c.rounds, c.mean, c.low, c.high) for cell, c in curves]
    draw(axes, lines, limits)
    round_axis(axes)
    axes.set_ylabel("test accuracy, %")


def _by_upload(curves: Sequence[tuple[Cell, Curve]], limits: tuple[float, float], axes: Any) -> None:
    lines = []
    for cell, c in curves:
        sent = (c.megabytes > 0) | (c.megabytes[-1] == 0)  # a log axis has no place for rounds before the first upload
        lines.append(Line(cell.line, cell.look, *(x[sent] for x in (c.megabytes, c.mean, c.low, c.high))))
    upload_axis(axes, [x for line in lines for x in line.x], left=1.3, right=1.5)
    draw(axes, lines, limits, beside=True)
    axes.set_ylabel("test accuracy, %")


def _ends(cells: Sequence[Cell]) -> str:
    found = answers(cells)
    if not found:
        return "Accuracy by round: every run has diverged"
    where = hardest([cell for answer in found for cell in answer.cells])
    here = next(answer for answer in found if answer.where == where)
    place = here.best.at if len(found) > 1 else ""
    if any(run.validated for run in here.best.runs):
        first = f"{here.best.name} has {here.accuracy.mean:.1f} % in the round that validation chose"
    else:
        ends = "end" if len(here.leaders) > 1 else "ends"
        first = f"{joined([cell.name for cell in here.leaders])} {ends} at {here.accuracy.mean:.1f} %"
    last = here.cells[-1]
    return (first if last in here.leaders else f"{first}, {last.name} at {scored(last).mean:.1f} %") + place


def _costs(cells: Sequence[Cell]) -> str:
    found = answers(cells)
    where = hardest([cell for answer in found for cell in answer.cells] or cells)
    here = next((answer for answer in found if answer.where == where), None)
    if here is None or not here.reached:
        return "Accuracy by upload"
    (first, least), equal = here.reached[0], here.cheapest
    place = here.best.at if len(found) > 1 else ""
    uploads = "upload" if len(equal) > 1 else "uploads"
    text = f"To reach {here.target} %{place}, {joined([cell.name for cell in equal])} {uploads} {size(least)}"
    others = here.reached[len(equal) :]
    others = tuple((cell, cost) for cell, cost in others if cell.method != first.method) or others
    if others:
        return f"{text}, next {others[0][0].name} {size(others[0][1])}"
    return f"{text}; no other gets there" if len(here.cells) > len(equal) else text


def _table(cells: Sequence[Cell], curves: dict[int, Curve]) -> Table:
    rounds = sorted({int(t) for cell in cells for t in curves[id(cell)].rounds})
    rows = []
    for cell in cells:
        c = curves[id(cell)]
        at = dict(zip(map(int, c.rounds), zip(c.mean, c.low, c.high, strict=True), strict=True))
        rows.append((cell.where, cell.name, *(_score(*at[t]) if t in at else "–" for t in rounds)))
    caption = "Test accuracy in percent after each scored round"
    if any(len(cell.runs) > 1 for cell in cells):
        caption += ": mean over seeds (lowest to highest)"
    return Table(caption, ("data", "method", *(f"round {t}" for t in rounds)), tuple(rows), heads=2)


def _score(mean: float, low: float, high: float) -> str:
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _uploads(cells: Sequence[Cell], curves: dict[int, Curve]) -> Table:
    rounds = sorted({int(t) for cell in cells for t in curves[id(cell)].rounds})
    rows = []
    for cell in cells:
        c = curves[id(cell)]
        at = dict(zip(map(int, c.rounds), c.megabytes, strict=True))
        rows.append((cell.where, cell.name, *(f"{at[t]:.3f}" if t in at else "–" for t in rounds), params(c.params[-1])))
    caption = "Megabytes uploaded by all clients until each scored round; the accuracy there is in the table above"
    return Table(caption, ("data", "method", *(f"round {t}" for t in rounds), "parameters in all"), tuple(rows), heads=2)
