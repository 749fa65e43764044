"""Who follows a run, and the trackers beside."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from fedlora.listener import Listener, Passing, Row
from fedlora.runs.context import Played
from fedlora.track import thread
from fedlora.track.base import Run
from fedlora.track.thread import Feed


class Followed(Passing):
    """Passes on to a listener what it hears, and rounds to trackers too; what becomes of these, the listener is told as notes."""

    def __init__(self, listener: Listener, feeds: Sequence[Feed]) -> None:
        super().__init__(listener)
        self.feeds = feeds

    def round(self, row: Row) -> bool | None:
        for feed in self.feeds:
            feed.round(row)
        stop = super().round(row)
        for feed in self.feeds:
            self._tell(feed.news())
        return stop

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is complete."""
        for feed in self.feeds:
            feed.finish(summary)

    def close(self) -> None:
        """Let the trackers end, which have so many seconds together."""
        deadline = monotonic() + thread.SECONDS
        for feed in self.feeds:
            feed.close()
        for feed in self.feeds:
            self._tell(feed.wait(deadline))

    def _tell(self, news: Sequence[str]) -> None:
        for text in news:
            self.listener.note(text)


@contextmanager
def tracked(context: Played, out: Path, rows: Sequence[Row], listener: Listener) -> Iterator[Followed]:
    """What the configured trackers and the listener follow the run in `out` by, which has these rows already."""
    run = Run(out.absolute(), context.config, context.roster.names, context.roster.modules, context.roster.metrics)
    followed = Followed(listener, [Feed(name, run) for name in dict.fromkeys(context.config.track.to)])
    for feed in followed.feeds:
        for row in rows:
            feed.round(row)
    try:
        yield followed
    finally:
        followed.close()
