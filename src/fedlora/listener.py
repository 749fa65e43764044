"""Who follows a run."""

from typing import Any, Protocol

Row = dict[str, Any]


class Listener(Protocol):
    """Who follows a run: the command line's progress bars, or a test."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def stage(self, text: str) -> None:
        """What is being prepared."""

    def begin(self, first: int, last: int, clients: int) -> None:
        """The rounds begin."""

    def examples(self, count: int) -> None:
        """So many examples were trained on."""

    def round(self, row: Row) -> None:
        """A round is complete and on disk."""
