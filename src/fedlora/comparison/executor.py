"""Executors of cells: this process, several processes of this machine, or those of the machines of a Ray cluster.

A job elsewhere says of its cell what its process says (`comparison.child`), one message at a time, and {"ended": status} last. A
machine that does not see the comparison's folder plays in one of its own, and {"file": name, "data": bytes} bring what it has
then. {"again": why} says that it begins anew, elsewhere.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from threading import Lock
from typing import Any, Protocol

from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Cell
from fedlora.config import as_tables
from fedlora.disk import private, write_whole
from fedlora.errors import BadInput
from fedlora.runs.packages import require_ray
from fedlora.transports.pool import Gone

AT_ONCE = 4  # cells of a machine without a GPU, for each has a model, its data and its clients
TRIES = 3  # of a cell whose machine or process is lost
CHUNK = 1 << 24  # bytes of a file in a message
IDENTITY = ".cluster"  # in a comparison's folder: what tells it from others, made at random once
IDENTIFYING = Lock()  # between threads of this process, which alone has the folder

Message = Mapping[str, Any]


class Job(Protocol):
    """A cell that is played elsewhere."""

    def said(self) -> Iterator[Message]:
        """What its process says, as it comes. Gone: it was lost."""

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Executor:
    """`jobs` cells at a time, each begun by `submit`; without that, one after the other in this process."""

    jobs: int
    submit: Callable[[Cell, Folder], Job] | None = None


@contextmanager
def executor(cells: Sequence[Cell], jobs: int | None) -> Iterator[Executor]:
    """What plays the cells that are left, while it can be reached: a Ray cluster where their configuration says so.

    Args:
        jobs: how many at a time; what suits this machine, or the cluster, where there is none.

    Raises:
        BadInput: it cannot be there.
    """
    over_ray = {each.address for cell in cells if (each := cell.config.transport).name == "ray"}
    most = max(1, len(cells))
    if not over_ray:
        at_once = min(jobs or usual_jobs(), most)
        yield Executor(at_once, partial(_ProcessJob, threads=_threads(at_once)) if at_once > 1 else None)
        return
    if names := {cell.config.transport.name for cell in cells} - {"ray"}:
        raise BadInput(f"transport.name: a comparison is played over Ray as a whole, and some of its cells have '{min(names)}'")
    if len(over_ray) > 1:
        raise BadInput("transport.address: the cells of a comparison that is played over Ray have one address, the same for all")
    if any(cell.config.transport.workers is not None for cell in cells):
        raise BadInput("transport.workers: over Ray each cell of a comparison has one worker; --jobs says how many at a time")
    require_ray()
    from fedlora.transports import ray

    with ray.cluster(over_ray.pop()):
        share = ray.shares(jobs, AT_ONCE, "--jobs")  # as asked, so that too many are refused by their number
        share = ray.shares(min(share.count, most), AT_ONCE, "--jobs")
        yield Executor(share.count, lambda cell, folder: _RayJob(cell, folder, share))


def usual_jobs() -> int:
    """How many cells this machine plays at a time when nobody says: on a CPU one a thread, for two runs of one thread each are
    faster than one of two, though no more than the memory of a usual machine holds; on a GPU one, which fills it."""
    import torch

    return 1 if torch.cuda.is_available() else min(AT_ONCE, torch.get_num_threads())


def _threads(jobs: int) -> int:
    import torch

    return max(1, torch.get_num_threads() // jobs)


def _asked(cell: Cell, folder: Path, threads: int) -> dict[str, Any]:
    """What a process of `comparison.child` is told."""
    return {"config": as_tables(cell.config), "folder": str(folder.absolute()), "threads": threads}


class _ProcessJob:
    """A process of this machine."""

    def __init__(self, cell: Cell, folder: Folder, threads: int) -> None:
        self._asked = _asked(cell, folder.path, threads)
        self._child = _child()

    def said(self) -> Iterator[Message]:
        yield from _conversation(self._child, self._asked)

    def stop(self) -> None:
        self._child.terminate()


class _RayJob:
    """A process on a machine of the cluster; when that is lost, another one."""

    def __init__(self, cell: Cell, folder: Folder, share: Any) -> None:
        alone = cell.config.transport.model_copy(update={"name": "in_process", "address": None})
        here = Cell(cell.config.model_copy(update={"transport": alone}), cell.place)
        self._asked = _asked(here, folder.path, share.cpus) | {"cwd": os.getcwd(), "cell": cell.hash}
        self._identity, self._share = _identity(folder.path), share
        self._stopped = False
        self._begin()

    def said(self) -> Iterator[Message]:
        for left in reversed(range(TRIES)):
            try:
                yield from self._task
                return
            except Gone as gone:
                if self._stopped or not left:
                    raise
                yield {"again": f"the process of a cell {gone}; another one goes on"}
                self._begin()

    def stop(self) -> None:
        self._stopped = True
        self._task.stop()

    def _begin(self) -> None:
        from fedlora.transports import ray

        self._task = ray.Task(played, (self._asked, self._identity), self._share)


def played(asked: Mapping[str, Any], identity: str) -> Iterator[Message]:
    """Play a cell on this machine, in the comparison's folder, or where that is not seen in one of this machine's own.

    Args:
        asked: see `comparison.child`; and `cell`, its hash; `cwd`, where relative paths begin.
        identity: of the comparison's folder.
    """
    if Path(asked["cwd"]).is_dir():
        os.chdir(asked["cwd"])
    folder = Path(asked["folder"])
    file = folder / IDENTITY
    seen = file.is_file() and file.read_text() == identity
    place = folder if seen else private(identity)
    with closing(_conversation(_child(), {**asked, "folder": str(place)})) as said:
        for message in said:
            if "ended" in message and not seen:
                yield from _files(place, asked["cell"])
            yield message


def _files(place: Path, cell: str) -> Iterator[Message]:
    """What a cell left in a folder, and does not leave there any more once it has been sent."""
    run = place / "cells" / cell
    found = [path for path in [*run.rglob("*"), place / "failed" / f"{cell}.txt"] if path.is_file()]
    for path in found:
        with open(path, "rb") as stream:
            data = stream.read(CHUNK)
            while True:
                yield {"file": str(path.relative_to(place)), "data": data}
                if not (data := stream.read(CHUNK)):
                    break
    rmtree(run, ignore_errors=True)
    (place / "failed" / f"{cell}.txt").unlink(missing_ok=True)


class Received:
    """Files of a cell that come from elsewhere, until all are there."""

    def __init__(self, cell: Cell, folder: Folder) -> None:
        self._cell, self._folder = cell, folder
        self._part = folder.path / f".{cell.hash}.part"
        rmtree(self._part, ignore_errors=True)  # of a process that was killed

    def add(self, name: str, data: bytes) -> None:
        """Some bytes of a file, in order. ValueError: its name leads elsewhere."""
        path = self._part / name
        if not path.resolve().is_relative_to(self._part.resolve()):
            raise ValueError(f"a file by the name {name!r} is none of a cell")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)

    def settle(self) -> None:
        """Put them where they belong; what was there of the cell goes. Where none came, the cell was played there itself."""
        if not self._part.exists():
            return
        self._folder.succeeded(self._cell)  # unless why it failed is among them
        for theirs in [*self._part.glob("cells/*"), *self._part.glob("failed/*")]:
            ours = self._folder.path / theirs.relative_to(self._part)
            ours.parent.mkdir(parents=True, exist_ok=True)
            rmtree(ours, ignore_errors=True)
            os.replace(theirs, ours)
        rmtree(self._part)


def _child() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fedlora.comparison.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C comes to us alone, and we stop them
    )


def _conversation(child: "subprocess.Popen[str]", asked: Mapping[str, Any]) -> Generator[Message]:
    """Tell a child process what to do and hear what it says, and how it ended. It ends with the iterator."""
    assert child.stdin is not None and child.stdout is not None
    with child:
        try:
            print(json.dumps(asked), file=child.stdin, flush=True)
            for line in child.stdout:
                yield json.loads(line)
        except BrokenPipeError:
            pass  # it is gone; its status says so
        except GeneratorExit:
            child.terminate()
            raise
    yield {"ended": child.returncode}


def _identity(folder: Path) -> str:
    file = folder / IDENTITY
    with IDENTIFYING:
        if not file.is_file():
            write_whole(file, secrets.token_hex(8).encode())
        return file.read_text()
