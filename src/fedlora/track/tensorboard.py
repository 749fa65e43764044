"""TensorBoard: event files in RUN/track/tensorboard. Look at them with `tensorboard --logdir`, of one run or of a folder of runs.

A resumed run writes another file in the same folder, which says that steps from its first on in earlier files do not count.
"""

from typing import Any

from fedlora.config import to_toml
from fedlora.track.base import Kept, Point, Run


class TensorBoard:
    """Writes event files, with PyTorch's writer."""

    writer: Any

    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.place / "tensorboard"), purge_step=first)
        self.writer.add_text("config", _block(to_toml(run.config)), first - 1)
        self.writer.flush()
        return {}

    def round(self, point: Point) -> None:
        for name, x in point.numbers.items():
            self.writer.add_scalar(name, x, point.step)  # in float32, the form that every reader knows
        for name, text in point.texts.items():
            self.writer.add_text(name, _block(text), point.step)
        self.writer.flush()

    def finish(self, point: Point) -> None:
        self.round(point)

    def close(self) -> None:
        self.writer.close()


def _block(text: str) -> str:
    """Markdown that is shown as it is."""
    return f"```\n{text}\n```"


TRACKER = TensorBoard
