"""The contenders of a comparison: runs that differ in nothing but the seed.

A *contender* is a method with its settings and its rank in one *place*: what contenders meet there on equal terms, which is the
task, the data, how they are dealt, the clients, the model, and whether one common model is scored on the whole test set or each
client's personal model on its own part of it. Pictures have a panel for each place and a line for each of its contenders.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Strata
from fedlora.names import told_apart
from fedlora.report.looks import FIXED, Look, page, variants
from fedlora.report.runs import Comparison, Run, as_text, cumulative, settings
from fedlora.tasks.metrics import Metric, number, text

PLACES = ("task.", "data.", "model.source", "model.head", "clients.count", "clients.sample", "clients.domains")
METHOD, RANK, ALPHA = "method.name", "clients.rank", "data.alpha"
SOURCES = ("data.source", "model.source")
COMMON, PERSONAL = "common model", "personal models"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds, in points of its unit; its text is without the unit."""

    mean: float
    low: float
    high: float
    std: float
    count: int
    unit: str = "%"

    def __str__(self) -> str:
        mean = number(self.mean, self.unit)
        return f"{mean} ± {number(self.std, self.unit)}" if self.count > 1 else mean

    @property
    def whole(self) -> str:
        """With the unit."""
        return f"{self} {self.unit}".rstrip()

    @property
    def middle(self) -> str:
        """The mean alone, with the unit."""
        return text(self.mean, self.unit)


@dataclass(frozen=True)
class Curve:
    """Points of a metric by round, over seeds; `megabytes` were uploaded by all clients up to that round (mean)."""

    rounds: NDArray[np.int64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    megabytes: NDArray[np.float64]
    params: NDArray[np.float64]


@dataclass(frozen=True)
class Contender:
    """Runs that differ in the seed only.

    Attributes:
        place: the varied keys of the place, with their values; files and folders by their short names.
        rank: None where all runs have one plan of ranks.
        setting: the other varied keys of the contender, without those that follow from the method.
        title: of the method, short.
        kind: COMMON or PERSONAL, where a comparison has both; else empty.
    """

    place: tuple[tuple[str, Any], ...]
    method: str
    rank: str | None
    setting: tuple[tuple[str, Any], ...]
    title: str
    look: Look
    runs: tuple[Run, ...]
    kind: str = ""

    @property
    def line(self) -> str:
        """The contender without its rank."""
        return " ".join([self.title, *(word(key, value) for key, value in self.setting)])

    @property
    def name(self) -> str:
        return self.line if self.rank is None else f"{self.line} rank {self.rank}"

    @property
    def site(self) -> str:
        """The place in words, whichever models are scored; of a comparison of one place, what its data are."""
        return " ".join(word(key, value) for key, value in self.place) or place_of(self.runs[0])

    @property
    def where(self) -> str:
        """The place in words; of a comparison of one site, no more than the kind of models where there are both."""
        return ", ".join(filter(None, (self.site if self.place else "", self.kind))) or self.site

    @property
    def at(self) -> str:
        """The place as a title adds it: " at Dir(0.1) with a common model"."""
        kind = {COMMON: " with a common model", PERSONAL: " with personal models"}.get(self.kind, "")
        return (f" at {self.site}" if self.place or not kind else "") + kind

    @property
    def panel(self) -> str:
        return self.where if self.rank is None else f"{self.where}, rank {self.rank}"

    @property
    def metric(self) -> Metric:
        """What it is compared by."""
        return self.runs[0].metric

    @property
    def scored(self) -> bool:
        """Whether any round of any seed has a score."""
        return any(run.scored for run in self.runs)

    @property
    def last_round(self) -> int:
        """The last round that was scored in any seed; 0 where none was."""
        return max((run.scored[-1]["round"] for run in self.runs if run.scored), default=0)

    @property
    def personal(self) -> bool:
        return any(run.personal for run in self.runs)

    @property
    def unfinished(self) -> bool:
        return any(run.unfinished for run in self.runs)

    @property
    def ranked(self) -> bool:
        """Whether it is compared with others: it was scored in some seed, and diverged in none."""
        return self.final() is not None and not any(run.diverged for run in self.runs)

    def curve(self, metric: Metric | None = None) -> Curve:
        """Of the score, or of another metric, over the rounds in which every seed has it, so that a mean is always over the same
        seeds; empty where there is none."""
        key, points = ("score", self.metric.points) if metric is None else (metric.name, metric.points)
        known = [{row["round"]: points(row[key]) for row in run.rows if row.get(key) is not None} for run in self.runs]
        rounds = sorted(set.intersection(*map(set, known)))
        values = np.array([[one[t] for t in rounds] for one in known]).reshape(len(self.runs), len(rounds))
        where = [np.isin([row["round"] for row in run.rows], rounds) for run in self.runs]
        size, params = (
            np.array([cumulative(run, key)[here] for run, here in zip(self.runs, where, strict=True)]).mean(0)
            for key in ("upload_bytes", "upload_params")
        )
        return Curve(np.array(rounds, dtype=np.int64), values.mean(0), values.min(0), values.max(0), size / 1e6, params)

    def final(self, key: str = "score", metric: Metric | None = None) -> Spread | None:
        """The score of the round that is reported, or another value of it, over seeds; None where no such round was scored. It is
        of the metric that the contender is compared by where no other is given."""
        metric, rows = metric or self.metric, [run.final for run in self.runs]
        return spread([metric.points(row[key]) for row in rows if row and row.get(key) is not None], metric.unit)

    def total(self, key: str = "upload_bytes") -> float:
        """The sum of a row key over all rounds, a mean over seeds."""
        return float(np.mean([cumulative(run, key)[-1] for run in self.runs]))


def contenders(comparison: Comparison) -> tuple[Contender, ...]:
    """The contenders in reading order: places (least heterogeneous first), then methods, then ranks (largest first)."""
    own = [settings(run.config) for run in comparison.runs]
    follows = _follow_from_method(comparison, own)
    names = told_apart(source for table in own for key in SOURCES for source in _listed(table[key]))
    mixed = len({run.personal for run in comparison.runs if run.scored}) > 1
    groups: dict[tuple[str, ...], list[int]] = {}
    keys = [key for key in comparison.varied if key != "seed"]
    for i, table in enumerate(own):
        groups.setdefault(tuple(as_text(table.get(key)) for key in keys), []).append(i)
    found = []
    for members in groups.values():
        table = own[members[0]]
        place = tuple((key, _named(key, table[key], names)) for key in keys if key.startswith(PLACES) and key in table)
        method = table[METHOD]
        shown = [key for key in keys if not key.startswith(PLACES) and key not in {METHOD, RANK} | follows[method]]
        setting = tuple((key, table[key]) for key in shown if key in table)
        rank = as_text(table[RANK]) if RANK in keys and any(RANK not in own for own in follows.values()) else None
        found.append((place, method, rank, setting, tuple(comparison.runs[i] for i in members)))
    by_method: dict[str, list[Any]] = {}
    for _, method, _, setting, _ in found:
        known = by_method.setdefault(method, [])
        if setting not in known:
            known.append(setting)
    looks = page(by_method)
    shades = {method: variants(looks[method], len(known), alone=len(by_method) == 1) for method, known in by_method.items()}
    kinds = [(PERSONAL if any(run.personal for run in runs) else COMMON) if mixed else "" for *_, runs in found]
    out = [
        Contender(place, method, rank, setting, title(method), shades[method][by_method[method].index(setting)], runs, kind)
        for (place, method, rank, setting, runs), kind in zip(found, kinds, strict=True)
    ]
    return tuple(sorted(out, key=_order))


def joined(names: Sequence[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def by_place(contenders: Sequence[Contender]) -> dict[str, list[Contender]]:
    return _by(contenders, lambda contender: contender.where)


def by_panel(contenders: Sequence[Contender]) -> dict[str, list[Contender]]:
    """Place and rank -> the contenders that a panel of lines shows, so that a colour means one thing in it."""
    return _by(contenders, lambda contender: contender.panel)


def by_metric(contenders: Sequence[Contender]) -> dict[Metric, list[Contender]]:
    """What is compared by one metric, and never with another's."""
    return _by(contenders, lambda contender: contender.metric)


def hardest(contenders: Sequence[Contender]) -> str:
    """The place that a title speaks of: the smallest Dirichlet alpha where it varies, else the last one; of common models where
    there are any."""
    contenders = [contender for contender in contenders if contender.kind != PERSONAL] or contenders
    last = contenders[-1]
    return (
        min(contenders, key=lambda contender: dict(contender.place).get(ALPHA, 0)).where
        if ALPHA in dict(last.place)
        else last.where
    )


def spread(values: Sequence[float], unit: str = "%") -> Spread | None:
    """Mean, range and sample standard deviation; None of nothing."""
    if not len(values):
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), float(min(values)), float(max(values)), std, len(values), unit)


def word(key: str, value: Any) -> str:
    """A setting in as few words as it takes."""
    match key:
        case "data.source" | "model.source" | "data.partition":
            return as_text(value)
        case "task.name":
            return as_text(value).rpartition(":")[2].replace("_", " ")
        case "data.alpha":
            return f"Dir({as_text(value)})"
        case "clients.count":
            return f"{as_text(value)} clients"
        case "model.target_modules":
            return f"in {modules(value)}"
    short = key.rpartition(".")[2]
    if isinstance(value, bool):
        return short if value else f"no {short}"
    return value if isinstance(value, str) else f"{short} = {as_text(value)}"


def modules(value: Any) -> str:
    """model.target_modules in words: names as they are, a pattern without its marks."""
    names = re.sub(r"^\.\*|\.\*$|\\d\+|\\", "", as_text(value)).strip(".")
    return names or as_text(value)


def place_of(run: Run) -> str:
    """The data of one run in words."""
    data = run.config.data
    rule = f"Dir({data.alpha:g})" if data.partition.value == "dirichlet" else data.partition.value
    return f"{data.title} {rule}"


def dealt_by(run: Run) -> str:
    """What its clients were dealt unequal shares of, in the plural, as far as the folder says."""
    strata = run.config.data.strata
    if strata is Strata.COLUMN:
        return f"values of '{run.config.data.column}'"
    plain = "classes" if run.label_names else "tenths"
    return {Strata.LABEL: plain, Strata.DOMAIN: "domains", Strata.LENGTH: "lengths", Strata.CLUSTER: "clusters"}[strata]


@cache
def title(method: str, full: bool = False) -> str:
    """What a method is called in pictures; its name where its code is not at hand."""
    from fedlora import methods
    from fedlora.errors import BadInput

    try:
        found = str(methods.find(method).FACTS.title)
    except BadInput:
        return method.rpartition(":")[2]
    return found if full else found.partition(" (")[0]


def _follow_from_method(comparison: Comparison, tables: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    """Method -> the varied keys that say nothing beyond its name: it has one value of each."""
    values: dict[tuple[str, str], set[str]] = {}
    for table in tables:
        for key in comparison.varied:
            values.setdefault((table[METHOD], key), set()).add(as_text(table.get(key)))
    methods = {table[METHOD] for table in tables}
    return {method: {key for key in comparison.varied if len(values[method, key]) == 1} for method in methods}


def _order(contender: Contender) -> tuple[Any, ...]:
    place = tuple(
        (-value, "") if isinstance(value, float | int) and key == ALPHA else _number(value) for key, value in contender.place
    )
    known = list(FIXED)
    method = (known.index(contender.method), "") if contender.method in known else (len(known), contender.method)
    rank = _number(contender.rank)
    return place, contender.kind, method, tuple(_number(value) for _, value in contender.setting), (-rank[0], rank[1])


def _number(value: Any) -> tuple[float, str]:
    try:
        return float(value), ""
    except (TypeError, ValueError):
        return 0.0, re.sub(r"\d+", lambda digits: digits[0].zfill(9), as_text(value))  # layer 10 after layer 9


def _listed(source: Any) -> list[str]:
    return [source] if isinstance(source, str) else list(source)


def _named(key: str, value: Any, names: Mapping[str, str]) -> Any:
    """A value of a place; where it is a source or several, by their names."""
    return ", ".join(names[source] for source in _listed(value)) if key in SOURCES else value


def _by(contenders: Sequence[Contender], key: Callable[[Contender], Key]) -> dict[Key, list[Contender]]:
    out: dict[Key, list[Contender]] = {}
    for contender in contenders:
        out.setdefault(key(contender), []).append(contender)
    return out
