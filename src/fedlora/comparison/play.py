"""Running cells: one after the other in this process, or several at a time elsewhere."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event

from fedlora.comparison.executor import Executor, Job, Received
from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell
from fedlora.errors import BadInput, RunFailed
from fedlora.listener import Listener
from fedlora.transports.pool import Gone

Follow = Callable[[Cell], Listener]  # a cell begins: gives what follows its run


def play(cells: Sequence[Cell], folder: Folder, follow: Follow, executor: Executor) -> Generator[Cell]:
    """Run or resume each cell, in order; yields each as it is done or has failed. A cell that fails leaves its reason in the folder
    and does not keep the others from running. Closing the iterator stops whatever runs. With several jobs, `follow` and the
    listeners that it gives are called from several threads."""
    if executor.submit is None:
        return _one_by_one(cells, folder, follow)
    return _side_by_side(cells, folder, follow, executor.jobs, executor.submit)


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


def _side_by_side(
    cells: Sequence[Cell], folder: Folder, follow: Follow, jobs: int, submit: Callable[[Cell, Folder], Job]
) -> Generator[Cell]:
    begun: list[Job] = []
    stopped = Event()

    def tend(cell: Cell) -> Cell:
        if stopped.is_set():
            return cell
        begun.append(job := submit(cell, folder))
        if stopped.is_set():  # in between
            job.stop()
        _follow(cell, folder, job, follow(cell), stopped)
        return cell

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(tend, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for job in begun:
                job.stop()


def _follow(cell: Cell, folder: Folder, job: Job, listener: Listener, stopped: Event) -> None:
    """Hear what is said of a cell that is played elsewhere, until it ends."""
    received = Received(cell, folder)
    try:
        for message in job.said():
            match message:
                case {"note": text}:
                    listener.note(text)
                case {"round": number, "score": score}:
                    listener.round({"round": number, "score": score})
                case {"again": why}:
                    listener.note(why)
                    received = Received(cell, folder)
                case {"file": name, "data": data}:
                    received.add(name, data)
                case {"ended": status}:
                    received.settle()
                    if status and not stopped.is_set():
                        folder.failed(cell, f"its process ended with status {status}")
    except Gone as gone:
        if not stopped.is_set():
            folder.failed(cell, f"its process {gone}")
