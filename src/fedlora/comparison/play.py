"""Running cells: one after the other in this process, or several at a time in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell
from fedlora.config import as_tables
from fedlora.errors import BadInput, RunFailed


class Watcher(Protocol):
    """Who follows a comparison: the live table, or a test. It may be called from several threads."""

    def started(self, cell: Cell) -> None:
        """A cell begins."""

    def round(self, cell: Cell, number: int, accuracy: float | None) -> None:
        """A round of it is complete; accuracy is None where the round was not evaluated."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def finished(self, cell: Cell) -> None:
        """A cell is done or has failed, as the folder says."""


@dataclass(frozen=True)
class Ear:
    """Hears a run (`fedlora.listener.Listener`) and passes on what a comparison shows of it."""

    note: Callable[[str], None]
    on_round: Callable[[int, float | None], None]

    def stage(self, text: str) -> None: ...

    def begin(self, first: int, last: int, clients: int) -> None: ...

    def examples(self, count: int) -> None: ...

    def round(self, row: dict[str, Any]) -> None:
        self.on_round(row["round"], row["accuracy"])


def play(cells: Sequence[Cell], folder: Folder, watcher: Watcher, jobs: int = 1) -> Generator[Cell]:
    """Run or resume each cell, in order; yields each as it is done or has failed. A cell that fails leaves its reason in the folder
    and does not keep the others from running. Closing the iterator stops whatever runs."""
    played = _one_by_one(cells, folder, watcher) if jobs == 1 else _side_by_side(cells, folder, watcher, jobs)
    with closing(played):
        for cell in played:
            watcher.finished(cell)
            yield cell


def _one_by_one(cells: Sequence[Cell], folder: Folder, watcher: Watcher) -> Generator[Cell]:
    for cell in cells:
        watcher.started(cell)

        def on_round(number: int, accuracy: float | None, cell: Cell = cell) -> None:
            watcher.round(cell, number, accuracy)

        attempt(cell, folder, Ear(watcher.note, on_round))
        yield cell


def attempt(cell: Cell, folder: Folder, ear: Ear) -> None:
    """Run or resume one cell in this process; a failure is written down, not raised."""
    from fedlora.runs.play import execute

    try:
        execute(cell.config, folder.run(cell), True, ear)
    except (BadInput, RunFailed) as error:
        folder.failed(cell, str(error), error)
    except Exception as error:  # whatever it is, the other cells go on
        first = str(error).strip().partition("\n")[0]
        folder.failed(cell, f"{type(error).__name__}: {first}" if first else type(error).__name__, error)
    else:
        folder.succeeded(cell)


def _side_by_side(cells: Sequence[Cell], folder: Folder, watcher: Watcher, jobs: int) -> Generator[Cell]:
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    children: list[subprocess.Popen[str]] = []
    stopped = Event()

    def tend(cell: Cell) -> Cell:
        with subprocess.Popen(
            [sys.executable, "-m", "fedlora.comparison.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C comes to us alone, and we stop them
        ) as child:
            children.append(child)
            if stopped.is_set():
                child.terminate()
            watcher.started(cell)
            _converse(child, cell, folder, threads, watcher)
        if child.returncode and not stopped.is_set():
            folder.failed(cell, f"its process ended with status {child.returncode}")
        return cell

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(tend, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()


def _converse(child: "subprocess.Popen[str]", cell: Cell, folder: Folder, threads: int, watcher: Watcher) -> None:
    """Tell a child process what to do and hear what it says: see `compare.cell`."""
    assert child.stdin is not None and child.stdout is not None
    task = {"config": as_tables(cell.config), "folder": str(folder.path), "threads": threads}
    try:
        print(json.dumps(task), file=child.stdin, flush=True)
    except BrokenPipeError:
        return  # it is gone; its status says so
    for line in child.stdout:
        match json.loads(line):
            case {"note": text}:
                watcher.note(text)
            case {"round": number, "accuracy": accuracy}:
                watcher.round(cell, number, accuracy)
