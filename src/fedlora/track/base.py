"""What a tracker is, and what it is told of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedlora.config import Config
from fedlora.tasks.metrics import Metric

Kept = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """The run that is told of.

    Attributes:
        folder: the run's.
        clients: their names, by id.
        modules: the adapted layers, in the order of arrays that have a row for each.
        metrics: the first is the one that runs are compared by.
    """

    folder: Path
    config: Config
    clients: tuple[str, ...]
    modules: tuple[str, ...]
    metrics: tuple[Metric, ...]

    @property
    def name(self) -> str:
        """What trackers call it."""
        return self.config.track.name or self.folder.name

    @property
    def place(self) -> Path:
        """Where trackers write that write files."""
        return self.folder / "track"


@dataclass(frozen=True)
class Point:
    """What is told at one step: numbers by name, "score/accuracy", and texts, "failures". Steps are rounds."""

    step: int
    numbers: Mapping[str, float]
    texts: Mapping[str, str]


class Tracker(Protocol):
    """Sends a run's numbers to where people look at them. It lives in a thread of its own, which makes it, without arguments, and
    calls it: it may take its time and may raise. It says nothing on standard output and leaves the process as it is."""

    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        """Begin with this run, whose rounds will come from `first` on; gives what to keep.

        Args:
            kept: what the start before gave, so that the tracker can go on with the same run there; empty where there was none.
        """

    def round(self, point: Point) -> None:
        """A round is complete."""

    def finish(self, point: Point) -> None:
        """The run is complete; the point is its last round, and its summary."""

    def close(self) -> None:
        """Nothing more comes, whether the run is complete or not."""
