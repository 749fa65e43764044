"""Files and folders that are there whole or not at all, and folders that one process at a time writes to, also before they are
there."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir

from fedlora.errors import BadInput

PATIENCE = 2.0  # seconds, in which a process that was just killed is gone
LOCK = ".lock"


@contextmanager
def alone(folder: Path, instead: str = "use another --out") -> Iterator[None]:
    """Keep other processes out of `folder`, which must exist; the operating system lets go when this one ends, however it ends.

    Args:
        instead: what people can do who do not get it.

    Raises:
        BadInput: another process holds it, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise BadInput(f"{folder} is being written by another process; wait for it, or {instead}") from None
    except OSError as error:
        raise BadInput(f"{folder} cannot be written to: {error.strerror or error}; {instead}") from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process keeps others out of a folder now."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # of somebody else, or read-only: who looks may not lock it
        return (folder / LOCK).exists()


@contextmanager
def founding(folder: Path) -> Iterator[Path]:
    """Build a folder that is not there yet: yields the place beside it, held by this process alone, where it is built. Whoever has
    built it renames it; the lock goes along. What was not renamed is gone afterwards, with the folders made on the way to it.

    Raises:
        BadInput: another process builds it, or it cannot be made there.
    """
    part = folder.with_name(f".{folder.name}.part")
    missing = [parent for parent in folder.parents if not os.path.lexists(parent)]
    try:
        part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error.strerror or error}; use another --out") from error
    try:
        with alone(part):
            for stale in part.iterdir():  # of a process that was killed
                if stale.name != LOCK:
                    rmtree(stale) if stale.is_dir() else stale.unlink()
            try:
                if folder.exists():
                    raise BadInput(f"{folder} exists already; give --resume to go on with it, or another --out")
                yield part
            finally:
                rmtree(part, ignore_errors=True)
    finally:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that whoever needs it first makes, whole or not at all, while the others wait for it. OSError: it cannot be made.

    Args:
        make: fills the empty folder that it is given, which gets its name when all is on disk.
    """
    from filelock import FileLock

    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}{LOCK}")):
            if not folder.is_dir():
                part = folder.with_name(f".{folder.name}.part")
                rmtree(part, ignore_errors=True)  # of a process that was killed
                part.mkdir()
                try:
                    make(part)
                    for file in filter(Path.is_file, part.rglob("*")):
                        with open(file, "rb+") as written:
                            os.fsync(written.fileno())
                    part.rename(folder)
                finally:
                    rmtree(part, ignore_errors=True)
    return folder


def require_place(name: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """BadInput where nothing can be written at `path`: a file with one of these suffixes, or a folder where there are none. Asked
    before the work begins.

    Args:
        name: of the argument that says so.
    """
    try:
        path.exists()  # a name that is too long raises here
        if suffixes and path.is_dir():
            raise BadInput(f"{name} {path} is a folder; name a file ({suffixes[0]})")
        if suffixes and path.suffix.lower() not in suffixes:
            raise BadInput(f"{name} {path}: its name must end in {suffixes[0]}")
        there = next(place for place in path.absolute().parents if place.exists())
    except OSError as error:
        raise BadInput(f"{name} {path}: {error.strerror}") from error
    if not there.is_dir():
        raise BadInput(f"{name} {path}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise BadInput(f"{name} {path}: {there} cannot be written to")


def private(name: str) -> Path:
    """A folder of this name under the machine's temporary one that is this user's alone, made where it is not there. OSError: it is
    somebody else's."""
    place = Path(gettempdir()) / f"fedlora-{os.getuid()}-{name}"
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise OSError(f"{place} is not a folder of this user's alone")
    return place


def write_whole(path: Path, data: bytes) -> str:
    """Write a file so that it is either there with all of `data` or not at all; returns the digest of the data."""
    write_all({path: data})
    return digest(data)


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write several files so that each is either there with all of its data or not at all, and none before those that stand before
    it. The disk is waited for once: what a file system flushes for the first of them, it has for all."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    with ExitStack() as opened:
        written = []
        for path, data in files.items():
            file = opened.enter_context(open(parts[path], "wb"))
            file.write(data)
            file.flush()
            written.append(file)
        for file in written:
            os.fsync(file.fileno())
    for path, part in parts.items():
        os.replace(part, path)


def digest(data: bytes) -> str:
    """Of a file's bytes, 32 hex digits."""
    return blake2b(data, digest_size=16).hexdigest()
