"""Run folders as a report reads them, and the comparison that several of them make."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora import summary
from fedlora.config import Config, decisive, read_run
from fedlora.errors import BadInput
from fedlora.tables import OLD
from fedlora.tasks.metrics import CLASSIFICATION, Metric

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not, read from disk.

    Attributes:
        rows: of metrics.jsonl, one a round.
        summary: None while the run is not finished.
        clients: of federation.json: id, name, rank, num_examples, num_test.
        modules: names of the adapted modules, in the order of the arrays' module axis; empty where the folder does not say.
        label_names: of the classes; empty where there are none, or the folder does not say.
        metrics: that it is scored by, the first being the one that runs are compared by.
    """

    folder: Path
    config: Config
    rows: tuple[Row, ...]
    summary: Mapping[str, Any] | None
    clients: tuple[Mapping[str, Any], ...]
    modules: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = CLASSIFICATION

    @property
    def metric(self) -> Metric:
        return self.metrics[0]

    @property
    def scored(self) -> tuple[Row, ...]:
        """The rows of the rounds in which the test set was scored."""
        return tuple(row for row in self.rows if row.get("score") is not None)

    @property
    def final(self) -> Row | None:
        """The scored row that is reported: of the round that validation chose, or the last one. Never chosen on the test set."""
        scored = self.scored
        if self.validated and self.summary:
            scored = tuple(row for row in scored if row["round"] == self.summary["written"]["round"])
        if not scored:
            return None
        held_out = (self.summary or {}).get("held_out")
        name = self.metric.name
        return {**scored[-1], f"held_out_{name}": held_out[name]} if held_out else scored[-1]

    @property
    def validated(self) -> bool:
        """Whether validation chose the round that is reported."""
        return bool((self.summary or {}).get("written", {}).get("by") == "validation")

    @property
    def personal(self) -> bool:
        """Whether clients were scored each with its own model on its own test examples."""
        return any(row.get(f"client_{self.metric.name}") or row.get("clients_scored") for row in self.scored)

    @property
    def diverged(self) -> bool:
        """Whether the last round left no training loss that is a number, or a model that gives none."""
        return bool(self.rows) and summary.diverged(self.rows[-1])

    @property
    def unfinished(self) -> bool:
        """Whether rounds are missing. A run that was stopped early, and has its result, is finished."""
        done = self.summary or {"rounds": self.rows[-1]["round"]}
        return bool(done["rounds"] < self.config.train.rounds and not done.get("stopped_early"))

    @property
    def rounds_with_arrays(self) -> tuple[int, ...]:
        found = (self.folder / "arrays").glob("round-*.safetensors")
        played = {row["round"] for row in self.rows}
        return tuple(sorted({int(file.stem.removeprefix("round-")) for file in found} & played))

    def arrays(self, round: int) -> Arrays:
        """The arrays that the method left in a round; none where it left none."""
        from safetensors.numpy import load_file

        file = self.folder / "arrays" / f"round-{round:05d}.safetensors"
        return dict(load_file(file)) if file.exists() else {}


@dataclass(frozen=True)
class Comparison:
    """What a report shows: several runs, what differs between them and what does not.

    Attributes:
        varied: dotted keys that differ, in the order of the configuration, the seed last.
        fixed: dotted keys that do not, with their value.
        published: rows of dotted keys, with the score under its metric's name, its `spread`, both in points, and `upload_params`.
        failed: what has no run, each with its reason.
        scale: the recipe's scale, where there is one.
    """

    title: str
    about: str
    runs: tuple[Run, ...]
    varied: tuple[str, ...]
    fixed: Mapping[str, Any]
    published: tuple[Mapping[str, Any], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    scale: str = ""


def read(folder: Path) -> Run:
    """The run in a folder. BadInput when there is none, or it is damaged."""
    try:
        config = read_run(folder)
        federation = json.loads((folder / "federation.json").read_text())
        clients, metrics = tuple(federation["clients"]), summary.metrics_of(federation)
    except BadInput:
        raise
    except OSError as error:
        raise BadInput(f"{folder} is no run folder: {error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}: a damaged run folder: {error}") from error
    rows, done = tuple(summary.read_rows(folder)), summary.read(folder)
    modules, label_names = (tuple(federation.get(key, ())) for key in ("modules", "label_names"))
    return Run(folder, config, rows, done, clients, modules, label_names, metrics)


def comparison(
    runs: Sequence[Run],
    title: str = "",
    about: str = "",
    published: Sequence[Mapping[str, Any]] = (),
    failed: Sequence[tuple[str, str]] = (),
    scale: str = "",
) -> Comparison:
    """The comparison of some runs; what varies is read from their configurations. BadInput when no run has a round to show."""
    shown = tuple(run for run in runs if run.rows)
    if not shown:
        raise BadInput(f"nothing to report: no run has finished a round yet in {', '.join(str(run.folder) for run in runs)}")
    tables = [settings(run.config) for run in shown]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    differ = [key for key in keys if len({as_text(table.get(key)) for table in tables}) > 1]
    varied = tuple(sorted(differ, key=lambda key: key == "seed"))
    fixed = {key: tables[0][key] for key in keys if key not in varied}
    return Comparison(title, about, shown, varied, fixed, tuple(published), tuple(failed), scale)


def settings(config: Config) -> dict[str, Any]:
    """The configuration as dotted keys and plain values, but for what decides nothing."""
    out: dict[str, Any] = {}

    def walk(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                out[prefix + key] = value

    walk(decisive(config), "")
    return out


def as_text(value: Any) -> str:
    """A value as it is compared and shown: numbers without needless digits, lists with commas."""
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case float() | int():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(map(as_text, value)) or "none"
        case Mapping():
            return ", ".join(f"{key} = {as_text(x)}" for key, x in value.items())
    return str(value)


def read_published(text: str) -> tuple[dict[str, Any], ...]:
    """The rows of a table of published numbers (CSV: dotted keys, then a score by its metric's name, spread, upload_params)."""
    return tuple(
        {OLD.get(key, key): _plain(cell) for key, cell in row.items() if cell != ""} for row in csv.DictReader(io.StringIO(text))
    )


def published_row(published: Sequence[Mapping[str, Any]], config: Config) -> Mapping[str, Any] | None:
    """The published row whose dotted keys all have this configuration's values."""
    own = settings(config)
    for row in published:
        keys = [key for key in row if "." in key]
        if keys and all(as_text(_plain(row[key])) == as_text(own.get(key)) for key in keys):
            return row
    return None


def _plain(cell: Any) -> Any:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell


def cumulative(run: Run, key: str) -> NDArray[np.float64]:
    """The running total of a row key over all rounds, shape (rounds,)."""
    return np.cumsum([float(row.get(key) or 0) for row in run.rows])
