"""results.md: the results of a comparison as tables for people, averaged over seeds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from fedlora.comparison.grid import METHOD, SEED, Grid, said
from fedlora.comparison.recipe import Recipe, Scale
from fedlora.comparison.results import Row
from fedlora.tasks.metrics import CLASSIFICATION

OTHERS = {"macro_f1": "Macro F1", "validation_accuracy": "Validation accuracy"}
PERSONAL = "Personal models, each scored on its client's own test examples, so not to be ranked with common ones:"
Values = tuple[str, ...]
DOWN = ("method", "clients")  # the tables of a configuration whose keys go down the side; all others go across


@dataclass(frozen=True)
class Setting:
    """The cells of one setting: all its seeds."""

    rows: tuple[Row, ...]

    @property
    def row(self) -> Row:
        """Any of theirs, for what they have in common."""
        return self.rows[0]

    @property
    def mean(self) -> float:
        return float(mean(row["accuracy"] for row in self.rows))

    @property
    def commonest(self) -> float | None:
        """The accuracy of always answering the commonest training class."""
        values = [row["commonest_accuracy"] for row in self.rows if row["commonest_accuracy"] is not None]
        return float(mean(values)) if values else None

    def score(self, key: str = "accuracy") -> str:
        """A score over seeds; empty where not all have it."""
        values = [row[key] for row in self.rows]
        if None in values:
            return ""
        return percent(mean(values), stdev(values) if len(values) > 1 else None)


def to_markdown(grid: Grid, recipe: Recipe, found: Sequence[Row]) -> str:
    """The page: accuracy by setting, ours beside the published numbers, what failed, what is still to run."""
    header = recipe.header
    done = [row for row in found if row["status"] == "done"]
    parts = [f"# {header.title or header.name}", header.about, _state(grid, recipe, found)]
    settings = _settings(grid, done)
    for kind in (False, True):
        parts += _of_kind(grid, [each for each in settings if each.row["personal"] is kind])
    parts += [_own(grid)] if settings else []
    published = [each for each in settings if each.row["published_accuracy"] is not None]
    if published:
        parts += ["## Ours and the published numbers", _verdict(recipe, published), _side_by_side(grid, published)]
    parts += _lost(grid, settings)
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
    chosen = any(row["validation_accuracy"] is not None for row in found)
    when = "of the round that validation chose" if chosen else "after the last round"
    return f"{', '.join(parts)}{scale}. Accuracy in %, {when}.{over}"


def _settings(grid: Grid, done: Iterable[Row]) -> list[Setting]:
    """The settings in the recipe's order."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in done:
        groups.setdefault(_values(row, [key for key in grid.varied if key != SEED]), []).append(row)
    return [Setting(tuple(rows)) for rows in groups.values()]


def _of_kind(grid: Grid, settings: Sequence[Setting]) -> list[str]:
    """The scores of settings that can be compared: those of common models, or those of personal ones."""
    if not settings:
        return []
    parts = [PERSONAL] if settings[0].row["personal"] else []
    parts.append(_scores(grid, settings, "accuracy"))
    for key, name in OTHERS.items():
        if any(each.score(key) for each in settings):
            parts += [f"{name}, in %:", _scores(grid, settings, key)]
    if all(CLASSIFICATION[0].no_better(each.mean, each.commonest) for each in settings):
        parts.append("**No method does better than always answering the commonest training class.**")
    return parts


def _lost(grid: Grid, settings: Sequence[Setting]) -> list[str]:
    """How many replies of clients counted for nothing, by setting, all seeds together."""
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    lost = [(each.row, sum(row["failed_replies"] or 0 for row in each.rows)) for each in settings]
    body = [[*_texts(row, keys), f"{count:,}"] for row, count in lost if count]
    return (
        ["## Clients that failed", table([*map(_short, keys), "replies that counted for nothing"], body, len(keys))] if body else []
    )


def _scores(grid: Grid, settings: Sequence[Setting], score: str) -> str:
    """A score: methods and ranks down, everything else across; with accuracy that of the commonest class, and what was uploaded in
    all (the mean over a line's settings)."""
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    down = [key for key in keys if key.split(".")[0] in DOWN]
    across = [key for key in keys if key not in down]
    columns: dict[Values, list[Setting]] = {}
    lines: dict[Values, dict[Values, Setting]] = {}
    for each in settings:
        columns.setdefault(_values(each.row, across), []).append(each)
        lines.setdefault(_values(each.row, down), {})[_values(each.row, across)] = each
    names = [
        ", ".join(f"{_short(key)} {said(here[0].row[key])}" for key in across) or score.replace("_", " ").replace("f1", "F1")
        for here in columns.values()
    ]
    first = score == "accuracy"
    body = []
    for line in lines.values():
        rows = [each.row for each in line.values()]
        sent = [f"{mean(row['upload_params'] for row in rows):,.0f}", _megabytes(mean(row["upload_bytes"] for row in rows))]
        scores = [line[column].score(score) if column in line else "" for column in columns]
        body.append([*_texts(rows[0], down), *scores, *(sent if first else ())])
    bases = [[each.commonest for each in here if each.commonest is not None] for here in columns.values()]
    if first and any(bases):
        body.append(
            [
                f"always {CLASSIFICATION[0].constant}",
                *[""] * (len(down) - 1),
                *(percent(mean(base)) if base else "" for base in bases),
                "",
                "",
            ]
        )
    return table([*map(_short, down), *names, *(("parameters up", "MB up") if first else ())], body, len(down))


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
        body.append([*_texts(each.row, keys), each.score(), percent(theirs, each.row["published_spread"]), gap])
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
