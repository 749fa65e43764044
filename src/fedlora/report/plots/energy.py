"""Which of its directions hold a model's energy, by round: whether what clients of larger ranks learn is kept."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.contenders import Contender, hardest
from fedlora.report.looks import INK, QUIET, mix
from fedlora.report.picture import Panel, Picture, Table, spread_apart

MOST = 8  # panels
MOST_BANDS = 6
DARK, LIGHT = "#0b3c6f", "#dcebf7"  # of the first directions and of the last
ABOUT = (
    "Energy of the deployed change of the weights by direction, the strongest first: the squared singular values, summed over "
    "modules, in percent of all."
)

History = dict[int, NDArray[np.float64]]  # round -> percent of each direction, (r,); a mean over seeds


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """A panel for each contender where clients differ most, a stack of bands of directions for each scored round. None where no
    model has more than one direction."""
    found = {id(contender): history(contender) for contender in contenders}
    measured = [contender for contender in contenders if any(len(x) > 1 for x in found[id(contender)].values())]
    if not measured:
        return None
    here = [contender for contender in measured if contender.where == hardest(measured)]
    bands = split(
        [int(client["rank"]) for contender in here for client in contender.runs[0].clients],
        most(found[id(contender)] for contender in here),
    )
    stacks = {id(contender): {t: added(x, bands) for t, x in found[id(contender)].items()} for contender in here}
    rounds = sorted({t for contender in here for t in found[id(contender)]})
    rows = tuple(
        (contender.name, said(band), *(f"{own[t][i]:.2f}" if t in own else "–" for t in rounds))
        for contender in here
        for own in [stacks[id(contender)]]
        for i, band in enumerate(bands)
    )
    shown = here[:MOST]
    notes = [f" The first {len(shown)} of {len(here)}." if len(shown) < len(here) else ""]
    notes += [f" Shown: {here[0].where}." if len({contender.where for contender in measured}) > 1 else ""]
    notes += [" Means over seeds." if any(len(contender.runs) > 1 for contender in here) else ""]
    return Picture(
        "energy",
        _finding(here, stacks, bands),
        ABOUT + "".join(notes),
        tuple(
            Panel(contender.name if len(shown) > 1 else "", partial(_paint, stacks[id(contender)], bands), (3.3, 2.7))
            for contender in shown
        ),
        (Table("Energy by direction, percent", ("method", "directions", *(f"round {t}" for t in rounds)), rows, heads=2),),
        columns=2 if len(shown) in (2, 4) else 3,
    )


def history(contender: Contender) -> History:
    """Over the rounds in which every seed measured it."""
    runs = [{row["round"]: row["energy"] for row in run.rows if row.get("energy")} for run in contender.runs]
    rounds = sorted(set.intersection(*map(set, runs)))
    length = max((len(one[t]) for one in runs for t in rounds), default=0)
    padded = {t: [np.pad(np.array(one[t], dtype=float), (0, length - len(one[t]))) for one in runs] for t in rounds}
    return {t: 100 * np.mean(each, axis=0) for t, each in padded.items()}


def most(histories: Any) -> int:
    """The most directions that any round has."""
    return max(len(x) for own in histories for x in own.values())


def split(ranks: Sequence[int], directions: int) -> list[tuple[int, int]]:
    """Bands (l, h] of the directions: up to each rank that clients have, or, where all have one or too many differ, doubling."""
    ends = sorted({rank for rank in ranks if rank < directions})
    if not 0 < len(ends) < MOST_BANDS or len(set(ranks)) == 1:
        step = 2 if directions <= 2 ** (MOST_BANDS - 1) else 4
        ends = [step**i for i in range(MOST_BANDS) if step**i < directions]
    return list(pairwise([0, *ends, directions]))


def added(percent: NDArray[np.float64], bands: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """The percent of each band."""
    return np.array([percent[low:high].sum() for low, high in bands])


def said(band: tuple[int, int]) -> str:
    low, high = band
    return f"{low + 1}–{high}" if high > low + 1 else str(high)


def _finding(
    contenders: Sequence[Contender], stacks: dict[int, dict[int, NDArray[np.float64]]], bands: Sequence[tuple[int, int]]
) -> str:
    last = {id(contender): max(stacks[id(contender)]) for contender in contenders}
    share = {id(contender): float(stacks[id(contender)][last[id(contender)]][0]) for contender in contenders}
    order = sorted(contenders, key=lambda contender: share[id(contender)])
    first, of = bands[0][1], bands[-1][1]
    what = f"the first {first} of {of} directions hold" if first > 1 else f"the first of {of} directions holds"
    text = f"In round {max(last.values())} {what} {share[id(order[-1])]:.0f} % of the energy"
    return f"{text} with {order[-1].name}, {share[id(order[0])]:.0f} % with {order[0].name}" if len(order) > 1 else text


def _paint(stack: dict[int, NDArray[np.float64]], bands: Sequence[tuple[int, int]], axes: Any) -> None:
    rounds = sorted(stack)
    values = np.array([stack[t] for t in rounds])  # (rounds, bands)
    places, low = np.arange(len(rounds)), np.zeros(len(rounds))
    middle = []
    for i in range(len(bands)):
        colour = mix(DARK, LIGHT, i / max(1, len(bands) - 1))
        axes.bar(places, values[:, i], bottom=low, width=0.84, color=colour, edgecolor="white", linewidth=0.6)
        middle.append(float(low[-1] + values[-1, i] / 2))
        low = low + values[:, i]
    names = [i for i in range(len(bands)) if values[:, i].any()]
    heights = spread_apart([middle[i] for i in names], 9.0, 3.0, 98.0)
    for i, height in zip(names, heights, strict=True):
        axes.annotate(
            said(bands[i]),
            (places[-1] + 0.42, middle[i]),
            xytext=(1.04, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )
    axes.text(1.04, 1.03, "direction", transform=axes.transAxes, fontsize=8, color=QUIET)
    step = -(-len(rounds) // 10)
    axes.set_xticks(places[::step], [str(t) for t in rounds[::step]])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(rounds) - 0.4)
    axes.set_ylim(0, 100)
    axes.set_xlabel("round")
    axes.set_ylabel("energy by direction, %")
