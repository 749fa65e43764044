"""Running cells: one after the other in this process, or several at a time in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell
from fedlora.config import as_tables
from fedlora.errors import BadInput, RunFailed
from fedlora.listener import Listener

Follow = Callable[[Cell], Listener]  # a cell begins: gives what follows its run


def play(cells: Sequence[Cell], folder: Folder, follow: Follow, jobs: int = 1) -> Generator[Cell]:
    """Run or resume each cell, in order; yields each as it is done or has failed. A cell that fails leaves its reason in the folder
    and does not keep the others from running. Closing the iterator stops whatever runs. With several jobs, `follow` and the
    listeners that it gives are called from several threads."""
    return _one_by_one(cells, folder, follow) if jobs == 1 else _side_by_side(cells, folder, follow, jobs)


def _one_by_one(cells: Sequence[Cell], folder: Folder, follow: Follow) -> Generator[Cell]:
    for cell in cells:
        attempt(cell, folder, follow(cell))
        yield cell


def attempt(cell: Cell, folder: Folder, listener: Listener) -> None:
    """Run or resume one cell in this process; a failure is written down, not raised."""
    from fedlora.runs.play import execute

    try:
        execute(cell.config, folder.run(cell), True, listener)
    except (BadInput, RunFailed) as error:
        folder.failed(cell, str(error), error)
    except Exception as error:  # whatever it is, the other cells go on
        first = str(error).strip().partition("\n")[0]
        folder.failed(cell, f"{type(error).__name__}: {first}" if first else type(error).__name__, error)
    else:
        folder.succeeded(cell)


def _side_by_side(cells: Sequence[Cell], folder: Folder, follow: Follow, jobs: int) -> Generator[Cell]:
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
            _converse(child, cell, folder, threads, follow(cell))
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


def _converse(child: "subprocess.Popen[str]", cell: Cell, folder: Folder, threads: int, listener: Listener) -> None:
    """Tell a child process what to do and hear what it says: see `comparison.child`."""
    assert child.stdin is not None and child.stdout is not None
    job = {"config": as_tables(cell.config), "folder": str(folder.path), "threads": threads}
    try:
        print(json.dumps(job), file=child.stdin, flush=True)
    except BrokenPipeError:
        return  # it is gone; its status says so
    for line in child.stdout:
        match json.loads(line):
            case {"note": text}:
                listener.note(text)
            case {"round": number, "score": score}:
                listener.round({"round": number, "score": score})
