"""Fairness: the accuracy of every client at the end, where clients are scored one by one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.contenders import Contender, by_panel, hardest
from fedlora.report.looks import INK, QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import Line, columns, draw, panel_size

Scores = dict[str, float]  # client's name -> percent, lowest first


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """Clients from the least to the most accurate, bars of one contender or lines of several; of each contender's first seed."""
    scores = {id(contender): client_scores(contender) for contender in contenders}
    shown = [contender for contender in contenders if scores[id(contender)]]
    if not shown:
        return None
    panels = by_panel(shown)
    here = [contender for contender in shown if contender.where == hardest(shown)]
    worst = sorted(here, key=lambda contender: -worst_tenth(scores[id(contender)]))
    place = worst[0].at if len(panels) > 1 else ""
    tail = f", {worst[-1].name}'s {worst_tenth(scores[id(worst[-1])]):.1f} %" if len(worst) > 1 else ""
    finding = f"The worst tenth of {worst[0].name}'s clients has {worst_tenth(scores[id(worst[0])]):.1f} %{tail}{place}"
    rows = tuple(
        (contender.where, contender.name, name, f"{value:.1f}")
        for contender in shown
        for name, value in scores[id(contender)].items()
    )
    summary = tuple(
        (
            contender.where,
            contender.name,
            *(f"{x:.1f}" for x in (worst_tenth(own), *np.quantile(list(own.values()), [0.5, 1]))),
            str(len(own)),
        )
        for contender in shown
        for own in [scores[id(contender)]]
    )
    seed = " Of the first seed." if any(len(contender.runs) > 1 for contender in shown) else ""
    return Picture(
        "clients",
        finding,
        f"Accuracy in percent of each client on its own test examples at the end, from the worst client to the best.{seed}",
        tuple(
            Panel(
                name if len(panels) > 1 else "",
                partial(_paint, [(contender, scores[id(contender)]) for contender in here]),
                panel_size(shown),
            )
            for name, here in panels.items()
        ),
        (
            Table(
                "Accuracy over clients in percent", ("data", "method", "worst tenth", "median", "best", "clients"), summary, heads=2
            ),
            Table("Accuracy of every client in percent, worst first", ("data", "method", "client", "accuracy"), rows, heads=3),
        ),
        columns(shown),
    )


def client_scores(contender: Contender) -> Scores:
    """Of the contender's first seed; empty where clients are not scored one by one."""
    run = contender.runs[0]
    last = next((row for row in reversed(run.scored) if row.get("client_accuracy")), None)
    if last is None:
        return {}
    names = {str(client["id"]): str(client["name"]) for client in run.clients}
    found = {names.get(id, id): 100 * value for id, value in last["client_accuracy"].items() if value is not None}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def worst_tenth(scores: Scores) -> float:
    """The mean over the least accurate tenth of the clients, at least one."""
    values = sorted(scores.values())
    return float(np.mean(values[: max(1, len(values) // 10)]))


def _paint(contenders: Sequence[tuple[Contender, Scores]], axes: Any) -> None:
    if len(contenders) == 1:
        _bars(*contenders[0], axes)
    else:
        lines = []
        for contender, scores in contenders:
            y: NDArray[Any] = np.array(list(scores.values()))
            lines.append(Line(contender.line, contender.look, np.arange(1, len(y) + 1), y))
        draw(axes, lines, (0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("clients, least accurate first")
    axes.set_ylabel("accuracy on its own test, %")


def _bars(contender: Contender, scores: Scores, axes: Any) -> None:
    values = list(scores.values())
    worst = max(1, len(values) // 10)
    x = np.arange(1, len(values) + 1)
    axes.bar(x, values, width=0.8, color=["#1f4e79"] * worst + ["#9dc3e6"] * (len(values) - worst))
    mean = float(np.mean(values))
    axes.axhline(mean, color=QUIET, linewidth=0.8, linestyle=(0, (4, 2)))
    axes.text(1.01, mean, f"mean {mean:.1f} %", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)
    axes.text(
        0.01, 0.99, f"dark: worst tenth, {worst_tenth(scores):.1f} %", transform=axes.transAxes, va="top", fontsize=8, color=INK
    )
    axes.set_ylim(0, 100)
