"""One cell in a process of its own: `python -m fedlora.comparison.child`.

Standard input gives one line of JSON, {"config": tables, "folder": path, "threads": number}, and then stays open as long as the
comparison lives: when it ends, so does this process. Standard output has a line of JSON a round, and one for each note. How it
went stands in the folder.
"""

import json
import os
import sys
from pathlib import Path
from threading import Thread
from typing import TextIO

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell
from fedlora.comparison.play import attempt
from fedlora.config import resolve
from fedlora.listener import Quiet, Row


def main() -> None:
    """Run the cell that standard input asks for."""
    job = json.loads(sys.stdin.readline())
    Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(job["threads"])
    out, sys.stdout = sys.stdout, sys.stderr  # nothing but our own lines goes to the parent
    attempt(Cell(resolve(job["config"]), 0), Folder(Path(job["folder"])), _Relay(out))


class _Relay(Quiet):
    """Passes on to the parent what a comparison shows of a run, a line of JSON each."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def note(self, text: str) -> None:
        self._say({"note": text})

    def round(self, row: Row) -> None:
        self._say({"round": row["round"], "score": row["score"]})

    def _say(self, message: dict[str, object]) -> None:
        print(json.dumps(message), file=self.out, flush=True)


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it was killed; two processes must not play one cell."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
