"""How well each class is recognised, and which are taken for one another, by the best where clients differ most."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.answers import answers
from fedlora.report.contenders import Contender, hardest
from fedlora.report.looks import INK
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots import heat
from fedlora.report.plots.lines import fold, row_height
from fedlora.report.runs import Run

CONFUSION = "confusion"
MOST_CLASSES = 30  # of a map; of more, the pairs that are confused most
MOST_PAIRS = 15

Counts = NDArray[np.int64]  # (C, C): test examples by true class (down) and predicted class (across)


@dataclass(frozen=True)
class Scores:
    """Of each class, (C,), shares of 1: nan where a class was never predicted (precision), or has no test example (recall)."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    examples: NDArray[np.int64]


def scores(confusion: Counts) -> Scores:
    """F1 is 2 TP / (2 TP + FP + FN), 0 where nothing of a class was right, nan where it neither occurs nor is predicted."""
    right, predicted, examples = np.diag(confusion).astype(float), confusion.sum(0), confusion.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Scores(right / predicted, right / examples, 2 * right / (predicted + examples), examples)


def confusion(run: Run) -> tuple[int, Counts] | None:
    """(round, counts) of the round that is reported, else of the last one that has them; None where none has."""
    rounds = run.rounds_with_arrays
    own = [run.final["round"]] if run.final and run.final["round"] in rounds else []
    for t in (*own, *reversed(rounds)):
        found = run.arrays(t).get(CONFUSION)
        if found is not None and found.ndim == 2 and len(found) == found.shape[1] and found.any():
            return t, found.astype(np.int64)
    return None


def picture(contenders: Sequence[Contender]) -> Picture | None:
    """A map of true and predicted classes, or the pairs that are confused most; None where no run counted them."""
    found = {id(contender): one for contender in contenders if (one := confusion(contender.runs[0]))}
    ranked = [
        (answer.where, contender) for answer in answers(contenders) for contender in answer.contenders if id(contender) in found
    ]
    if not ranked:
        return None
    where = hardest([contender for _, contender in ranked])
    here = [contender for place, contender in ranked if place == where]
    best = here[0]
    round, counts = found[id(best)]
    names = _names(best.runs[0], len(counts))
    which = f" Shown: {best.name}{f', {where}' if len(contenders) > 1 else ''}, after round {round}"
    which += f", seed {best.runs[0].config.seed}." if len(best.runs) > 1 else "."
    if len(counts) <= MOST_CLASSES:
        about, paint = "Test examples by true class (down) and predicted class (across), in percent of the true class.", _paint_map
        size = _map_size(names)
    else:
        about, paint = f"The {MOST_PAIRS} pairs of classes that are confused most: true class → predicted class.", _paint_pairs
        confused = [f"{names[i]} → {names[j]}" for i, j, _ in pairs(counts)]
        size = (5.6, 0.9 + row_height(confused or [""]) * len(confused))
    tables = [_table(best, counts, names)]
    if len(here) > 1:
        tables.append(_compared(here, [found[id(contender)][1] for contender in here], names))
    tables.append(_pairs_table(counts, names))
    return Picture(
        "confusion",
        _finding(counts, names),
        about + which,
        (Panel("", partial(paint, counts, names), size),),
        tuple(tables),
        columns=1,
    )


def pairs(counts: Counts) -> list[tuple[int, int, int]]:
    """(true, predicted, examples) of the classes that were confused, most first."""
    wrong = counts - np.diag(np.diag(counts))
    found = [(int(i), int(j), int(wrong[i, j])) for i, j in np.argwhere(wrong)]
    return sorted(found, key=lambda pair: -pair[2])[:MOST_PAIRS]


def _names(run: Run, count: int) -> list[str]:
    return list(run.label_names) if len(run.label_names) == count else [str(i) for i in range(count)]


def _worst_first(counts: Counts) -> list[int]:
    """The classes that have test examples, the lowest F1 first."""
    own = scores(counts)
    return sorted((int(i) for i in np.flatnonzero(own.examples)), key=lambda i: own.f1[i])


def _finding(counts: Counts, names: Sequence[str]) -> str:
    own, order = scores(counts), _worst_first(counts)
    worst, best = order[0], order[-1]
    text = f"Worst class: {names[worst]} with F1 {100 * own.f1[worst]:.1f} %, best {names[best]} with {100 * own.f1[best]:.1f} %"
    confused = pairs(counts)
    if not confused:
        return f"{text}; no two classes are confused"
    true, predicted, number = confused[0]
    return f"{text}; {names[true]} is taken for {names[predicted]} most often, {number:,} times"


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.1f}"


def _table(contender: Contender, counts: Counts, names: Sequence[str]) -> Table:
    own = scores(counts)
    rows = tuple(
        (names[i], _percent(own.precision[i]), _percent(own.recall[i]), _percent(own.f1[i]), f"{own.examples[i]:,}")
        for i in _worst_first(counts)
    )
    return Table(
        f"Scores of each class, worst first: {contender.name}",
        ("class", "precision, %", "recall, %", "F1, %", "test examples"),
        rows,
    )


def _compared(contenders: Sequence[Contender], counts: Sequence[Counts], names: Sequence[str]) -> Table:
    each = [scores(one).f1 for one in counts]
    rows = tuple((names[i], *(_percent(f1[i]) for f1 in each)) for i in _worst_first(counts[0]))
    return Table("F1 of each class in percent", ("class", *(contender.name for contender in contenders)), rows)


def _pairs_table(counts: Counts, names: Sequence[str]) -> Table:
    rows = tuple((names[i], names[j], f"{number:,}") for i, j, number in pairs(counts))
    return Table("The classes that are confused most", ("true class", "predicted class", "test examples"), rows, heads=2)


def _map_size(names: Sequence[str]) -> tuple[float, float]:
    """Inches: room for every class and for the longest name on both sides."""
    side, text = max(2.2, 0.21 * len(names)), 0.075 * max(map(len, fold_all(names)))
    return side + text + 1.3, side + text + 0.5


def fold_all(names: Sequence[str]) -> list[str]:
    return [line for name in names for line in fold(name).split("\n")]


def _paint_map(counts: Counts, names: Sequence[str], axes: Any) -> None:
    with np.errstate(invalid="ignore"):
        shares = 100 * counts / counts.sum(1, keepdims=True)
    shown = [fold(name) for name in names]
    heat.draw(axes, shares, shown, shown, 100, "% of the true class", every=True)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _paint_pairs(counts: Counts, names: Sequence[str], axes: Any) -> None:
    found = pairs(counts)
    rows = range(len(found))
    axes.barh(rows, [number for *_, number in found], height=0.66, color="#8fb8d6")
    for row, (*_, number) in enumerate(found):
        axes.annotate(f"{number:,}", (number, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, [fold(f"{names[i]} → {names[j]}") for i, j, _ in found])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.12 * max(number for *_, number in found) if found else 1)
    axes.set_xlabel("test examples")
