"""Workers in other processes of this machine."""

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

from fedlora.clients.serve import frames, write
from fedlora.transports.pool import Heard, Peer

GOODBYE = 5.0  # seconds that a process has to end by itself


class _Process:
    """A worker's process. `heard` gets what it says: its messages, then None when it is gone."""

    def __init__(self, command: Sequence[str], heard: Heard) -> None:
        self.popen = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._heard = heard
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def ask(self, shared: bytes, own: bytes) -> None:
        assert self.popen.stdin is not None
        with suppress(OSError):  # it is gone, and `heard` gets to know
            write(self.popen.stdin, shared)
            write(self.popen.stdin, own)

    def take(self, said: bytes) -> Sequence[bytes]:
        return [said]

    def stop(self) -> None:
        assert self.popen.stdin is not None and self.popen.stdout is not None
        with suppress(OSError):
            self.popen.stdin.close()
        try:
            self.popen.wait(GOODBYE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self._thread.join()
        self.popen.stdout.close()

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for data in frames(self.popen.stdout):
            self._heard.put((self, data))
        self.popen.wait()
        self._heard.put((self, None))


def starting(command: Callable[[int], Sequence[str]]) -> Callable[[int, Heard], Peer]:
    """Starts workers. `command` is that of a number: it reads asks from its standard input and writes answers to its standard
    output (`fedlora.clients.serve`)."""
    return lambda number, heard: _Process(command(number), heard)
