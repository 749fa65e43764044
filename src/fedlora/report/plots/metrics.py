"""All metrics of a run by round, side by side: whether they agree on what is best."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlora.report import words
from fedlora.report.contenders import Contender, Curve, by_panel, hardest, joined
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, draw, limits, panel_size, round_axis
from fedlora.report.units import headed, worth
from fedlora.tasks.metrics import Metric, number, text

Drawn = Sequence[tuple[Contender, Curve]]


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """A panel for each metric, a line for each contender where clients differ most, those of the first rank of several. None where
    runs have one metric."""
    shown = [contender for contender in contenders if contender.scored]
    if not shown:
        return None
    panels = by_panel([contender for contender in shown if contender.where == hardest(shown)])
    where, here = next(iter(panels.items()))
    found: dict[Metric, Drawn] = {}
    for metric in here[0].runs[0].metrics:
        curves = [(contender, contender.curve(metric)) for contender in here]
        found[metric] = [(contender, curve) for contender, curve in curves if len(curve.rounds)]
    found = {metric: drawn for metric, drawn in found.items() if drawn}
    if len(found) < 2:
        return None
    rounds = sorted({int(t) for drawn in found.values() for _, curve in drawn for t in curve.rounds})
    rows = tuple(
        (headed(metric.title, metric.unit), contender.name, *(_at(curve, t, metric) for t in rounds))
        for metric, drawn in found.items()
        for contender, curve in drawn
    )
    which = f" Shown: {where}." if len(by_panel(shown)) > 1 else ""
    seeds = " Means over seeds." if any(len(contender.runs) > 1 for contender in here) else ""
    return Picture(
        "metrics-by-round",
        _finding(found),
        f"Each metric on the test set by round.{which}{seeds}",
        tuple(Panel(words.capital(words.titled(m)), partial(_paint, drawn, m), panel_size(here)) for m, drawn in found.items()),
        (Table("All metrics after each scored round", ("metric", "method", *(f"round {t}" for t in rounds)), rows, heads=2),),
        columns=2 if len(found) in (2, 4) else 3,
    )


def _at(curve: Curve, round: int, metric: Metric) -> str:
    values = dict(zip(map(int, curve.rounds), curve.mean, strict=True))
    return number(float(values[round]), metric.unit) if round in values else "–"


def _finding(found: dict[Metric, Drawn]) -> str:
    """Of one contender where each metric ends; of several who is best by each at the end, what has diverged apart."""
    found = {metric: [pair for pair in drawn if pair[0].ranked] or drawn for metric, drawn in found.items()}
    first = next(iter(found.values()))
    if len(first) == 1:
        ends = [f"{text(float(drawn[0][1].mean[-1]), metric.unit)} in {metric.title}" for metric, drawn in found.items()]
        return f"{first[0][0].name} ends at {joined(ends)}"
    leaders = {metric: _leaders(drawn, metric) for metric, drawn in found.items()}
    best = next(iter(leaders.values()))
    if all(names == best for names in leaders.values()):
        return f"{joined(best)} {'are' if len(best) > 1 else 'is'} best at the end by every metric"
    return f"Best at the end by {', by '.join(f'{metric.title}: {joined(names)}' for metric, names in leaders.items())}"


def _leaders(drawn: Drawn, metric: Metric) -> list[str]:
    ends = [worth(metric, float(curve.mean[-1])) for _, curve in drawn]
    return [contender.name for (contender, _), end in zip(drawn, ends, strict=True) if end == max(ends)]


def _paint(drawn: Drawn, metric: Metric, axes: Any) -> None:
    lines = [Line(contender.line, contender.look, c.rounds, c.mean, c.low, c.high) for contender, c in drawn]
    draw(axes, lines, limits([y for _, c in drawn for y in (*c.low, *c.high)], metric.unit), better=metric.better)
    round_axis(axes)
    axes.set_ylabel(headed(f"test {metric.title}", metric.unit))
