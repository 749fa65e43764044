"""What a person sees while a run goes on: bars on a terminal, a line a round everywhere."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fedlora.tasks.metrics import Metric


class Progress:
    """Follows a run (see `fedlora.listener.Listener`). Notes go to standard error, rounds to standard output."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(highlight=False)
        self.errors = Console(stderr=True, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._rounds: Any = None
        self._examples: Any = None
        self._seen, self._up, self._down = 0, 0, 0
        self._score = ""

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.bars.stop()

    def note(self, text: str) -> None:
        self.errors.print(f"note: {text}", markup=False, soft_wrap=True)

    def stage(self, text: str) -> None:
        if not self.quiet:
            self.console.print(f"{text} ...", style="dim", markup=False, soft_wrap=True)

    def begin(self, first: int, last: int, clients: int, metric: Metric) -> None:
        self.last, self.metric = last, metric
        self._rounds = self.bars.add_task("rounds", total=last, completed=first)
        self._examples = self.bars.add_task(f"examples of {clients} clients", total=None)

    def examples(self, count: int) -> None:
        self._seen += count
        self.bars.update(self._examples, completed=self._seen)

    def round(self, row: dict[str, Any]) -> None:
        self._up, self._down = self._up + row["upload_bytes"], self._down + row["download_bytes"]
        if row["score"] is not None:
            self._score = f"  {self.metric.title} {self.metric.text(row['score'])}"
        sofar = f"rounds{self._score}  up {self._up / 1e6:.1f} MB  down {self._down / 1e6:.1f} MB"
        self.bars.update(self._rounds, completed=row["round"], description=sofar)
        self.bars.reset(self._examples, total=self._seen)  # the next round is about as long as this one
        self._seen = 0
        if self.quiet:
            return
        score = "" if row["score"] is None else f"{self.metric.title} {self.metric.text(row['score'])}  "
        validation = row.get(f"validation_{self.metric.name}")
        score += "" if validation is None else f"validation {self.metric.text(validation)}  "
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        failed = f"  failed {row['failed']}" if row["failed"] else ""
        self.console.print(
            f"round {row['round']:>{len(str(self.last))}}/{self.last}  {score}loss {loss}  "
            f"up {row['upload_bytes'] / 1e6:.2f} MB  down {row['download_bytes'] / 1e6:.2f} MB  {row['wall_s']:.1f} s{failed}",
            markup=False,
            soft_wrap=True,
        )
