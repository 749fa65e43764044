"""The worker of a client on a machine of its own: started by whoever asks first, kept, and started again when it is gone."""

import contextlib
import os
import signal
import sys
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from fedlora.clients import reach

WORKER = """
import os, sys, time
from pathlib import Path
from fedlora.clients.node import serve

class Echo:
    def answer(self, data):
        if data == b"die":
            os.kill(os.getpid(), 9)
        if data == b"break":
            raise RuntimeError("something unforeseen")
        return str(os.getpid()).encode() + b" " + data

def prepare():
    print("loading ...", flush=True)
    if (Path(sys.argv[1]) / "bad").exists():
        sys.exit("error: no such data")
    return Echo()

serve(Path(sys.argv[1]), prepare, idle=float(sys.argv[2]))
"""


@pytest.fixture
def home(tmp_path: Path):
    found = tmp_path / ("a long way " * 12)  # longer than a socket's path may be
    found.mkdir()
    yield found
    file = reach.place_of(found) / reach.PID
    if file.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def command(home: Path, idle: float = 60.0) -> list[str]:
    return [sys.executable, "-c", WORKER, str(home), str(idle)]


def test_one_worker_answers_all_and_another_one_when_it_was_killed(home: Path) -> None:
    first, said = reach.ask(home, command(home), b"hello").split(b" ", 1)
    assert said == b"hello"
    large = b"x" * (1 << 22)
    assert reach.ask(home, command(home), large) == first + b" " + large
    begun = time.monotonic()
    with pytest.raises(reach.WorkerDied, match="its worker died"):
        reach.ask(home, command(home), b"die")
    assert time.monotonic() - begun < 30  # said at once, not after a time of waiting
    second, _ = reach.ask(home, command(home), b"again").split(b" ", 1)
    assert second != first
    with pytest.raises(reach.WorkerDied, match="something unforeseen"):
        reach.ask(home, command(home), b"break")
    third, _ = reach.ask(home, command(home), b"").split(b" ", 1)
    assert third not in (first, second)


@pytest.mark.slow
def test_why_a_worker_does_not_start_is_said(home: Path) -> None:
    (home / "bad").touch()
    with pytest.raises(reach.WorkerDied, match="error: no such data"):
        reach.ask(home, command(home), b"hello")
    with pytest.raises(reach.WorkerDied, match="error: no such data"):
        reach.start(home, command(home))
    (home / "bad").unlink()
    reach.start(home, command(home))
    assert reach.ask(home, command(home), b"hello").endswith(b" hello")


@pytest.mark.slow
def test_a_worker_that_nobody_asks_ends(home: Path) -> None:
    reach.ask(home, command(home, 0.5), b"hello")
    pid = int((reach.place_of(home) / reach.PID).read_text())
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_nobody_else_can_ask(home: Path) -> None:
    reach.ask(home, command(home), b"hello")
    place = reach.place_of(home)
    assert place.stat().st_mode & 0o777 == 0o700 and (place / "key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(AuthenticationError):
        Client(reach.address(place), "AF_UNIX", authkey=b"guessed").recv_bytes()
    assert reach.ask(home, command(home), b"hello").endswith(b" hello")
    place.chmod(0o755)
    with pytest.raises(reach.WorkerDied, match="not a folder of this user's alone"):
        reach.ask(home, command(home), b"hello")
    place.chmod(0o700)
