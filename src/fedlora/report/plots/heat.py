"""Heat maps in shades from white to dark, which survive a black-and-white printer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.looks import FAINT

MOST_NUMBERS = 12  # of a side: beyond them cells have no numbers
MOST_ROWS, MOST_COLUMNS = 24, 12  # names; of columns that stand upright as many as of rows


def draw(
    axes: Any,
    values: NDArray[Any],
    rows: Sequence[str],
    columns: Sequence[str],
    top: float,
    unit: str,
    form: str = "{:.0f}",
    low: float = 0.0,
    every: bool = False,
) -> None:
    """values (rows, columns) in shades of [low, top], with a bar that says what they are; small maps have numbers, but no zeros.
    `every`: all rows and columns are named; else as many as have room in a usual panel."""
    from matplotlib import colormaps

    shown = np.ma.masked_invalid(np.asarray(values, dtype=float))
    image = axes.imshow(shown, cmap=colormaps["Blues"], vmin=low, vmax=top, aspect="auto", interpolation="nearest")
    turned = sum(map(len, columns[:MOST_COLUMNS])) > 30  # they stand upright
    across = (axes.set_xticks, columns, 90 if turned else 0, MOST_ROWS if turned else MOST_COLUMNS)
    for side, names, rotation, most in (across, (axes.set_yticks, rows, 0, MOST_ROWS)):
        step = 1 if every else -(-len(names) // most)
        side(range(0, len(names), step), names[::step], rotation=rotation)
    axes.spines[:].set(visible=True, color=FAINT)
    axes.tick_params(length=0)
    if max(shown.shape) <= MOST_NUMBERS and len(form.format(top)) * shown.shape[1] <= 40:
        for (i, j), value in np.ndenumerate(shown):
            dark = value > low + 0.55 * (top - low)
            if value and not np.ma.is_masked(value):
                axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7.5, color="white" if dark else "#1f2328")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
