"""results.md: the results of a comparison as tables for people, averaged over seeds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from fedlora.compare.grid import METHOD, SEED, Grid, said
from fedlora.compare.recipe import Recipe, Scale
from fedlora.compare.results import Row

Values = tuple[str, ...]
DOWN = ("method", "clients")  # the tables of a configuration whose keys go down the side; all others go across


@dataclass(frozen=True)
class Setting:
    """The cells of one setting: all its seeds. `row` is any of theirs."""

    row: Row
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    @property
    def ours(self) -> str:
        return percent(self.mean, stdev(self.accuracies) if len(self.accuracies) > 1 else None)


def to_markdown(grid: Grid, recipe: Recipe, found: Sequence[Row]) -> str:
    """The page: accuracy by setting, ours beside the published numbers, what failed, what is still to run."""
    header = recipe.header
    done = [row for row in found if row["status"] == "done"]
    parts = [f"# {header.title or header.name}", header.about, _state(grid, recipe, found)]
    settings = _settings(grid, done)
    if settings:
        parts += [_accuracy(grid, settings), _own(grid)]
    published = [each for each in settings if each.row["published_accuracy"] is not None]
    if published:
        parts += ["## Ours and the published numbers", _verdict(recipe, published), _side_by_side(grid, published)]
    failed = [row for row in found if row["status"] == "failed"]
    if failed:
        lines = (
            f"- {', '.join(_texts(row, [key for key in grid.varied if row[key] is not None]))}: {row['error']}" for row in failed
        )
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(share: float, spread: float | None = None) -> str:
    """ "82.1 ± 1.3", in percent points."""
    return f"{100 * share:.1f}" if spread is None else f"{100 * share:.1f} ± {100 * spread:.1f}"


def _state(grid: Grid, recipe: Recipe, found: Sequence[Row]) -> str:
    failed = sum(row["status"] == "failed" for row in found)
    scale = f" at scale {recipe.header.scale}" if recipe.header.scale else ""
    seeds = len({cell.config.seed for cell in grid.cells})
    over = f" Means over {seeds} seeds, ± their standard deviation." if seeds > 1 else " One seed."
    left = len(grid.cells) - len(found)
    parts = [f"{len(found) - failed} of {len(grid.cells)} runs done"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{left} to go"] if left else []
    return f"{', '.join(parts)}{scale}. Accuracy in %, after the last round.{over}"


def _settings(grid: Grid, done: Iterable[Row]) -> list[Setting]:
    """The settings in the recipe's order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in done:
        groups.setdefault(_values(row, [key for key in grid.varied if key != SEED]), []).append(row)
    return [Setting(rows[0], tuple(row["accuracy"] for row in rows)) for rows in groups.values()]


def _accuracy(grid: Grid, settings: Sequence[Setting]) -> str:
    """Methods and ranks down, everything else across, and what was uploaded in all (the mean over a line's settings)."""
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    down = [key for key in keys if key.split(".")[0] in DOWN]
    across = [key for key in keys if key not in down]
    columns = {_values(each.row, across): each.row for each in settings}
    lines: dict[Values, dict[Values, Setting]] = {}
    for each in settings:
        lines.setdefault(_values(each.row, down), {})[_values(each.row, across)] = each
    names = [", ".join(f"{_short(key)} {said(row[key])}" for key in across) or "accuracy" for row in columns.values()]
    body = []
    for line in lines.values():
        rows = [each.row for each in line.values()]
        sent = [f"{mean(row['upload_params'] for row in rows):,.0f}", _megabytes(mean(row["upload_bytes"] for row in rows))]
        body.append([*_texts(rows[0], down), *(line[column].ours if column in line else "" for column in columns), *sent])
    return table([*map(_short, down), *names, "parameters up", "MB up"], body, len(down))


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count >= 1e7 else f"{count / 1e6:.3f}"


def _own(grid: Grid) -> str:
    """The settings that go with a method."""
    if not grid.own:
        return ""
    first = {cell.flat[METHOD]: cell for cell in reversed(grid.cells)}
    own = {name: [f"{key} = {said(cell.flat[key])}" for key in grid.own if key in cell.flat] for name, cell in first.items()}
    return (
        "Settings that go with the method: "
        + "; ".join(f"{name}: {', '.join(own[name])}" for name in sorted(own) if own[name])
        + "."
    )


def _verdict(recipe: Recipe, settings: Sequence[Setting]) -> str:
    """How far ours are from the published numbers, in plain words."""
    gaps = [100 * (each.mean - each.row["published_accuracy"]) for each in settings]
    words = (
        f"Ours are between {min(gaps):+.1f} and {max(gaps):+.1f} points from the published, {mean(map(abs, gaps)):.1f} on average, "
        f"over {len(gaps)} settings: {sum(gap > 0 for gap in gaps)} above, {sum(gap < 0 for gap in gaps)} below."
    )
    if recipe.header.scale == Scale.SMALL.value:
        words += (
            " The published ones are of the paper's scale; ours are of a smaller model and fewer rounds, so compare the order of "
            "the methods, not the numbers."
        )
    return words


def _side_by_side(grid: Grid, settings: Sequence[Setting]) -> str:
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    body = []
    for each in sorted(settings, key=lambda each: -abs(each.mean - each.row["published_accuracy"])):
        theirs = each.row["published_accuracy"]
        gap = f"{100 * (each.mean - theirs):+.1f}"
        body.append([*_texts(each.row, keys), each.ours, percent(theirs, each.row["published_spread"]), gap])
    return table([*map(_short, keys), "ours", "published", "difference"], body, len(keys))


def table(heads: Sequence[str], body: Iterable[Sequence[str]], texts: int) -> str:
    """A Markdown table; columns after the first `texts` are numbers, aligned right."""
    rule = [":--"] * texts + ["--:"] * (len(heads) - texts)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in [heads, rule, *body])


def _values(row: Row, keys: Sequence[str]) -> Values:
    """What rows are grouped by."""
    return tuple(json.dumps(row[key]) for key in keys)


def _texts(row: Row, keys: Sequence[str]) -> list[str]:
    return [said(row[key]) for key in keys]


def _short(key: str) -> str:
    return "method" if key == METHOD else key.rpartition(".")[2]
