"""Fairness: the score of every client at the end, where clients are scored one by one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report import words
from fedlora.report.contenders import Contender, by_panel, hardest
from fedlora.report.looks import INK, QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, limits, panel_size
from fedlora.report.units import headed, within
from fedlora.tasks.metrics import Metric, number, text

Scores = dict[str, float]  # client's name -> points, worst first


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """Clients from the worst to the best, bars of one contender or lines of several, all of one metric; of each contender's first
    seed."""
    scores = {id(contender): client_scores(contender) for contender in contenders}
    shown = [contender for contender in contenders if scores[id(contender)]]
    if not shown:
        return None
    metric, unit, panels = shown[0].metric, shown[0].metric.unit, by_panel(shown)
    worst_of = {key: worst_tenth(own) for key, own in scores.items() if own}
    here = [contender for contender in shown if contender.where == hardest(shown)]
    worst = sorted(here, key=lambda contender: worst_of[id(contender)], reverse=metric.better == "higher")
    place = worst[0].at if len(panels) > 1 else ""
    first, last = (text(worst_of[id(contender)], unit) for contender in (worst[0], worst[-1]))
    tail = f", {worst[-1].name}'s {last}" if len(worst) > 1 else ""
    finding = f"The worst tenth of {worst[0].name}'s clients has {first}{words.by(metric)}{tail}{place}"
    rows = tuple(
        (contender.where, contender.name, name, number(value, unit))
        for contender in shown
        for name, value in scores[id(contender)].items()
    )
    summary = tuple(
        (
            contender.where,
            contender.name,
            *(number(x, unit) for x in (worst_of[id(contender)], float(np.median(list(own.values()))), list(own.values())[-1])),
            str(len(own)),
        )
        for contender in shown
        for own in [scores[id(contender)]]
    )
    seed = " Of the first seed." if any(len(contender.runs) > 1 for contender in shown) else ""
    return Picture(
        "clients",
        finding,
        f"{words.capital(metric.title)}{within(unit)} of each client on its own test examples at the end, from the worst client to "
        f"the best.{seed}",
        tuple(
            Panel(
                name if len(panels) > 1 else "",
                partial(_paint, [(contender, scores[id(contender)]) for contender in here], metric),
                panel_size(shown),
            )
            for name, here in panels.items()
        ),
        (
            Table(
                f"{words.capital(metric.title)} over clients{within(unit)}",
                ("data", "method", "worst tenth", "median", "best", "clients"),
                summary,
                heads=2,
            ),
            Table(
                f"{words.capital(metric.title)} of every client{within(unit)}, worst first",
                ("data", "method", "client", metric.title),
                rows,
                heads=3,
            ),
        ),
        columns(shown),
    )


def client_scores(contender: Contender) -> Scores:
    """Of the contender's first seed; empty where clients are not scored one by one."""
    run = contender.runs[0]
    metric = run.metric
    last = next((row for row in reversed(run.scored) if row.get(f"client_{metric.name}")), None)
    if last is None:
        return {}
    names = {str(client["id"]): str(client["name"]) for client in run.clients}
    own = last[f"client_{metric.name}"].items()
    found = {names.get(id, id): metric.points(value) for id, value in own if value is not None}
    return dict(sorted(found.items(), key=lambda pair: pair[1], reverse=metric.better == "lower"))


def worst_tenth(scores: Scores) -> float:
    """The mean over the worst tenth of the clients, which come first; at least one."""
    values = list(scores.values())
    return float(np.mean(values[: max(1, len(values) // 10)]))


def _paint(contenders: Sequence[tuple[Contender, Scores]], metric: Metric, axes: Any) -> None:
    every = [x for _, scores in contenders for x in scores.values()]
    axis = (0.0, 100.0) if metric.unit == "%" else limits([0.0, *every], metric.unit)
    if len(contenders) == 1:
        _bars(contenders[0][1], axis, metric, axes)
    else:
        lines = []
        for contender, scores in contenders:
            y: NDArray[Any] = np.array(list(scores.values()))
            lines.append(Line(contender.line, contender.look, np.arange(1, len(y) + 1), y))
        draw(axes, lines, axis, better=metric.better)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel(f"clients, {words.worst_first(metric)}")
    axes.set_ylabel(headed(f"{metric.title} on its own test", metric.unit))


def _bars(scores: Scores, limits: tuple[float, float], metric: Metric, axes: Any) -> None:
    values = list(scores.values())
    worst = max(1, len(values) // 10)
    x = np.arange(1, len(values) + 1)
    axes.bar(x, values, width=0.8, color=["#1f4e79"] * worst + ["#9dc3e6"] * (len(values) - worst))
    mean = float(np.mean(values))
    axes.axhline(mean, color=QUIET, linewidth=0.8, linestyle=(0, (4, 2)))
    axes.text(
        1.01, mean, f"mean {text(mean, metric.unit)}", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK
    )
    dark = f"dark: worst tenth, {text(worst_tenth(scores), metric.unit)}"
    left, side = (0.01, "left") if metric.better == "higher" else (0.99, "right")  # above the low bars
    axes.text(left, 0.99, dark, transform=axes.transAxes, va="top", ha=side, fontsize=8, color=INK)
    axes.set_ylim(*limits)
