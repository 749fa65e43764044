"""Where the time went."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from fedlora.report.contenders import Contender
from fedlora.report.looks import INK
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.lines import fold, row_height

PARTS = {"train": "#1f4e79", "evaluate": "#5b8fbe", "aggregate": "#9dc3e6", "wire": "#d9822b", "other": "#d5d9de"}
MOST_BARS = 12


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """Seconds of each contender's mean round by what they went to; None where no row says."""
    seconds = {id(contender): parts(contender) for contender in contenders}
    shown = [contender for contender in contenders if sum(seconds[id(contender)].values()) > 0]
    if not shown:
        return None
    names = [part for part in PARTS if any(seconds[id(contender)].get(part) for contender in shown)]
    total = {part: sum(seconds[id(contender)].get(part, 0.0) for contender in shown) for part in names}
    first = max(total, key=lambda part: total[part])
    share = total[first] / sum(total.values())
    drawn = sorted(shown, key=lambda contender: -sum(seconds[id(contender)].values()))[:MOST_BARS]
    rows = tuple(
        (contender.where, contender.name, *(f"{own.get(part, 0):.3g}" for part in names), f"{sum(own.values()):.3g}")
        for contender in shown
        for own in [seconds[id(contender)]]
    )
    more = f" The {len(drawn)} slowest of {len(shown)}." if len(drawn) < len(shown) else ""
    draw = partial(_paint, [(_label(contender, shown), seconds[id(contender)]) for contender in drawn], names)
    return Picture(
        "time",
        f"{100 * share:.0f} % of the time goes to {first}",
        f"Wall seconds of a mean round by what they went to.{more}",
        (Panel("", draw, (4.4, 0.9 + row_height([_label(contender, shown) for contender in drawn]) * len(drawn))),),
        (Table("Seconds of a mean round", ("data", "method", *names, "in all"), rows, heads=2),),
        columns=1,
    )


def parts(contender: Contender) -> dict[str, float]:
    """Part -> wall seconds of a mean round. What a row does not name is the rest of its wall_s."""
    rows = [row for run in contender.runs for row in run.rows]
    out = {part: float(np.mean([row.get(f"{part}_s") or 0.0 for row in rows])) for part in PARTS}
    if not any(row.get("other_s") for row in rows):
        wall = float(np.mean([row.get("wall_s") or 0.0 for row in rows]))
        out["other"] = max(0.0, wall - sum(out.values()))
    return out


def _label(contender: Contender, contenders: Sequence[Contender]) -> str:
    return f"{contender.name}, {contender.where}" if len({other.where for other in contenders}) > 1 else contender.name


def _paint(bars: Sequence[tuple[str, dict[str, float]]], names: Sequence[str], axes: Any) -> None:
    rows = np.arange(len(bars))
    left = np.zeros(len(bars))
    for part in names:
        values = np.array([seconds.get(part, 0.0) for _, seconds in bars])
        axes.barh(rows, values, left=left, height=0.7, color=PARTS[part], label=part)
        left += values
    for i, total in enumerate(left):
        axes.annotate(f"{total:.3g} s", (total, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, [fold(name) for name, _ in bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.12 * float(left.max()))
    axes.set_xlabel("seconds a round")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), frameon=False, fontsize=8, handlelength=1, columnspacing=1.2
    )
