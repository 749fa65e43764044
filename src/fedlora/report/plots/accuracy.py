"""Accuracy by round, and by what was uploaded until then."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlora.report.answers import answers, params, scored, size
from fedlora.report.contenders import Contender, Curve, by_panel, hardest, joined
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, panel_size, percent_limits, round_axis, upload_axis


def pictures(contenders: Sequence[Contender]) -> list[Picture]:
    """By round and by uploaded bytes; none where nothing was scored."""
    curves = {id(contender): contender.curve() for contender in contenders}
    shown = [contender for contender in contenders if len(curves[id(contender)].rounds)]
    if not shown:
        return []
    limits = percent_limits([x for contender in shown for x in (*curves[id(contender)].low, *curves[id(contender)].high)])
    panels = by_panel(shown)
    seeds = max(len(contender.runs) for contender in shown)
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


def _by_round(curves: Sequence[tuple[Contender, Curve]], limits: tuple[float, float], axes: Any) -> None:
    lines = [Line(contender.line, contender.look, c.rounds, c.mean, c.low, c.high) for contender, c in curves]
    draw(axes, lines, limits)
    round_axis(axes)
    axes.set_ylabel("test accuracy, %")


def _by_upload(curves: Sequence[tuple[Contender, Curve]], limits: tuple[float, float], axes: Any) -> None:
    lines = []
    for contender, c in curves:
        sent = (c.megabytes > 0) | (c.megabytes[-1] == 0)  # a log axis has no place for rounds before the first upload
        lines.append(Line(contender.line, contender.look, *(x[sent] for x in (c.megabytes, c.mean, c.low, c.high))))
    upload_axis(axes, [x for line in lines for x in line.x], left=1.3, right=1.5)
    draw(axes, lines, limits, beside=True)
    axes.set_ylabel("test accuracy, %")


def _ends(contenders: Sequence[Contender]) -> str:
    found = answers(contenders)
    if not found:
        return "Accuracy by round: every run has diverged"
    where = hardest([contender for answer in found for contender in answer.contenders])
    here = next(answer for answer in found if answer.where == where)
    place = here.best.at if len(found) > 1 else ""
    if any(run.validated for run in here.best.runs):
        first = f"{here.best.name} has {here.accuracy.mean:.1f} % in the round that validation chose"
    else:
        ends = "end" if len(here.leaders) > 1 else "ends"
        first = f"{joined([contender.name for contender in here.leaders])} {ends} at {here.accuracy.mean:.1f} %"
    last = here.contenders[-1]
    return (first if last in here.leaders else f"{first}, {last.name} at {scored(last).mean:.1f} %") + place


def _costs(contenders: Sequence[Contender]) -> str:
    found = answers(contenders)
    where = hardest([contender for answer in found for contender in answer.contenders] or contenders)
    here = next((answer for answer in found if answer.where == where), None)
    if here is None or not here.reached:
        return "Accuracy by upload"
    (first, least), equal = here.reached[0], here.cheapest
    place = here.best.at if len(found) > 1 else ""
    uploads = "upload" if len(equal) > 1 else "uploads"
    text = f"To reach {here.target} %{place}, {joined([contender.name for contender in equal])} {uploads} {size(least)}"
    others = here.reached[len(equal) :]
    others = tuple((contender, cost) for contender, cost in others if contender.method != first.method) or others
    if others:
        return f"{text}, next {others[0][0].name} {size(others[0][1])}"
    return f"{text}; no other gets there" if len(here.contenders) > len(equal) else text


def _table(contenders: Sequence[Contender], curves: dict[int, Curve]) -> Table:
    rounds = sorted({int(t) for contender in contenders for t in curves[id(contender)].rounds})
    rows = []
    for contender in contenders:
        c = curves[id(contender)]
        at = dict(zip(map(int, c.rounds), zip(c.mean, c.low, c.high, strict=True), strict=True))
        rows.append((contender.where, contender.name, *(_score(*at[t]) if t in at else "–" for t in rounds)))
    caption = "Test accuracy in percent after each scored round"
    if any(len(contender.runs) > 1 for contender in contenders):
        caption += ": mean over seeds (lowest to highest)"
    return Table(caption, ("data", "method", *(f"round {t}" for t in rounds)), tuple(rows), heads=2)


def _score(mean: float, low: float, high: float) -> str:
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _uploads(contenders: Sequence[Contender], curves: dict[int, Curve]) -> Table:
    rounds = sorted({int(t) for contender in contenders for t in curves[id(contender)].rounds})
    rows = []
    for contender in contenders:
        c = curves[id(contender)]
        at = dict(zip(map(int, c.rounds), c.megabytes, strict=True))
        rows.append((contender.where, contender.name, *(f"{at[t]:.3f}" if t in at else "–" for t in rounds), params(c.params[-1])))
    caption = "Megabytes uploaded by all clients until each scored round; the accuracy there is in the table above"
    return Table(caption, ("data", "method", *(f"round {t}" for t in rounds), "parameters in all"), tuple(rows), heads=2)
