"""Where a method that selects ranks spends its budget: by module over the rounds, and by client."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.report.contenders import Contender, hardest
from fedlora.report.picture import Panel, Picture, Table
from fedlora.report.plots import heat
from fedlora.report.runs import Run

CHOSEN, WHO = "ranks_chosen", "ranks_chosen_clients"
MOST_CLIENTS = 6  # panels


@dataclass(frozen=True)
class Choice:
    """Ranks chosen in one round: `chosen` (K, N, r_G) for the K clients `ids`."""

    round: int
    ids: tuple[int, ...]
    chosen: NDArray[np.bool_]


def choices(run: Run) -> list[Choice]:
    """By round; none where the method does not select ranks."""
    out = []
    for t in run.rounds_with_arrays:
        arrays = run.arrays(t)
        if CHOSEN in arrays and arrays[CHOSEN].ndim == 3:
            chosen = arrays[CHOSEN].astype(bool)
            ids = arrays.get(WHO, np.arange(len(chosen)))
            out.append(Choice(t, tuple(map(int, ids)), chosen))
    return out


def pictures(contenders: Sequence[Contender]) -> list[Picture]:
    """Of one run: the first seed of the contender with the smallest rank where clients differ most."""
    found = [contender for contender in contenders if choices(contender.runs[0])]
    if not found:
        return []
    contender = [contender for contender in found if contender.where == hardest(found)][-1]
    run = contender.runs[0]
    history = choices(run)
    grid = Grid.of(run.modules or tuple(f"{i}.module" for i in range(history[0].chosen.shape[1])))
    which = (
        ""
        if len(found) == 1 and len(contender.runs) == 1
        else f" Shown: {contender.name}, {contender.where}, seed {run.config.seed}."
    )
    return [_by_round(history, grid, which), _by_client(history[-1], grid, run, which)]


@dataclass(frozen=True)
class Grid:
    """Modules as layers (down) by kinds (across)."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int, int], int]  # (layer's index, kind's index) -> module's index

    @classmethod
    def of(cls, modules: Sequence[str]) -> "Grid":
        """By the first number in each module's name, which is its layer; what follows is its kind."""
        pairs = [_split(name) for name in modules]
        layers, kinds = sorted({layer for layer, _ in pairs}), list(dict.fromkeys(kind for _, kind in pairs))
        cells = {(layers.index(layer), kinds.index(kind)): i for i, (layer, kind) in enumerate(pairs)}
        return cls(tuple(modules), tuple(layers), shorten(kinds), cells)

    def lay(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Values by module (N,) as (layers, kinds); nan where there is no such module."""
        out = np.full((len(self.layers), len(self.kinds)), np.nan)
        for place, i in self.cells.items():
            out[place] = values[i]
        return out


def shorten(kinds: Sequence[str]) -> tuple[str, ...]:
    """Each name's shortest ending that is no other's ending too."""
    out = []
    for kind in kinds:
        parts = kind.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other for other in kinds if other != kind]
        own = (end for end in endings if not any(other == end or other.endswith(f".{end}") for other in others))
        out.append(next(own, kind))
    return tuple(out)


def _split(name: str) -> tuple[int, str]:
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (0, name)


def _by_round(history: Sequence[Choice], grid: Grid, which: str) -> Picture:
    means = np.stack([choice.chosen.sum(2).mean(0) for choice in history])  # (rounds, N): over clients
    rounds = [str(choice.round) for choice in history]
    total = means.mean(0)
    by_kind = np.nanmean(grid.lay(total), axis=0)
    share = np.nansum(grid.lay(total), axis=0) / total.sum()
    favourite = int(np.argmax(by_kind))
    unused = float((means[-1] == 0).mean())
    size = history[0].chosen.shape[2]
    most = f"{100 * share[favourite]:.0f} % of the chosen ranks are in {grid.kinds[favourite]}"
    none = f"in the last round {100 * unused:.0f} % of the modules get none"
    finding = "; ".join([most] * (len(grid.kinds) > 1) + [none])
    top = max(1.0, float(means.max()))
    panels = []
    for k, kind in enumerate(grid.kinds):
        values = np.stack([grid.lay(mean)[:, k] for mean in means], axis=1)
        panels.append(Panel(kind, partial(_paint_rounds, values, [str(x) for x in grid.layers], rounds, top), (3.3, 2.5)))
    rows = tuple((name, *(f"{x:.2f}" for x in means[:, i])) for i, name in enumerate(grid.modules))
    table = Table("Ranks chosen of each module, mean over clients", ("module", *(f"round {t}" for t in rounds)), rows)
    about = f"Ranks chosen of {size}, mean over clients, by layer (down) and round (across), a panel a kind of module.{which}"
    return Picture("ranks-by-round", finding, about, tuple(panels), (table,))


def _paint_rounds(values: NDArray[Any], layers: list[str], rounds: list[str], top: float, axes: Any) -> None:
    heat.draw(axes, values, layers, rounds, top, "ranks", form="{:.1f}")
    axes.set_xlabel("round")
    axes.set_ylabel("layer")


def _by_client(choice: Choice, grid: Grid, run: Run, which: str) -> Picture:
    counts = choice.chosen.sum(2)  # (K, N)
    names = {int(client["id"]): str(client["name"]) for client in run.clients}
    shown = range(min(MOST_CLIENTS, len(choice.ids)))
    top = max(1.0, float(counts.max()))
    overlap = common(choice.chosen)
    off = overlap[~np.eye(len(overlap), dtype=bool)]
    finding = f"In round {choice.round} two clients share {100 * off.mean():.0f} % of their ranks on average" if off.size else ""
    finding = finding or f"The ranks that the client chose in round {choice.round}"
    client = [names.get(i, str(i)) for i in choice.ids]
    panels = tuple(Panel(client[k], partial(_paint_client, grid.lay(counts[k]), grid, top), (3.3, 2.9)) for k in shown)
    rows = tuple((name, *(str(x) for x in counts[:, i])) for i, name in enumerate(grid.modules))
    table = Table(f"Ranks chosen in round {choice.round}", ("module", *client), rows)
    more = f" The first {len(shown)} of {len(client)} clients." if len(shown) < len(client) else ""
    about = f"Number of ranks chosen of {choice.chosen.shape[2]}, by layer (down) and kind of module (across).{more}{which}"
    return Picture("ranks-by-client", finding, about, panels, (table,))


def _paint_client(values: NDArray[Any], grid: Grid, top: float, axes: Any) -> None:
    heat.draw(axes, values, [str(x) for x in grid.layers], [_broken(kind) for kind in grid.kinds], top, "ranks")
    axes.set_ylabel("layer")


def _broken(name: str) -> str:
    """A long name in two lines."""
    first, dot, rest = name.partition(".")
    return f"{first}{dot}\n{rest}" if len(name) > 14 and rest else name


def common(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(K, K): the ranks that both clients chose, as a share of those of the one that chose fewer; nan where one chose none."""
    flat = chosen.reshape(len(chosen), -1).astype(np.float64)
    sizes = flat.sum(1)
    least = np.minimum.outer(sizes, sizes)
    with np.errstate(invalid="ignore"):
        return np.asarray(flat @ flat.T / np.where(least == 0, np.nan, least))
