"""The score against one thing that was varied: heterogeneity, or where the adapters stand."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedlora.report import words
from fedlora.report.answers import rank, scored
from fedlora.report.contenders import ALPHA, Contender, Spread, dealt_by, modules, word
from fedlora.report.looks import INK, QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, draw, fold, limits, panel_size, row_height
from fedlora.report.runs import as_text
from fedlora.report.units import headed, within
from fedlora.tasks.metrics import Metric, number

TARGETS = "model.target_modules"


def heterogeneity(contenders: Sequence[Contender]) -> Picture | None:
    """The final score by Dirichlet's alpha, a line for each contender, all of one metric; None where alpha does not vary."""
    shown = [contender for contender in contenders if contender.ranked and ALPHA in dict(contender.place)]
    alphas = sorted({dict(contender.place)[ALPHA] for contender in shown}, reverse=True)
    if len(alphas) < 2:
        return None
    metric = shown[0].metric
    groups: dict[str, dict[str, dict[float, Contender]]] = {}  # panel -> line -> alpha -> contender
    for contender in shown:
        groups.setdefault(_beside(contender), {}).setdefault(contender.line, {})[dict(contender.place)[ALPHA]] = contender
    axis = limits([x for contender in shown for x in (scored(contender).low, scored(contender).high)], metric.unit)
    falls = {
        _named(contender): (scored(by_alpha[alphas[0]]).mean, scored(by_alpha[alphas[-1]]).mean)
        for here in groups.values()
        for by_alpha in here.values()
        if {alphas[0], alphas[-1]} <= set(by_alpha)
        for contender in [by_alpha[alphas[-1]]]
    }
    rows = tuple(
        (panel, line, *(str(scored(by_alpha[a])) if a in by_alpha else "–" for a in alphas))
        for panel, here in groups.items()
        for line, by_alpha in here.items()
    )
    header = ("setting", "method", *(f"Dir({a:g})" for a in alphas))
    return Picture(
        f"{metric.name}-by-heterogeneity",
        _falls(falls, alphas, metric),
        f"Final test {metric.title}{within(metric.unit)} by Dirichlet's alpha; to the right, {_differ(shown)}.",
        tuple(
            Panel(name if len(groups) > 1 else "", partial(_paint, here, alphas, axis, metric), panel_size(shown))
            for name, here in groups.items()
        ),
        (Table(f"Final {metric.title}{within(metric.unit)} by heterogeneity", header, rows, heads=2),),
        columns=2 if len(groups) in (2, 4) else 3,
    )


def _differ(contenders: Sequence[Contender]) -> str:
    classes = all(dealt_by(contender.runs[0]) == "classes" for contender in contenders)
    return "clients hold fewer classes each" if classes else "clients differ more"


def _beside(contender: Contender) -> str:
    """What is the same for a line of this picture, the method apart."""
    words = [as_text(value) for key, value in contender.place if key != ALPHA]
    return ", ".join(
        [*words, *([f"rank {contender.rank}"] if contender.rank else []), *([contender.kind] if contender.kind else [])]
    )


def _named(contender: Contender) -> str:
    others = [as_text(value) for key, value in contender.place if key != ALPHA]
    return f"{contender.name}{' on ' if others else ''}{', '.join(others)}"


def _falls(falls: dict[str, tuple[float, float]], alphas: Sequence[float], metric: Metric) -> str:
    if not falls:
        return f"{words.capital(metric.title)} from Dir({alphas[0]:g}) to Dir({alphas[-1]:g})"
    sign = 1 if metric.better == "higher" else -1
    loss = {name: sign * (first - last) for name, (first, last) in falls.items()}
    least, most = min(loss, key=lambda name: loss[name]), max(loss, key=lambda name: loss[name])
    points = " points" if metric.unit == "%" else f" {metric.unit}".rstrip()
    said = f"From Dir({alphas[0]:g}) to Dir({alphas[-1]:g}) {least} {_change(loss[least], metric)}{points}"
    return said if least == most else f"{said}, {most} {_change(loss[most], metric)}"


def _change(loss: float, metric: Metric) -> str:
    size = number(abs(loss), metric.unit)
    if metric.unit == "%" and metric.better == "higher":
        return f"{'loses' if loss >= 0 else 'gains'} {size}"
    return f"gets {'worse' if loss >= 0 else 'better'} by {size}"


def _paint(
    lines: dict[str, dict[float, Contender]], alphas: Sequence[float], limits: tuple[float, float], metric: Metric, axes: Any
) -> None:
    drawn = []
    for name, by_alpha in lines.items():
        at = [i for i, a in enumerate(alphas) if a in by_alpha]
        values = [scored(by_alpha[alphas[i]]) for i in at]
        mean, low, high = (np.array([getattr(v, field) for v in values]) for field in ("mean", "low", "high"))
        drawn.append(Line(name, next(iter(by_alpha.values())).look, np.array(at), mean, low, high))
    draw(axes, drawn, limits, better=metric.better)
    axes.set_xticks(range(len(alphas)), [f"Dir({a:g})" for a in alphas])
    axes.set_xlim(-0.15, len(alphas) - 0.85)
    axes.set_ylabel(headed(f"final test {metric.title}", metric.unit))


def places(contenders: Sequence[Contender]) -> Picture | None:
    """Bars of the final score by where the adapters stand, all of one metric; None where that does not vary."""
    shown = [contender for contender in contenders if contender.ranked and TARGETS in dict(contender.setting)]
    if not shown:
        return None
    groups: dict[str, list[Contender]] = {}
    for contender in shown:
        groups.setdefault(", ".join(filter(None, (contender.where, _without_targets(contender)))), []).append(contender)
    groups = {name: here for name, here in groups.items() if len(here) > 1}
    if not groups:
        return None
    metric = shown[0].metric
    axis = limits([scored(contender).high for here in groups.values() for contender in here], metric.unit)
    most = max(groups, key=lambda name: len(groups[name]))
    ranked = sorted(groups[most], key=lambda contender: -rank(contender))
    first, last = ranked[0], ranked[-1]
    finding = (
        f"Adapters in {_target(first)} reach {scored(first).middle}, in {_target(last)} {scored(last).middle}{words.by(metric)}"
    )
    rows = tuple((name, _target(contender), str(scored(contender))) for name, here in groups.items() for contender in here)
    high = 0.9 + row_height([_target(contender) for here in groups.values() for contender in here]) * max(map(len, groups.values()))
    caption = f"Final {metric.title}{within(metric.unit)} by the modules with an adapter"
    return Picture(
        f"{metric.name}-by-place",
        finding,
        f"Final test {metric.title}{within(metric.unit)} by the modules that hold an adapter.",
        tuple(Panel(name, partial(_bars, here, axis, metric), (4.4, high)) for name, here in groups.items()),
        (Table(caption, ("setting", "modules", headed(metric.title, metric.unit)), rows, heads=2),),
        columns=2,
    )


def _target(contender: Contender) -> str:
    return modules(dict(contender.setting)[TARGETS])


def _without_targets(contender: Contender) -> str:
    words = [word(key, value) for key, value in contender.setting if key != TARGETS]
    return " ".join([contender.title, *words, *([f"rank {contender.rank}"] if contender.rank else [])])


def _bars(contenders: Sequence[Contender], limits: tuple[float, float], metric: Metric, axes: Any) -> None:
    values: list[Spread] = [scored(contender) for contender in contenders]
    rows = range(len(contenders))
    axes.barh(rows, [v.mean for v in values], height=0.66, color="#8fb8d6", edgecolor=QUIET, linewidth=0.5)
    for i, v in enumerate(values):
        if v.count > 1:
            axes.plot([v.low, v.high], [i, i], color=INK, linewidth=1.2)
        axes.annotate(str(v), (v.high, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(rows, [fold(_target(contender)) for contender in contenders])
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, limits[0]), limits[1])
    axes.set_xlabel(headed(f"final test {metric.title}", metric.unit))
    axes.tick_params(axis="y", length=0)
