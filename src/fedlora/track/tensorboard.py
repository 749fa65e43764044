"""TensorBoard: event files in RUN/track/tensorboard. Look at them with `tensorboard --logdir`, of one run or of a folder of runs.

A resumed run writes another file in the same folder, which says that steps from its first on in earlier files do not count. The
records are those of PyTorch's writer; its own thread, which prints what it raises, is left out.
"""

import os
from socket import gethostname
from time import time, time_ns
from typing import Any

from fedlora.config import to_toml
from fedlora.track.base import Kept, Point, Run


class TensorBoard:
    """Writes an event file."""

    file: Any

    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        place = run.place / "tensorboard"
        place.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time_ns()}.{gethostname()}.{os.getpid()}"  # files are read in the order of their names
        self.file = RecordWriter(open(place / name, "xb"))  # noqa: SIM115
        self._write(first, file_version="brain.Event:2")
        self._write(first, session_log=SessionLog(status=SessionLog.START))
        self._text("config", to_toml(run.config), first - 1)
        self.file.flush()
        return {}

    def round(self, point: Point) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, x in point.numbers.items():
            self._write(point.step, summary=scalar(name, x))  # in float32, the form that every reader knows
        for name, text in point.texts.items():
            self._text(name, text, point.step)
        self.file.flush()

    def finish(self, point: Point) -> None:
        self.round(point)

    def close(self) -> None:
        self.file.close()

    def _text(self, name: str, text: str, step: int) -> None:
        """As Markdown that is shown as it is."""
        from torch.utils.tensorboard.summary import text as summary

        self._write(step, summary=summary(name, f"```\n{text}\n```"))

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self.file.write(Event(wall_time=time(), step=step, **what).SerializeToString())


TRACKER = TensorBoard
