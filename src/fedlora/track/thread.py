"""A tracker in a thread of its own: whatever it does, the run neither waits for it nor ends with it.

What is told is queued. How far a tracker has come stands in RUN/track/NAME.json, so that it goes on there when the run is resumed,
and one that is new then, or elsewhere, is told everything from round 1 on.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any

from fedlora import track
from fedlora.disk import write_whole
from fedlora.errors import first_line
from fedlora.track.base import Kept, Run, Tracker
from fedlora.track.series import Row, of_round, of_summary

SECONDS = 10.0  # that a tracker has to start, once its package is loaded; and, at the end, to send what it has not sent


class Feed:
    """What is told to one tracker. Methods are called by the run's thread, and return at once but for `wait`."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run = name, run
        self._jobs: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._started, self._ended = Event(), Event()
        self._loaded: float | None = None  # when
        self._error: str | None = None
        self._over = False  # all is said of it, and nothing more is told to it
        Thread(target=self._live, name=f"fedlora-track-{name}", daemon=True).start()

    def round(self, row: Row) -> None:
        """A round is complete."""
        if not self._over:
            self._jobs.put(partial(self._tell, row))

    def finish(self, summary: Row) -> None:
        """The run is complete."""
        if not self._over:
            self._jobs.put(lambda tracker: tracker.finish(of_summary(summary)))

    def news(self) -> list[str]:
        """What the user should know by now, and has not been told."""
        if self._over:
            return []
        if self._ended.is_set() and self._error is not None:
            return self._give_up(f"{self.name} failed, and the run goes on without it: {self._error}")
        if self._loaded is not None and not self._started.is_set() and monotonic() - self._loaded > SECONDS:
            return self._give_up(f"{self.name} has not answered for {SECONDS:g} s; the run goes on without it")
        return []

    def close(self) -> None:
        """Nothing more comes."""
        self._jobs.put(None)

    def wait(self, deadline: float) -> list[str]:
        """Until the tracker is through, up to a time of the monotonic clock; gives the last news."""
        if not self._over and not self._ended.wait(max(0.0, deadline - monotonic())):
            what = "sent everything" if self._started.is_set() else "answered"
            return self._give_up(f"{self.name} has not {what} within {SECONDS:g} s; the run ends without it")
        return self.news()

    def _give_up(self, why: str) -> list[str]:
        self._over = True
        return [why]

    def _live(self) -> None:
        """The thread of the tracker."""
        tracker: Tracker | None = None
        try:
            tracker = track.find(self.name)()
            self._loaded = monotonic()
            self._round, kept = self._recall()
            self._kept = tracker.start(self.run, self._round + 1, kept)
            self._remember(self._round)
            self._started.set()
            for job in iter(self._jobs.get, None):
                if self._over:
                    break
                job(tracker)
            tracker.close()
        except BaseException as error:  # of a library, which may do anything; SystemExit is not for a thread either
            self._error = first_line(error)
            with suppress(BaseException):
                if tracker is not None:
                    tracker.close()
        finally:
            self._ended.set()

    def _tell(self, row: Row, tracker: Tracker) -> None:
        """Rounds that are played again after a damaged checkpoint are not told again: they have the same numbers."""
        if row["round"] > self._round:
            tracker.round(of_round(row, self.run))
            self._remember(row["round"])

    def _recall(self) -> tuple[int, Kept]:
        """The last round that the tracker was told of, and what its start gave."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((self.run.place / f"{self.name}.json").read_bytes())
            if found["where"] == self._where():
                return int(found["round"]), dict(found["kept"])
        return 0, {}

    def _remember(self, round: int) -> None:
        self._round = round
        self.run.place.mkdir(exist_ok=True)
        found = {"where": self._where(), "round": round, "kept": dict(self._kept)}
        write_whole(self.run.place / f"{self.name}.json", json.dumps(found).encode())

    def _where(self) -> Mapping[str, Any]:
        """What another run in the tracker begins with: of one that goes elsewhere, nothing is there yet."""
        return self.run.config.track.model_dump(mode="json", include={"project", "uri", "mode"})
