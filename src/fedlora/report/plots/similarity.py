"""How alike clients are: the cosine of their local updates, and the ranks they have in common."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.contenders import Contender, by_place
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots import heat
from fedlora.report.plots.ranks import choices, common
from fedlora.report.runs import Run

MOST = 4  # panels of one kind
COSINE, WHO = "similarity", "similarity_clients"


def pictures(contenders: Sequence[Contender]) -> list[Picture]:
    """Of the first seed of one contender in each place, preferring methods that select ranks."""
    selects = {id(contender): bool(choices(contender.runs[0])) for contender in contenders}
    picked = [
        sorted(here, key=lambda contender: not selects[id(contender)])[0] for here in by_place(_with_any(contenders)).values()
    ]
    cosines = [(contender, *found) for contender in picked if (found := cosine(contender.runs[0]))]
    shared = [(contender, *found) for contender in picked if (found := overlap(contender.runs[0]))]
    out = []
    if cosines:
        about = "Cosine of clients' local updates over all modules: 1 is the same direction, 0 nothing in common."
        out.append(_picture("similarity", cosines, "Mean cosine of two clients' updates: {}", about, "cosine", "{:.2f}", 1.0))
    if shared:
        about = "Ranks that both clients chose, in percent of those of the one that chose fewer."
        percent = [(contender, t, ids, 100 * values) for contender, t, ids, values in shared]
        finding = "Ranks that two clients have in common: {}"
        out.append(_picture("ranks-in-common", percent, finding, about, "% in common", "{:.0f} %", 100.0))
    return out


def cosine(run: Run) -> tuple[int, tuple[int, ...], NDArray[Any]] | None:
    """(round, clients' ids, (K, K)) of the last round that has it."""
    for t in reversed(run.rounds_with_arrays):
        arrays = run.arrays(t)
        if COSINE in arrays and len(arrays[COSINE]) > 1:
            ids = arrays.get(WHO, np.arange(len(arrays[COSINE])))
            return t, tuple(map(int, ids)), arrays[COSINE]
    return None


def overlap(run: Run) -> tuple[int, tuple[int, ...], NDArray[Any]] | None:
    """(round, clients' ids, (K, K)) of the last round in which ranks were chosen."""
    found = choices(run)
    return (found[-1].round, found[-1].ids, common(found[-1].chosen)) if found and len(found[-1].ids) > 1 else None


def off_diagonal(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(values[~np.eye(len(values), dtype=bool)])


def _with_any(contenders: Sequence[Contender]) -> list[Contender]:
    return [contender for contender in contenders if cosine(contender.runs[0]) or overlap(contender.runs[0])]


def _picture(name: str, found: Sequence[Any], finding: str, about: str, unit: str, form: str, top: float) -> Picture:
    shown = found[-MOST:]
    means = [form.format(np.nanmean(off_diagonal(values))) for _, _, _, values in shown]
    places = [f"{mean}{contender.at}" for mean, (contender, *_) in zip(means, shown, strict=True)]
    low = min(0.0, *(float(np.nanmin(values)) for _, _, _, values in shown))
    panels, tables = [], []
    for contender, t, ids, values in shown:
        names = {int(client["id"]): str(client["name"]) for client in contender.runs[0].clients}
        labels = [names.get(i, str(i)) for i in ids]
        heading = f"{contender.where}, {contender.name}, round {t}"
        panels.append(Panel(heading, partial(_paint, values, _bare(labels), low, unit, form.removesuffix(" %"), top), (3.9, 3.3)))
        rows = tuple((label, *(form.format(x) for x in row)) for label, row in zip(labels, values, strict=True))
        tables.append(Table(f"{unit.capitalize()}, {heading}", ("client", *labels), rows))
    said = means[0] if len(shown) == 1 else ", ".join(places)
    seed = " Of the first seed." if any(len(contender.runs) > 1 for contender, *_ in shown) else ""
    return Picture(name, finding.format(said), about + seed, tuple(panels), tuple(tables), columns=2)


def _bare(names: Sequence[str]) -> list[str]:
    """Names without the word that they all begin with: the axis says it."""
    return [name.removeprefix("client ") for name in names]


def _paint(values: NDArray[Any], labels: list[str], low: float, unit: str, form: str, top: float, axes: Any) -> None:
    heat.draw(axes, values, labels, labels, top, unit, form=form, low=low)
    axes.set_xlabel("client")
    axes.set_ylabel("client")
