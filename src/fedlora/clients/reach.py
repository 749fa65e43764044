"""The way to a worker that stays while those who ask it come and go: a Unix socket in a private folder, and bytes.

Whoever asks first starts the worker. It has a folder of its own under the machine's temporary one, for a socket's path must be
short: nobody else may enter it, and a key that lies there is asked for, too. Nothing here needs torch, so that who only passes
bytes on is quick to start.
"""

import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from hashlib import blake2b
from multiprocessing.connection import Client, Connection
from pathlib import Path

from filelock import FileLock

from fedlora.disk import private

LARGEST = 1 << 32  # bytes of a message
SOON = 0.05  # seconds between two looks whether a worker is there
LOG = "worker.log"
PID = "pid"  # of the worker, in its private folder


class WorkerDied(Exception):
    """The worker is gone, or cannot start, and why, in one line."""


def place_of(home: Path) -> Path:
    """The private folder of the worker of a client's home; made where it is not there. OSError: somebody else has it."""
    where = blake2b(os.fsencode(home.resolve()), digest_size=8).hexdigest()
    return private(where)


def address(place: Path) -> str:
    """Where the worker listens."""
    return str(place / "socket")


def key(place: Path) -> bytes:
    """What who asks and who answers have in common; drawn where there is none yet."""
    file = place / "key"
    if not file.exists():
        part = place / f"key-{os.getpid()}"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(32))
        part.rename(file)
    return file.read_bytes()


def ask(home: Path, command: Sequence[str], data: bytes) -> bytes:
    """What the worker of a home answers. It is started with `command` where there is none.

    Raises:
        WorkerDied: it cannot start, or is gone in the middle of its work; who asks again may have another one.
    """
    try:
        with _connected(home, command) as connection:
            connection.send_bytes(data)
            return connection.recv_bytes(LARGEST)
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(f"its worker died{_last_line(home)}") from error
    except OSError as error:
        raise WorkerDied(f"its worker cannot be reached: {error.strerror or error}") from error


def start(home: Path, command: Sequence[str]) -> None:
    """Start the worker of a home where there is none, and wait until it is ready. WorkerDied: it cannot start."""
    try:
        _connected(home, command).close()
    except (EOFError, ConnectionError) as error:
        raise WorkerDied(f"its worker does not start{_last_line(home)}") from error
    except OSError as error:
        raise WorkerDied(f"its worker cannot be reached: {error.strerror or error}") from error


def _connected(home: Path, command: Sequence[str]) -> Connection:
    place = place_of(home)
    with FileLock(place / "starting.lock"):
        secret = key(place)
        try:
            return Client(address(place), "AF_UNIX", authkey=secret)
        except OSError:
            pass  # nobody is there
        Path(address(place)).unlink(missing_ok=True)
        home.mkdir(parents=True, exist_ok=True)
        with open(home / LOG, "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=home)
        while True:
            try:
                found = Client(address(place), "AF_UNIX", authkey=secret)
                process.returncode = 0  # it outlives us, and nobody waits for it
                return found
            except OSError:
                if process.poll() is not None:
                    raise WorkerDied(f"its worker does not start{_last_line(home)}") from None
                time.sleep(SOON)


def _last_line(home: Path) -> str:
    """What the worker said last."""
    try:
        said = (home / LOG).read_bytes()[-4096:].decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    line = next((line.strip() for line in reversed(said) if line.strip()), "")
    return f": {line[:300]}" if line else ""
