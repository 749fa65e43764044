"""The worker of a client on a machine of its own: one process, which keeps the model in memory and answers bytes with bytes, as
`fedlora.clients.reach` brings them. It ends when it was not asked anything for a while."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from fedlora import wire
from fedlora.clients.reach import LARGEST, PID, address, key, place_of
from fedlora.clients.serve import answered, classes
from fedlora.clients.worker import Worker
from fedlora.disk import write_whole
from fedlora.errors import first_line
from fedlora.messages import MEETING, Answer, Hello, Lost, Notice, Present, ScoreAsk, Scored, TrainAsk
from fedlora.types import Client, Reply

IDLE = 3600.0  # seconds
SCORED = "scored.fed"


class Node:
    """What a node's worker says to what it is asked.

    Attributes:
        worker: plays the client.
        client: with its number and rank, and how many examples it has.
        present: what it says of itself.
        home: where it keeps the ask of which it was scored last, with all that its own model is made of: an export needs no
            server.
        say: hears, line by line, how its part goes.
    """

    def __init__(
        self, worker: Worker, client: Client, present: Present, home: Path, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.worker, self.client, self.present, self.home, self.say = worker, client, present, home, say
        self._known = [*classes(worker.method), *MEETING]
        self._last: dict[int, tuple[str, Reply]] = {}
        self._alone = threading.Lock()  # a model trains or scores for one at a time; a Hello need not wait for it

    def answer(self, data: bytes) -> bytes:
        """The bytes of the answer: a Present or a Lost, or an Answer to an ask. Never raises but for what ends the worker."""
        try:
            message = wire.decode(data, self._known)
        except ValueError as error:
            return wire.encode(Lost(f"it cannot read what it was sent: {error}"))
        if isinstance(message, Hello):
            return wire.encode(self._met(message))
        if isinstance(message, Notice):
            self.say(f"the server says: {first_line(str(message.text)[:300])}")
            return wire.encode(self.present)
        if not isinstance(message, TrainAsk | ScoreAsk):
            return wire.encode(Lost(f"it was sent a {type(message).__name__}"))
        if (message.client.id, message.client.rank) != (self.client.id, self.client.rank):
            return wire.encode(Answer(message.envelope, message.client.id, Lost(f"it is {self.present.name}, not who was asked")))
        with self._alone:
            begun = time.monotonic()
            (answer,) = answered(self.worker, (message,), self._last)
            if isinstance(answer.body, Lost):
                self.say(f"round {message.round}: no answer: {answer.body.why}")
            elif isinstance(message, TrainAsk):
                self.say(f"round {message.round}: trained in {time.monotonic() - begun:.1f} s")
            if isinstance(message, ScoreAsk) and isinstance(answer.body, Scored):
                write_whole(self.home / SCORED, data)
        return wire.encode(answer)

    def _met(self, hello: Hello) -> Present | Lost:
        why = disagreement(hello.facts, self.present.facts)
        self.say("the server has greeted it" if why is None else why)
        return self.present if why is None else Lost(why)


def disagreement(server: Mapping[str, str], client: Mapping[str, str]) -> str | None:
    """Which facts a server and a client do not have in common, in one line, or None."""
    differ = [name for name in {**server, **client} if server.get(name) != client.get(name)]
    if not differ:
        return None
    said = ", ".join(f"{name} ({client.get(name, 'none')} here, {server.get(name, 'none')} there)" for name in differ)
    return f"it does not fit the federation: {said}"


def serve(home: Path, prepare: Callable[[], Node], idle: float = IDLE, attended: Callable[[], bool] = lambda: True) -> None:
    """Answer until nothing has been asked for `idle` seconds. Who asks before the model is there waits for it.

    Args:
        attended: whether somebody here still takes part with it; it ends where nobody does.

    Raises:
        BadInput: what `prepare` raises; who has asked meanwhile is told by the end of the connection.
    """
    place = place_of(home)
    (place / PID).write_text(str(os.getpid()))
    with Listener(address(place), "AF_UNIX", backlog=16, authkey=key(place)) as listener:
        node = prepare()
        asked = _Clock(idle, attended)
        threading.Thread(target=asked.end_when_idle, daemon=True).start()
        while True:
            try:
                connection = listener.accept()
            except (OSError, EOFError):  # who did not know the key, or left
                continue
            threading.Thread(target=_talk, args=(connection, node, asked), daemon=True).start()


class _Clock:
    """When somebody was last here."""

    def __init__(self, idle: float, attended: Callable[[], bool]) -> None:
        self.idle, self.attended, self.here, self.since = idle, attended, 0, time.monotonic()
        self._lock = threading.Lock()

    def move(self, count: int) -> None:
        """So many more are here."""
        with self._lock:
            self.here, self.since = self.here + count, time.monotonic()

    def end_when_idle(self) -> None:
        while self.attended() and (self.here or time.monotonic() - self.since < self.idle):
            time.sleep(min(1.0, self.idle))
        os.kill(os.getpid(), signal.SIGTERM)


def _talk(connection: Connection, node: Any, asked: _Clock) -> None:
    """Answer somebody until they leave. What goes wrong beyond a message ends the worker: the next one starts in order."""
    asked.move(1)
    try:
        with connection:
            while True:
                connection.send_bytes(_answered(node, connection.recv_bytes(LARGEST)))
    except (EOFError, OSError):
        pass
    finally:
        asked.move(-1)


def _answered(node: Any, data: bytes) -> bytes:
    """The answer; where there is none the process ends, having said why before who asked hears of it."""
    try:
        answer: bytes = node.answer(data)
        return answer
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
