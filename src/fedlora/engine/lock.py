"""One process at a time for a folder that is written to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.errors import BadInput

PATIENCE = 2.0  # seconds, in which a process that was just killed is gone


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which must exist; the operating system lets go when this one ends, however it ends.

    Raises:
        BadInput: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise BadInput(f"{folder} is being written by another process; wait for it, or use another --out") from None
    try:
        yield
    finally:
        lock.release()
