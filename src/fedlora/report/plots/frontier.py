"""The frontier: the final score against all that was uploaded for it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlora.report import words
from fedlora.report.answers import params, scored
from fedlora.report.contenders import Contender, by_place, hardest, joined
from fedlora.report.looks import QUIET
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots.labels import Label, annotate
from fedlora.report.plots.lines import fold, limits, upload_axis
from fedlora.report.units import headed, within, worth
from fedlora.tasks.metrics import Metric

Point = tuple[Contender, float, float]  # megabytes, points


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """A panel for each place, a point for each contender, all compared by one metric; the ranks of one method are joined. None of a
    single contender."""
    ranked = [contender for contender in contenders if contender.ranked]
    panels = by_place(ranked)
    if not ranked or max(map(len, panels.values())) < 2:
        return None
    metric = ranked[0].metric
    points = {where: [(c, c.total() / 1e6, scored(c).mean) for c in here] for where, here in panels.items()}
    axis = limits([y for here in points.values() for _, _, y in here], metric.unit)
    where = hardest(ranked)
    best = frontier(points[where])
    names = list(dict.fromkeys(contender.name for contender, _, _ in best))
    at = best[0][0].at if len(panels) > 1 else ""
    finding = f"On the frontier{at}: " + (joined(names) if len(names) < 5 else f"{', '.join(names[:4])} and {len(names) - 4} more")
    about = f"Final test {metric.title}{within(metric.unit)} against megabytes uploaded by all clients in the whole run (log axis)."
    about += f" {'Up' if metric.better == 'higher' else 'Down'} and left is better; the stepped line is the frontier: for less "
    about += f"upload, nothing is {'more accurate' if metric.name == words.ACCURACY else 'better'}."
    if any(contender.rank for contender in ranked):
        about += " Points of one method at several ranks are joined; r is the rank."
    rows = tuple(
        (w, contender.name, f"{x:.3f}", params(contender.total("upload_params")), str(scored(contender)), "yes" if on else "")
        for w, here in points.items()
        for contender, x, _ in here
        for on in [any(contender is other for other, _, _ in frontier(here))]
    )
    header = ("data", "method", "uploaded, MB", "uploaded parameters", headed(metric.title, metric.unit), "on the frontier")
    return Picture(
        "frontier",
        finding,
        about,
        tuple(Panel(w if len(panels) > 1 else "", partial(_paint, here, axis, metric), (4.4, 3.4)) for w, here in points.items()),
        (Table(f"Final {metric.title} and total upload", header, rows, heads=2),),
        columns=2 if len(panels) in (2, 4) else 3,
    )


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: by upload, each with a better score, as it is shown, than all that upload less. Equal points
    are on it together."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1], -_worth(p))):
        if not out or _worth(point) > _worth(out[-1]) or (point[1], _worth(point)) == (out[-1][1], _worth(out[-1])):
            out.append(point)
    return out


def _worth(point: Point) -> float:
    contender, _, y = point
    return worth(contender.metric, y)


def _paint(points: Sequence[Point], limits: tuple[float, float], metric: Metric, axes: Any) -> None:
    upload_axis(axes, [x for _, x, _ in points], left=1.6, right=1.6)
    axes.set_ylim(*limits)
    axes.set_ylabel(headed(f"final test {metric.title}", metric.unit))
    axes.grid(axis="y")
    best = frontier(points)
    right = axes.get_xlim()[1]
    axes.step(
        [*(x for _, x, _ in best), right],
        [*(y for _, _, y in best), best[-1][2]],
        where="post",
        color=QUIET,
        linewidth=4,
        alpha=0.25,
    )
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point[0].line, []).append(point)
    labels = []
    for name, here in lines.items():
        here = sorted(here, key=lambda p: p[1])
        look = here[0][0].look
        axes.plot(
            [x for _, x, _ in here],
            [y for _, _, y in here],
            color=look.colour,
            linestyle=look.line,
            linewidth=1.1,
            marker=look.marker,
            markersize=6.5,
            markerfacecolor=look.face,
            label=name,
        )
        top = (max if metric.better == "higher" else min)(here, key=lambda p: p[2])
        for point in here:
            contender, x, y = point
            parts = ([fold(name)] if point is top else []) + (
                [f"r{contender.rank}"] if contender.rank is not None and len(here) > 1 else []
            )
            if parts:
                labels.append(Label(x, y, " ".join(parts), look.text))
    strokes = [[(x, y) for _, x, y in sorted(here, key=lambda p: p[1])] for here in lines.values()]
    annotate(axes, labels, [(x, y) for _, x, y in points], strokes)
