"""Pictures of one run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_run(rows: Sequence[Mapping[str, Any]], title: str, folder: Path) -> None:
    """accuracy.png: test accuracy by round and by what was uploaded, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [i for i, row in enumerate(rows) if row["accuracy"] is not None]
    rounds = [rows[i]["round"] for i in scored]
    values = [100 * rows[i]["accuracy"] for i in scored]
    megabytes = np.cumsum([row["upload_bytes"] for row in rows])[scored] / 1e6
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, x, label in ((left, rounds, "round"), (right, megabytes, "uploaded by all clients, MB")):
        axes.plot(x, values, marker="o", markersize=4, color="#0072B2")
        axes.set_xlabel(label)
        axes.set_ylim(0, 100)
        axes.set_xlim(left=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("test accuracy, %")
    left.annotate(f"{values[-1]:.1f} %", (rounds[-1], values[-1]), xytext=(0, 8), textcoords="offset points", ha="right")
    figure.suptitle(f"{title}: {values[-1]:.1f} % after {rounds[-1]} rounds and {megabytes[-1]:.1f} MB of uploads")
    figure.savefig(folder / "accuracy.png", dpi=150)
