"""Accuracy against one thing that was varied: heterogeneity, or where the adapters stand."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedlora.report.answers import scored
from fedlora.report.contenders import ALPHA, Contender, Spread, modules, word
from fedlora.report.looks import INK, QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, draw, fold, panel_size, percent_limits, row_height
from fedlora.report.runs import as_text

TARGETS = "model.target_modules"


def heterogeneity(contenders: Sequence[Contender]) -> Picture | None:
    """Final accuracy by Dirichlet's alpha, a line for each contender; None where alpha does not vary."""
    shown = [contender for contender in contenders if contender.ranked and ALPHA in dict(contender.place)]
    alphas = sorted({dict(contender.place)[ALPHA] for contender in shown}, reverse=True)
    if len(alphas) < 2:
        return None
    groups: dict[str, dict[str, dict[float, Contender]]] = {}  # panel -> line -> alpha -> contender
    for contender in shown:
        groups.setdefault(_beside(contender), {}).setdefault(contender.line, {})[dict(contender.place)[ALPHA]] = contender
    limits = percent_limits([x for contender in shown for x in (scored(contender).low, scored(contender).high)])
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
        "accuracy-by-heterogeneity",
        _falls(falls, alphas),
        "Final test accuracy in percent by Dirichlet's alpha; to the right, clients hold fewer classes each.",
        tuple(
            Panel(name if len(groups) > 1 else "", partial(_paint, here, alphas, limits), panel_size(shown))
            for name, here in groups.items()
        ),
        (Table("Final accuracy in percent by heterogeneity", header, rows, heads=2),),
        columns=2 if len(groups) in (2, 4) else 3,
    )


def _beside(contender: Contender) -> str:
    """What is the same for a line of this picture, the method apart."""
    words = [as_text(value) for key, value in contender.place if key != ALPHA]
    return ", ".join(
        [*words, *([f"rank {contender.rank}"] if contender.rank else []), *([contender.kind] if contender.kind else [])]
    )


def _named(contender: Contender) -> str:
    others = [as_text(value) for key, value in contender.place if key != ALPHA]
    return f"{contender.name}{' on ' if others else ''}{', '.join(others)}"


def _falls(falls: dict[str, tuple[float, float]], alphas: Sequence[float]) -> str:
    ends = f"From Dir({alphas[0]:g}) to Dir({alphas[-1]:g})"
    if not falls:
        return f"Accuracy from Dir({alphas[0]:g}) to Dir({alphas[-1]:g})"
    loss = {name: first - last for name, (first, last) in falls.items()}
    least, most = min(loss, key=lambda name: loss[name]), max(loss, key=lambda name: loss[name])
    verb = "loses" if loss[least] >= 0 else "gains"
    text = f"{ends} {least} {verb} {abs(loss[least]):.1f} points"
    return text if least == most else f"{text}, {most} {'loses' if loss[most] >= 0 else 'gains'} {abs(loss[most]):.1f}"


def _paint(lines: dict[str, dict[float, Contender]], alphas: Sequence[float], limits: tuple[float, float], axes: Any) -> None:
    drawn = []
    for name, by_alpha in lines.items():
        at = [i for i, a in enumerate(alphas) if a in by_alpha]
        values = [scored(by_alpha[alphas[i]]) for i in at]
        mean, low, high = (np.array([getattr(v, field) for v in values]) for field in ("mean", "low", "high"))
        drawn.append(Line(name, next(iter(by_alpha.values())).look, np.array(at), mean, low, high))
    draw(axes, drawn, limits)
    axes.set_xticks(range(len(alphas)), [f"Dir({a:g})" for a in alphas])
    axes.set_xlim(-0.15, len(alphas) - 0.85)
    axes.set_ylabel("final test accuracy, %")


def places(contenders: Sequence[Contender]) -> Picture | None:
    """Bars of final accuracy by where the adapters stand; None where that does not vary."""
    shown = [contender for contender in contenders if contender.ranked and TARGETS in dict(contender.setting)]
    if not shown:
        return None
    groups: dict[str, list[Contender]] = {}
    for contender in shown:
        groups.setdefault(", ".join(filter(None, (contender.where, _without_targets(contender)))), []).append(contender)
    groups = {name: here for name, here in groups.items() if len(here) > 1}
    if not groups:
        return None
    limits = percent_limits([scored(contender).high for here in groups.values() for contender in here])
    most = max(groups, key=lambda name: len(groups[name]))
    ranked = sorted(groups[most], key=lambda contender: -scored(contender).mean)
    first, last = ranked[0], ranked[-1]
    finding = f"Adapters in {_target(first)} reach {scored(first).mean:.1f} %, in {_target(last)} {scored(last).mean:.1f} %"
    rows = tuple((name, _target(contender), str(scored(contender))) for name, here in groups.items() for contender in here)
    high = 0.9 + row_height([_target(contender) for here in groups.values() for contender in here]) * max(map(len, groups.values()))
    return Picture(
        "accuracy-by-place",
        finding,
        "Final test accuracy in percent by the modules that hold an adapter.",
        tuple(Panel(name, partial(_bars, here, limits), (4.4, high)) for name, here in groups.items()),
        (Table("Final accuracy in percent by the modules with an adapter", ("setting", "modules", "accuracy, %"), rows, heads=2),),
        columns=2,
    )


def _target(contender: Contender) -> str:
    return modules(dict(contender.setting)[TARGETS])


def _without_targets(contender: Contender) -> str:
    words = [word(key, value) for key, value in contender.setting if key != TARGETS]
    return " ".join([contender.title, *words, *([f"rank {contender.rank}"] if contender.rank else [])])


def _bars(contenders: Sequence[Contender], limits: tuple[float, float], axes: Any) -> None:
    values: list[Spread] = [scored(contender) for contender in contenders]
    rows = range(len(contenders))
    axes.barh(rows, [v.mean for v in values], height=0.66, color="#8fb8d6", edgecolor=QUIET, linewidth=0.5)
    for i, v in enumerate(values):
        if v.count > 1:
            axes.plot([v.low, v.high], [i, i], color=INK, linewidth=1.2)
        axes.annotate(str(v), (v.high, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(rows, [fold(_target(contender)) for contender in contenders])
    axes.invert_yaxis()
    axes.set_xlim(0, limits[1])
    axes.set_xlabel("final test accuracy, %")
    axes.tick_params(axis="y", length=0)
