"""The score by round, and by what was uploaded until then; the training loss by round of what has no score."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlora.report import words
from fedlora.report.answers import answers, params, scored, size
from fedlora.report.contenders import Contender, Curve, by_metric, by_panel, hardest, joined
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, limits, panel_size, round_axis, upload_axis
from fedlora.report.units import LOSS, headed, within
from fedlora.tasks.metrics import Metric, number

Curves = dict[int, Curve]  # by the id of a contender


def pictures(contenders: Sequence[Contender]) -> list[Picture]:
    """By round and by uploaded bytes, of each metric by which runs are compared; none where nothing was scored."""
    out = []
    for metric, own in by_metric(contenders).items():
        curves = {id(contender): contender.curve() for contender in own}
        shown = [contender for contender in own if len(curves[id(contender)].rounds)]
        if not shown:
            continue
        uploads = "megabytes uploaded by all clients so far (log axis)"
        about = f"Test {metric.title}{within(metric.unit)} by"
        tables = _table(shown, curves, metric, f"Test {metric.title}"), _uploads(shown, curves, metric)
        out.append(_picture(metric, "round", _ends(shown), f"{about} round.", shown, curves, tables[0]))
        out.append(_picture(metric, "upload", _costs(shown), f"{about} {uploads}.", shown, curves, tables[1]))
    return out


def losses(contenders: Sequence[Contender]) -> Picture | None:
    """The training loss by round of those of which no round was scored; None where all were, or none has a loss."""
    curves = {id(contender): contender.curve(LOSS) for contender in contenders if not contender.scored}
    shown = [contender for contender in contenders if id(contender) in curves and len(curves[id(contender)].rounds)]
    if not shown:
        return None
    here = [contender for contender in shown if contender.where == hardest(shown)]
    order = sorted(here, key=lambda contender: float(curves[id(contender)].mean[-1]))
    ends = {contender.name: number(float(curves[id(contender)].mean[-1]), LOSS.unit) for contender in order}
    (first, low), *others = ends.items()
    last = f", of {others[-1][0]} at {others[-1][1]}" if others else ""
    place = order[0].at if len({contender.where for contender in shown}) > 1 else ""
    finding = f"The training loss of {first} ends at {low}{last}{place}"
    table = _table(shown, curves, LOSS, "Training loss")
    return _picture(LOSS, "round", finding, "Training loss by round, a mean over clients.", shown, curves, table)


def _picture(metric: Metric, x: str, finding: str, about: str, shown: Sequence[Contender], curves: Curves, table: Table) -> Picture:
    own = [curves[id(contender)] for contender in shown]
    axis = limits([y for curve in own for y in (*curve.low, *curve.high)], metric.unit)
    panels = by_panel(shown)
    seeds = max(len(contender.runs) for contender in shown)
    lower = " Lower is better." if metric.better == "lower" else ""
    band = f" Lines are means over {seeds} seeds, bands go from the lowest to the highest." if seeds > 1 else " One seed."
    paint, box = (_by_round if x == "round" else _by_upload), panel_size(shown)
    return Picture(
        f"{'training-loss' if metric == LOSS else metric.name}-by-{x}",
        finding,
        f"{about}{lower}{band}",
        tuple(
            Panel(heading if len(panels) > 1 else "", partial(paint, [(c, curves[id(c)]) for c in here], axis, metric), box)
            for heading, here in panels.items()
        ),
        (table,),
        columns(shown),
    )


def _by_round(curves: Sequence[tuple[Contender, Curve]], limits: tuple[float, float], metric: Metric, axes: Any) -> None:
    lines = [Line(contender.line, contender.look, c.rounds, c.mean, c.low, c.high) for contender, c in curves]
    draw(axes, lines, limits, better=metric.better)
    round_axis(axes)
    axes.set_ylabel(_axis(metric))


def _by_upload(curves: Sequence[tuple[Contender, Curve]], limits: tuple[float, float], metric: Metric, axes: Any) -> None:
    lines = []
    for contender, c in curves:
        sent = (c.megabytes > 0) | (c.megabytes[-1] == 0)  # a log axis has no place for rounds before the first upload
        lines.append(Line(contender.line, contender.look, *(x[sent] for x in (c.megabytes, c.mean, c.low, c.high))))
    upload_axis(axes, [x for line in lines for x in line.x], left=1.3, right=1.5)
    draw(axes, lines, limits, beside=True, better=metric.better)
    axes.set_ylabel(_axis(metric))


def _axis(metric: Metric) -> str:
    return metric.title if metric == LOSS else headed(f"test {metric.title}", metric.unit)


def _ends(contenders: Sequence[Contender]) -> str:
    found, metric = answers(contenders), contenders[0].metric
    if not found:
        return f"{words.capital(metric.title)} by round: every run has diverged"
    where = hardest([contender for answer in found for contender in answer.contenders])
    here = next(answer for answer in found if answer.where == where)
    place = here.best.at if len(found) > 1 else ""
    if any(run.validated for run in here.best.runs):
        first = f"{here.best.name} has {here.score.middle}{words.by(metric)} in the round that validation chose"
    else:
        ends = "end" if len(here.leaders) > 1 else "ends"
        first = f"{joined([contender.name for contender in here.leaders])} {ends} at {here.score.middle}{words.by(metric)}"
    last = here.contenders[-1]
    return (first if last in here.leaders else f"{first}, {last.name} at {scored(last).middle}") + place


def _costs(contenders: Sequence[Contender]) -> str:
    found = answers(contenders)
    where = hardest([contender for answer in found for contender in answer.contenders] or contenders)
    here = next((answer for answer in found if answer.where == where), None)
    if here is None or not here.reached:
        return f"{words.capital(contenders[0].metric.title)} by upload"
    (first, least), equal = here.reached[0], here.cheapest
    place = here.best.at if len(found) > 1 else ""
    uploads = "upload" if len(equal) > 1 else "uploads"
    said = f"To reach {here.goal}{place}, {joined([contender.name for contender in equal])} {uploads} {size(least)}"
    others = here.reached[len(equal) :]
    others = tuple((contender, cost) for contender, cost in others if contender.method != first.method) or others
    if others:
        return f"{said}, next {others[0][0].name} {size(others[0][1])}"
    return f"{said}; no other gets there" if len(here.contenders) > len(equal) else said


def _table(contenders: Sequence[Contender], curves: Curves, metric: Metric, what: str) -> Table:
    rounds = sorted({int(t) for contender in contenders for t in curves[id(contender)].rounds})
    rows = []
    for contender in contenders:
        c = curves[id(contender)]
        at = dict(zip(map(int, c.rounds), zip(c.mean, c.low, c.high, strict=True), strict=True))
        rows.append((contender.where, contender.name, *(_score(*at[t], metric.unit) if t in at else "–" for t in rounds)))
    caption = f"{what}{within(metric.unit)} after each {'round' if metric == LOSS else 'scored round'}"
    if any(len(contender.runs) > 1 for contender in contenders):
        caption += ": mean over seeds (lowest to highest)"
    return Table(caption, ("data", "method", *(f"round {t}" for t in rounds)), tuple(rows), heads=2)


def _score(mean: float, low: float, high: float, unit: str) -> str:
    said = number(mean, unit)
    return said if low == high else f"{said} ({number(low, unit)} to {number(high, unit)})"


def _uploads(contenders: Sequence[Contender], curves: Curves, metric: Metric) -> Table:
    rounds = sorted({int(t) for contender in contenders for t in curves[id(contender)].rounds})
    rows = []
    for contender in contenders:
        c = curves[id(contender)]
        at = dict(zip(map(int, c.rounds), c.megabytes, strict=True))
        rows.append((contender.where, contender.name, *(f"{at[t]:.3f}" if t in at else "–" for t in rounds), params(c.params[-1])))
    caption = f"Megabytes uploaded by all clients until each scored round; the {metric.title} there is in the table above"
    return Table(caption, ("data", "method", *(f"round {t}" for t in rounds), "parameters in all"), tuple(rows), heads=2)
