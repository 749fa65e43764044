"""What a person sees while a comparison goes on: a live table on a terminal, a line for each finished cell elsewhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell, Grid
from fedlora.config import TaskConfig
from fedlora.listener import Listener, Quiet, Row
from fedlora.tasks.metrics import CLASSIFICATION, Metric

FRAME = 6  # lines of the terminal that the table's cells cannot have


class State(Enum):
    """Where a cell is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


STYLE = {State.WAITING: "dim", State.RUNNING: "bold", State.DONE: "", State.FAILED: "red"}


@dataclass
class CellProgress:
    """A cell in the table. `played` counts the rounds of this session, which took `seconds`; `metric` is known from its first round
    on, and of the usual task before that."""

    cell: Cell
    state: State = State.WAITING
    round: int = 0
    score: float | None = None
    metric: Metric | None = None
    played: int = 0
    seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    @property
    def result(self) -> str:
        """Its last score, with the unit; empty where it has none yet."""
        return "" if self.score is None else (self.metric or CLASSIFICATION[0]).text(self.score)

    def took(self, number: int, score: float | None) -> None:
        """A round is complete; the score is None where it was not evaluated."""
        self.round, self.played, self.seconds = number, self.played + 1, time.perf_counter() - self.since
        self.score = self.score if score is None else score


class LiveTable:
    """Follows a comparison, each cell by a listener of its own. Notes go to `hear`, or else to standard error, each once."""

    def __init__(self, grid: Grid, folder: Folder, jobs: int, quiet: bool, hear: Callable[[str], None] | None = None) -> None:
        self.grid, self.folder, self.jobs, self.quiet = grid, folder, jobs, quiet
        self.console = Console(highlight=False)
        errors = Console(stderr=True, highlight=False)
        self.hear = hear or (lambda text: errors.print(f"note: {text}", markup=False, soft_wrap=True))
        usual = TaskConfig().name
        self.lines = {
            cell.hash: CellProgress(cell, metric=CLASSIFICATION[0] if cell.config.task.name == usual else None)
            for cell in grid.cells
        }
        self.notes: set[str] = set()
        for cell in grid.cells:
            if folder.summary(cell) is not None:
                self._settle(cell)
        self.shown = not quiet and self.console.is_terminal
        self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2)

    def __enter__(self) -> "LiveTable":
        if self.shown:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.shown:
            self.live.stop()

    def follow(self, cell: Cell) -> Listener:
        """The cell begins; what is returned follows its run."""
        progress = self.lines[cell.hash]
        progress.state, progress.since = State.RUNNING, time.perf_counter()
        return _CellListener(self, progress)

    def metric(self, cell: Cell) -> Metric:
        """What a cell that has begun is compared by."""
        return (self.folder.metrics(cell) or CLASSIFICATION)[0]

    def note(self, text: str) -> None:
        """Something that a user should know."""
        if text not in self.notes:
            self.notes.add(text)
            self.hear(text)

    def finished(self, cell: Cell) -> None:
        """The cell is done or has failed, as the folder says."""
        self._settle(cell)
        if self.shown or self.quiet:
            return
        line, settled = self.lines[cell.hash], sum(each.state in (State.DONE, State.FAILED) for each in self.lines.values())
        result = self.folder.failure(cell) if line.state is State.FAILED else f"{_title([line])} {line.result}"
        self.console.print(
            f"{settled}/{len(self.lines)}  {self.grid.label(cell)}: {line.state.value}, {result}  {_time(line.seconds)}",
            markup=False,
            soft_wrap=True,
        )

    def table(self) -> Table:
        """The cells around the first one that runs, as many as the terminal has room for, and how long it will take."""
        table = Table(box=None, pad_edge=False, caption=self._caption(), caption_justify="left")
        score = _title(list(self.lines.values()))
        for name, align in (("cell", "left"), ("state", "left"), ("round", "right"), (score, "right"), ("left", "right")):
            table.add_column(name, justify="right" if align == "right" else "left", no_wrap=True)
        rates = seconds_a_round(list(self.lines.values()))
        for line in self._window():
            left = _left(line, rates) if line.state is State.RUNNING else None
            table.add_row(
                self.grid.label(line.cell),
                line.state.value,
                f"{line.round}/{line.cell.config.train.rounds}",
                line.result,
                "" if left is None else _time(left),
                style=STYLE[line.state],
            )
        return table

    def _window(self) -> Sequence[CellProgress]:
        lines = list(self.lines.values())
        room = max(5, self.console.height - FRAME)
        first = next((i for i, line in enumerate(lines) if line.state in (State.RUNNING, State.WAITING)), len(lines))
        start = max(0, min(first - room // 2, len(lines) - room))
        return lines[start : start + room]

    def _caption(self) -> str:
        lines = list(self.lines.values())
        rates = seconds_a_round(lines)
        times = [_left(line, rates) for line in lines if line.state in (State.WAITING, State.RUNNING)]
        known = [each for each in times if each is not None]
        done, failed = (sum(line.state is state for line in lines) for state in (State.DONE, State.FAILED))
        parts = [f"{done} of {len(lines)} done"] + ([f"{failed} failed"] if failed else [])
        if known and len(known) == len(times):
            parts.append(f"about {_time(sum(known) / self.jobs)} left")
        return ", ".join(parts)

    def _settle(self, cell: Cell) -> None:
        line, summary = self.lines[cell.hash], self.folder.summary(cell)
        line.state = State.FAILED if summary is None else State.DONE
        if line.played:
            line.seconds = time.perf_counter() - line.since
        if summary is not None:
            line.round, line.score = summary["rounds"], summary["final"]["score"]
            line.metric = self.metric(cell)


class _CellListener(Quiet):
    """Follows the run of one cell."""

    def __init__(self, table: LiveTable, progress: CellProgress) -> None:
        self.table, self.progress = table, progress

    def note(self, text: str) -> None:
        self.table.note(text)

    def round(self, row: Row) -> None:
        if self.progress.metric is None:  # by now the folder says it, in whatever process the run is
            self.progress.metric = self.table.metric(self.progress.cell)
        self.progress.took(row["round"], row["score"])


def seconds_a_round(lines: Sequence[CellProgress]) -> Mapping[str, float]:
    """Method -> seconds a round, of those that have played; "" is the mean of all rounds."""
    totals: dict[str, tuple[float, int]] = {}
    for line in lines:
        for name in (line.cell.config.method.name, "") if line.played else ():
            seconds, rounds = totals.get(name, (0.0, 0))
            totals[name] = seconds + line.seconds, rounds + line.played
    return {name: seconds / rounds for name, (seconds, rounds) in totals.items()}


def _left(line: CellProgress, rates: Mapping[str, float]) -> float | None:
    """Seconds that a cell still takes; None while nothing is known of it."""
    rate = rates.get(line.cell.config.method.name, rates.get(""))
    return None if rate is None else rate * (line.cell.config.train.rounds - line.round)


def _title(lines: Sequence[CellProgress]) -> str:
    """Of the column of scores: that of the metric where there is one."""
    found = {line.metric.title for line in lines if line.metric is not None}
    return found.pop() if len(found) == 1 else "score"


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
