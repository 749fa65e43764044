"""The picture of a split: which client has how much of which class, or of whatever else it was dealt unequal shares of."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data.dataset import Dataset
from fedlora.data.partition import Parts, counts, statistics
from fedlora.report.picture import wrap
from fedlora.report.words import one

INK = "#2b2b2b"
DARK, LIGHT = "#1f4e79", "#9dc3e6"  # training and test: as far apart in lightness as in colour
MAX_LABELS = 80  # beyond so many clients or strata, only some are labelled
MAX_APART = 300  # beyond so many, lines between them and bars of their own would be thinner than a pixel


def plot_split(parts: Parts, dataset: Dataset, path: Path | str) -> None:
    """Write a PNG: the training examples of each stratum (across) on each client (down), and beside it each client's size. Clients
    that are held out stand below a line.

    Shades run from white for none to dark for most in even steps of lightness, on a square-root scale, so that one example
    shows and the picture survives a black-and-white printer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = counts(parts.train, dataset.train.strata, len(dataset.strata_names))
    clients, strata = table.shape
    wide, high = np.clip(0.155 * strata + 1.2, 5.0, 15.0), np.clip(0.2 * clients, 2.6, 14.0)
    figure = Figure(figsize=(wide + 3.4, high + 2.6), dpi=150, layout="constrained")
    grid, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(wide, 1.9))
    _draw_counts(figure, grid, table, dataset, parts.names)
    _draw_sizes(sizes, parts)
    if parts.held_out:
        for axes in (grid, sizes):
            axes.axhline(clients - parts.held_out - 0.5, color=INK, linewidth=1.2)
    title = wrap(_finding(parts, dataset), 12, 72 * (wide + 3.4) - 12, weight="normal")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
        FigureCanvasAgg(figure).print_png(str(path))


def _finding(parts: Parts, dataset: Dataset) -> str:
    spread = statistics(parts, dataset).train
    strata = f"{_range(spread.min_classes, spread.max_classes)} of {len(dataset.strata_names)} {dataset.strata_kind}"
    examples = _range(spread.min_examples, spread.max_examples)
    aside = f"; those below the line, {parts.held_out} of {len(parts.names)}, never train" if parts.held_out else ""
    return f"{dataset.name}, {parts.rule}: clients hold {strata}, {examples} examples{aside}"


def _range(low: int, high: int) -> str:
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"


def _draw_counts(figure: Any, axes: Any, table: Any, dataset: Dataset, names: tuple[str, ...]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, PowerNorm
    from matplotlib.ticker import MaxNLocator

    clients, strata = table.shape
    shades = ListedColormap(colormaps["Blues"](np.linspace(0.15, 1, 256)))  # its palest shades pass for white, which is none
    most = max(2, int(table.max()))
    norm = PowerNorm(0.5, 1, most)
    image = axes.imshow(np.ma.masked_equal(table, 0), cmap=shades, norm=norm, aspect="auto", interpolation="nearest")
    _label(axes.set_xticks, dataset.strata_names, rotation=90)
    _label(axes.set_yticks, names)
    for set_ticks, axis, many in ((axes.set_xticks, "x", strata), (axes.set_yticks, "y", clients)):
        if many <= MAX_APART:
            set_ticks(np.arange(many + 1) - 0.5, minor=True)
            axes.grid(which="minor", axis=axis, color="#e3e3e3", linewidth=0.4)
    axes.tick_params(which="both", length=0, colors=INK)
    bar = figure.colorbar(image, ax=axes, location="top", anchor=(0, 0), shrink=0.5, aspect=0.4 * strata + 28, pad=0.02)
    bar.set_label(f"training examples of a {one(dataset.strata_kind)} (white: none)", color=INK, fontsize=9, loc="left")
    bar.set_ticks([1, *(tick for tick in MaxNLocator(5, integer=True).tick_values(0, most) if 1 < tick <= most)])
    bar.ax.tick_params(labelsize=8, colors=INK)


def _draw_sizes(axes: Any, parts: Parts) -> None:
    rows = np.arange(len(parts.names))
    for name, own, height, color in (("training", parts.train, 0.8, DARK), ("test", parts.test, 0.35, LIGHT)):
        sizes = [len(mine) for mine in own]
        if len(rows) <= MAX_APART:
            axes.barh(rows, sizes, height=height, color=color, label=name)
        else:  # one shape for all
            axes.fill_betweenx(rows, sizes, step="mid", color=color, linewidth=0, label=name)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", axis="y", length=0, labelleft=False)
    axes.tick_params(axis="x", colors=INK, labelsize=9)
    axes.set_xlabel("examples of a client", color=INK, fontsize=9)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, borderaxespad=0.2)
    legend.set_in_layout(False)  # it stands in the band that the colour bar opens


def _label(set_ticks: Any, names: tuple[str, ...], rotation: float = 0) -> None:
    step = -(-len(names) // MAX_LABELS)
    shown = [name if len(name) <= 32 else name[:31] + "…" for name in names[::step]]
    # A name is no mathematics, whatever dollar signs it has.
    set_ticks(np.arange(0, len(names), step), shown, rotation=rotation, fontsize=9 if len(names) <= 30 else 7, parse_math=False)
