"""results.md: the results of a comparison as tables for people, averaged over seeds."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from fedlora.comparison.grid import METHOD, SEED, Grid, said
from fedlora.comparison.recipe import Recipe, Scale
from fedlora.comparison.results import Metrics, Row
from fedlora.report import words
from fedlora.tasks.metrics import CLASSIFICATION, Metric, number

PERSONAL = "Personal models, each scored on its client's own test examples, so not to be ranked with common ones:"
Values = tuple[str, ...]
DOWN = ("method", "clients")  # the tables of a configuration whose keys go down the side; all others go across


@dataclass(frozen=True)
class Setting:
    """The cells of one setting: all its seeds; the first of the metrics is what it is compared by."""

    rows: tuple[Row, ...]
    metrics: Metrics

    @property
    def row(self) -> Row:
        """Any of theirs, for what they have in common."""
        return self.rows[0]

    @property
    def mean(self) -> float | None:
        """None where not all seeds have a score."""
        scores = [row["score"] for row in self.rows]
        return None if None in scores else float(mean(scores))

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    @property
    def baseline(self) -> float | None:
        """The score of the constant answer."""
        values = [x for row in self.rows if (x := row.get(self.metric.baseline)) is not None]
        return float(mean(values)) if values else None

    @property
    def published(self) -> float | None:
        """Of a setting that has a score."""
        value: float | None = self.row[f"published_{self.metric.name}"]
        return None if self.mean is None else value

    @property
    def gap(self) -> float:
        """Ours less the published score, in points."""
        assert self.mean is not None and self.published is not None
        return self.metric.points(self.mean) - self.metric.points(self.published)

    def score(self, key: str = "score", metric: Metric | None = None) -> str:
        """A score over seeds; empty where not all have it."""
        values = [row[key] for row in self.rows]
        if None in values:
            return ""
        return spread(metric or self.metric, mean(values), stdev(values) if len(values) > 1 else None)


def to_markdown(grid: Grid, recipe: Recipe, found: Sequence[Row], known: Sequence[Metrics] = (CLASSIFICATION,)) -> str:
    """The page: scores by setting, ours beside the published numbers, what failed, what is still to run.

    Args:
        known: the metrics of the runs, as `results.metrics` finds them.
    """
    header = recipe.header
    done = [row for row in found if row["status"] == "done"]
    parts = [f"# {header.title or header.name}", header.about, _state(grid, recipe, found, [metrics[0] for metrics in known])]
    settings = _settings(grid, done, known)
    for kind in (False, True):
        for metrics in known:
            own = [each for each in settings if each.row["personal"] is kind and each.metrics == metrics]
            parts += _of_kind(grid, own, titled=len(known) > 1)
    parts += [_own(grid)] if settings else []
    published = [each for each in settings if each.published is not None]
    parts += ["## Ours and the published numbers"] if published else []
    for metrics in known:
        own = [each for each in published if each.metrics == metrics]
        parts += [_verdict(recipe, own), _side_by_side(grid, own)] if own else []
    parts += _lost(grid, settings)
    failed = [row for row in found if row["status"] == "failed"]
    if failed:
        lines = (
            f"- {', '.join(_texts(row, [key for key in grid.varied if row[key] is not None]))}: {row['error']}" for row in failed
        )
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def spread(metric: Metric, value: float, deviation: float | None = None) -> str:
    """ "82.1 ± 1.3", without the unit."""
    return metric.number(value) if deviation is None else f"{metric.number(value)} ± {metric.number(deviation)}"


def _state(grid: Grid, recipe: Recipe, found: Sequence[Row], metrics: Sequence[Metric]) -> str:
    failed = sum(row["status"] == "failed" for row in found)
    scale = f" at scale {recipe.header.scale}" if recipe.header.scale else ""
    seeds = len({cell.config.seed for cell in grid.cells})
    over = f" Means over {seeds} seeds, ± their standard deviation." if seeds > 1 else " One seed."
    left = len(grid.cells) - len(found)
    parts = [f"{len(found) - failed} of {len(grid.cells)} runs done"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{left} to go"] if left else []
    chosen = any(row.get(f"validation_{metric.name}") is not None for row in found for metric in metrics)
    when = "of the round that validation chose" if chosen else "after the last round"
    scores = words.capital(", ".join(f"{words.titled(metric)}{_in(metric)}" for metric in metrics))
    return f"{', '.join(parts)}{scale}. {scores}, {when}.{over}"


def _in(metric: Metric) -> str:
    return f" in {metric.unit}" if metric.unit else ""


def _settings(grid: Grid, done: Iterable[Row], known: Sequence[Metrics]) -> list[Setting]:
    """The settings in the recipe's order."""
    of = {metrics[0].name: metrics for metrics in known}
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in done:
        groups.setdefault(_values(row, [key for key in grid.varied if key != SEED]), []).append(row)
    return [Setting(tuple(rows), of[rows[0]["metric"]]) for rows in groups.values()]


def _of_kind(grid: Grid, settings: Sequence[Setting], titled: bool) -> list[str]:
    """The scores of settings that can be compared: of one metric, those of common models, or those of personal ones."""
    if not settings:
        return []
    metric = settings[0].metric
    parts = [PERSONAL] if settings[0].row["personal"] else []
    parts += [f"{words.capital(words.titled(metric))}{_comma(metric)}:"] if titled else []
    parts.append(_scores(grid, settings, "score", metric.title, metric))
    for key, (name, of) in words.further(settings[0].metrics).items():
        if not key.startswith("held_out_") and any(each.score(key) for each in settings):
            lower = " (lower is better)" if of.better == "lower" else ""
            parts += [f"{words.capital(name)}{lower}{_comma(of)}:", _scores(grid, settings, key, name, of)]
    if all(each.mean is not None and metric.no_better(each.mean, each.baseline) for each in settings):
        parts.append(f"**{words.no_better(metric)}**")
    return parts


def _comma(metric: Metric) -> str:
    return f", in {metric.unit}" if metric.unit else ""


def _lost(grid: Grid, settings: Sequence[Setting]) -> list[str]:
    """How many replies of clients counted for nothing, by setting, all seeds together."""
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    lost = [(each.row, sum(row["failed_replies"] or 0 for row in each.rows)) for each in settings]
    body = [[*_texts(row, keys), f"{count:,}"] for row, count in lost if count]
    return (
        ["## Clients that failed", table([*map(_short, keys), "replies that counted for nothing"], body, len(keys))] if body else []
    )


def _scores(grid: Grid, settings: Sequence[Setting], score: str, name: str, metric: Metric) -> str:
    """A score: methods and ranks down, everything else across; with the one that is compared that of the constant answer, and what
    was uploaded in all (the mean over a line's settings)."""
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    down = [key for key in keys if key.split(".")[0] in DOWN]
    across = [key for key in keys if key not in down]
    columns: dict[Values, list[Setting]] = {}
    lines: dict[Values, dict[Values, Setting]] = {}
    for each in settings:
        columns.setdefault(_values(each.row, across), []).append(each)
        lines.setdefault(_values(each.row, down), {})[_values(each.row, across)] = each
    names = [", ".join(f"{_short(key)} {said(here[0].row[key])}" for key in across) or name for here in columns.values()]
    first = score == "score"
    body = []
    for line in lines.values():
        rows = [each.row for each in line.values()]
        sent = [f"{mean(row['upload_params'] for row in rows):,.0f}", _megabytes(mean(row["upload_bytes"] for row in rows))]
        scores = [line[column].score(score, metric) if column in line else "" for column in columns]
        body.append([*_texts(rows[0], down), *scores, *(sent if first else ())])
    bases = [[each.baseline for each in here if each.baseline is not None] for here in columns.values()]
    if first and any(bases):
        constant = [metric.number(mean(base)) if base else "" for base in bases]
        body.append([metric.rival, *[""] * (len(down) - 1), *constant, "", ""])
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
    gaps, metric = [each.gap for each in settings], settings[0].metric
    points = "points" if metric.unit == "%" else f"{metric.unit} in {metric.title}".strip()
    text = (
        f"Ours are between {_signed(min(gaps), metric)} and {_signed(max(gaps), metric)} {points} from the published, "
        f"{number(mean(map(abs, gaps)), metric.unit)} on average, over {len(gaps)} settings: {sum(gap > 0 for gap in gaps)} above, "
        f"{sum(gap < 0 for gap in gaps)} below."
    )
    if recipe.header.scale == Scale.SMALL.value:
        text += (
            " The published ones are of the paper's scale; ours are of a smaller model and fewer rounds, so compare the order of "
            "the methods, not the numbers."
        )
    return text


def _signed(points: float, metric: Metric) -> str:
    return f"{points:+.1f}" if metric.unit == "%" else f"{points:+.3g}"


def _side_by_side(grid: Grid, settings: Sequence[Setting]) -> str:
    keys = [key for key in grid.varied if key not in (SEED, *grid.own)]
    body = []
    for each in sorted(settings, key=lambda each: -abs(each.gap)):
        assert each.published is not None
        theirs = spread(each.metric, each.published, each.row["published_spread"])
        body.append([*_texts(each.row, keys), each.score(), theirs, _signed(each.gap, each.metric)])
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
