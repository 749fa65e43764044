"""Clients in other processes of this machine. Each is played by one of them, always the same; a process that dies is started again,
and what it had not answered is asked again."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any

from fedlora import wire
from fedlora.clients.serve import frames, write
from fedlora.messages import Answer, Ask, Lost

GOODBYE = 5.0  # seconds that a process has to end by itself


class _Process:
    """A worker's process. `heard` gets what it says: its messages, then None when it is gone."""

    def __init__(self, command: Sequence[str], heard: "Queue[tuple[_Process, bytes | None]]") -> None:
        self.popen = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._heard = heard
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def ask(self, asks: tuple[Ask, ...]) -> None:
        assert self.popen.stdin is not None
        with suppress(OSError):  # it is gone, and `heard` gets to know
            write(self.popen.stdin, asks)

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
        self._heard.put((self, None))


class Processes:
    """A transport to `count` processes.

    Attributes:
        command: what starts the worker of a number. It reads asks from its standard input and writes answers to its standard
            output (`fedlora.clients.serve`).
        classes: of what it may answer.
        retries: how often a client is asked again within an exchange, before it counts as lost.
        patience: seconds without any answer after which those who owe one are asked again.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        count: int,
        classes: Sequence[type[Any]],
        retries: int = 3,
        patience: float = 600.0,
    ) -> None:
        self.command, self.count, self.classes, self.retries, self.patience = command, count, list(classes), retries, patience
        self.processes: dict[int, _Process] = {}
        self._heard: Queue[tuple[_Process, bytes | None]] = Queue()

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        waiting = {ask.client.id: ask for ask in asks}
        why = "no answer"
        for _ in range(1 + self.retries):
            asked = self._send(waiting)
            while asked and waiting:
                try:
                    process, data = self._heard.get(timeout=self.patience)
                except Empty:
                    why = f"no answer within {self.patience:g} s"
                    break
                if data is None:
                    why = "its worker died"
                    asked.discard(process)
                    continue
                answer = self._read(data)
                if answer is None:
                    continue
                if answer.client in waiting and answer.envelope == waiting[answer.client].envelope:
                    del waiting[answer.client]
                yield answer
                asked = {each for each in asked if any(self.processes[id % self.count] is each for id in waiting)}
        for id, ask in waiting.items():
            yield Answer(ask.envelope, id, Lost(why))

    def close(self) -> None:
        for process in self.processes.values():
            process.stop()
        self.processes.clear()

    def _send(self, waiting: dict[int, Ask]) -> set[_Process]:
        """Ask those who owe an answer, each worker in one message."""
        by_worker: dict[int, list[Ask]] = {}
        for id, ask in waiting.items():
            by_worker.setdefault(id % self.count, []).append(ask)
        for number, own in by_worker.items():
            process = self.processes.get(number)
            if process is not None and process.popen.poll() is not None:
                process.stop()
                process = None
            if process is None:
                process = self.processes[number] = self.start(number)
            process.ask(tuple(own))
        return {self.processes[number] for number in by_worker}

    def start(self, number: int) -> _Process:
        """Start a worker."""
        return _Process(self.command(number), self._heard)

    def _read(self, data: bytes) -> Answer | None:
        """An answer, or None where it is damaged: who owes one is then asked again."""
        try:
            answer = wire.decode(data, self.classes)
        except ValueError:
            return None
        return answer if isinstance(answer, Answer) and type(answer.client) is int else None
