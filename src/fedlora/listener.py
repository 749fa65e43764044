"""Who follows a run."""

from typing import Any, Protocol

from fedlora.tasks.metrics import Metric

Row = dict[str, Any]


class Listener(Protocol):
    """Who follows a run: the command line's progress bars, the live table of a comparison for one cell, or a test. A comparison
    calls it from several threads, and of a row only "round" and "score" are sure to be there."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def stage(self, text: str) -> None:
        """What is being prepared."""

    def begin(self, first: int, last: int, clients: int, metric: Metric) -> None:
        """The rounds begin; the score is of this metric."""

    def examples(self, count: int) -> None:
        """So many examples were trained on."""

    def round(self, row: Row) -> bool | None:
        """A round is complete and on disk. True ends the run after it, with its model as the result."""


class Passing:
    """A listener that passes on all that it hears; base of those that do something beside."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def note(self, text: str) -> None:
        self.listener.note(text)

    def stage(self, text: str) -> None:
        self.listener.stage(text)

    def begin(self, first: int, last: int, clients: int, metric: Metric) -> None:
        self.listener.begin(first, last, clients, metric)

    def examples(self, count: int) -> None:
        self.listener.examples(count)

    def round(self, row: Row) -> bool | None:
        return self.listener.round(row)


class Quiet:
    """A listener that does nothing; base of those that need a part only."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def begin(self, first: int, last: int, clients: int, metric: Metric) -> None: ...

    def examples(self, count: int) -> None: ...

    def round(self, row: Row) -> bool | None: ...
