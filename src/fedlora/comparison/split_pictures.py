"""What a split looks like at several alphas, and published statistics on our bands."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import Config
from fedlora.data.dataset import Dataset
from fedlora.data.domains import deal
from fedlora.data.partition import counts
from fedlora.report.looks import BLUE, INK, RED
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.words import one

if TYPE_CHECKING:
    from fedlora.comparison.splits import Measurement


def dealt(dataset: Dataset, configs: Sequence[tuple[float, Config]]) -> Picture:
    """Seed 0's split at each alpha: who has how much of which stratum, and below it client 0 alone (the paper's Fig. 7)."""
    strata, kind = len(dataset.strata_names), one(dataset.strata_kind)
    tables = {a: counts(deal(dataset, c.data, c.clients, 0).train, dataset.train.strata, strata) for a, c in configs}
    most = max(int(table.max()) for table in tables.values())
    tallest = max(int(table[0].max()) for table in tables.values())
    own = [f"{int((table[0] > 0).sum())} at Dir({alpha:g})" for alpha, table in tables.items()]
    return Picture(
        "split",
        f"{dataset.name}: client 0 of {len(next(iter(tables.values())))} holds {', '.join(own)} of {strata} {dataset.strata_kind}",
        f"Above: training examples of each {kind} (across) on each client (down), white for none, dark for most, on one "
        "square-root scale. Below: those of client 0. The split of seed 0.",
        (
            *(Panel(f"Dir({alpha:g})", partial(_draw_counts, table, most, kind), (4.1, 3.6)) for alpha, table in tables.items()),
            *(
                Panel(f"Dir({alpha:g}), client 0", partial(_draw_client, table[0], tallest, kind))
                for alpha, table in tables.items()
            ),
        ),
        tuple(_counts_table(dataset, alpha, table) for alpha, table in tables.items()),
        columns=len(tables),
    )


def bands(source: str, lines: Sequence["Measurement"]) -> Picture:
    """Every statistic's band, and the published number on it where there is one."""
    told = [line for line in lines if line.published is not None]
    inside = sum(bool(line.inside) for line in told)
    splits = len(lines[0].band.values)
    panels = []
    for kind in ("examples", "classes"):
        shown = [line for line in lines if line.statistic.endswith(kind)]
        panels.append(Panel(f"{kind} of a client", partial(_draw_bands, shown, kind), (5.6, 0.9 + 0.25 * len(shown))))
    finding = f"{inside} of {len(told)} published numbers lie in our band" if told else f"95 % bands over {splits:,} splits"
    rows = tuple(
        (_label(x), x.statistic.rpartition("_")[2], *(f"{n:,}" for n in (x.band.low, x.band.median, x.band.high)), _told(x))
        for x in lines
    )
    return Picture(
        "bands",
        f"{source}: {finding}",
        f"Bars: where 95 % of {splits:,} splits lie; ticks: their median; circles: the published split, hollow and red where it is "
        "outside.",
        tuple(panels),
        (Table("Bands and published numbers", ("statistic", "of", "low", "median", "high", "published"), rows, heads=2),),
        columns=2,
    )


def _draw_counts(table: Any, most: int, kind: str, axes: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm

    shades = ListedColormap(colormaps["Blues"](np.linspace(0.15, 1, 256)))  # its palest shades pass for white, which is none
    norm = PowerNorm(0.5, 1, max(2, most))
    axes.imshow(np.ma.masked_equal(table, 0), cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    axes.locator_params(integer=True)
    axes.set_xlabel(kind)
    axes.set_ylabel("client")


def _draw_client(mine: Any, tallest: int, kind: str, axes: Any) -> None:
    axes.bar(range(len(mine)), mine, color=BLUE, width=0.85)
    axes.set_ylim(0, 1.05 * max(1, tallest))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(kind)
    axes.set_ylabel("training examples")
    axes.grid(axis="y")


def _draw_bands(lines: Sequence["Measurement"], kind: str, axes: Any) -> None:
    for i, line in enumerate(lines):
        axes.plot([line.band.low, line.band.high], [i, i], color="#9dc3e6", linewidth=7, solid_capstyle="butt")
        axes.plot([line.band.median], [i], marker="|", markersize=8, color=INK, linestyle="none")
        if line.published is not None:
            colour, face = (BLUE, BLUE) if line.inside else (RED, "white")
            axes.plot([line.published], [i], marker="o", color=colour, markerfacecolor=face, markeredgewidth=1.5, linestyle="none")
    if kind == "examples":
        axes.set_xscale("log")
        most = max(max(line.band.high, line.published or 0) for line in lines)
        axes.set_xlim(0.7, 1.3 * most)
        ticks = [10**power for power in range(7) if 10**power <= most]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.locator_params(axis="x", integer=True)
    axes.set_yticks(range(len(lines)), [_label(line) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(kind)


def _label(line: "Measurement") -> str:
    return f"Dir({line.alpha:g}) {line.part}, {'most' if line.statistic.startswith('max') else 'fewest'}"


def _told(line: "Measurement") -> str:
    if line.published is None:
        return "–"
    return f"{line.published:,}" if line.inside else f"{line.published:,} (outside)"


def _counts_table(dataset: Dataset, alpha: float, table: Any) -> Table:
    rows = tuple((f"{k}", *(f"{n:,}" for n in mine)) for k, mine in enumerate(table))
    return Table(
        f"Training examples by client and {one(dataset.strata_kind)} at Dir({alpha:g})", ("client", *dataset.strata_names), rows
    )
