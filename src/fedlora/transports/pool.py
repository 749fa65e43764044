"""Clients that several workers elsewhere play, each client always by the same one. A worker that dies is started again, and what it
had not answered is asked again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, Protocol

from fedlora import wire
from fedlora.clients.serve import parts
from fedlora.messages import Answer, Ask, Lost
from fedlora.types import Reply

EACH = 4  # processors of a worker, where nothing else is said and there is no GPU


class Gone(Exception):
    """A worker is gone, and why, in a few words."""


class Peer(Protocol):
    """One worker, as it was started once."""

    @property
    def alive(self) -> bool: ...

    def ask(self, shared: Any, own: bytes) -> None:
        """Send asks in two parts (`fedlora.clients.serve`); what comes of it goes into the queue that it was started with."""

    def take(self, said: Any) -> bytes:
        """The bytes of what it has put there. Gone: there are none any more."""

    def stop(self) -> None: ...


Heard = Queue[tuple[Peer, Any]]  # a worker, and what it says: its answers, and None when it is gone


@dataclass
class Pool:
    """A transport to `count` workers.

    Attributes:
        start: of a worker's number; what it says goes into the queue.
        number: client -> which worker plays it; one that is not named is dealt by its number.
        classes: of what it may answer.
        retries: how often a client is asked again within an exchange, before it counts as lost.
        patience: seconds without any answer after which those who owe one are asked again.
        on_examples: hears how many examples a client has whose reply came.
        once: where what all workers of an exchange are told is put.
    """

    start: Callable[[int, Heard], Peer]
    count: int
    number: Mapping[int, int]
    classes: Sequence[type[Any]]
    retries: int = 3
    patience: float = 600.0
    on_examples: Callable[[int], None] = lambda n: None
    once: Callable[[bytes], Any] = bytes
    peers: dict[int, Peer] = field(default_factory=dict)
    heard: Heard = field(default_factory=Queue)

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        waiting = {ask.client.id: ask for ask in asks}
        why = "no answer"
        for _ in range(1 + self.retries):
            asked = self._send(waiting)
            while waiting and any(peer in asked for peer in self._owing(waiting)):
                try:
                    peer, said = self.heard.get(timeout=self.patience)
                except Empty:
                    why = f"no answer within {self.patience:g} s"
                    break
                if peer not in self.peers.values():  # of one that was given up
                    continue
                if said is None:
                    asked = [each for each in asked if each is not peer]
                    why = "its worker died"
                    continue
                try:
                    answer = self._read(peer.take(said))
                except Gone as gone:
                    why = str(gone)
                    asked = [each for each in asked if each is not peer]
                    continue
                if answer is None:
                    continue
                if answer.client in waiting and answer.envelope == waiting[answer.client].envelope:
                    ask = waiting.pop(answer.client)
                    if isinstance(answer.body, Reply):
                        self.on_examples(ask.client.num_examples)
                yield answer
            if not waiting:
                return
        for id, ask in waiting.items():
            yield Answer(ask.envelope, id, Lost(why))

    def close(self) -> None:
        for peer in self.peers.values():
            peer.stop()
        self.peers.clear()

    def _of(self, id: int) -> int:
        return self.number.get(id, id % self.count)

    def _owing(self, waiting: Iterable[int]) -> Iterator[Peer]:
        yield from (self.peers[number] for number in {self._of(id) for id in waiting})

    def _send(self, waiting: Mapping[int, Ask]) -> list[Peer]:
        """Ask those who owe an answer, each worker in one message."""
        by_worker: dict[int, list[Ask]] = {}
        for id, ask in waiting.items():
            by_worker.setdefault(self._of(id), []).append(ask)
        shared, own = parts({number: tuple(asks) for number, asks in sorted(by_worker.items())})
        for number in by_worker:
            peer = self.peers.get(number)
            if peer is not None and not peer.alive:
                peer.stop()
                peer = None
            if peer is None:
                self.peers[number] = self.start(number, self.heard)
        told = self.once(shared)
        for number, data in own.items():
            self.peers[number].ask(told, data)
        return [self.peers[number] for number in by_worker]

    def _read(self, data: bytes) -> Answer | None:
        """An answer, or None where it is damaged: who owes one is then asked again."""
        with suppress(ValueError):
            answer = wire.decode(data, self.classes)
            if isinstance(answer, Answer) and type(answer.client) is int:
                return answer
        return None


def balanced(loads: Mapping[int, int], count: int) -> dict[int, int]:
    """Client -> one of `count` workers, so that their loads are about equal: the largest first, each to who has least by then."""
    sums, found = [0] * count, {}
    for id in sorted(loads, key=lambda id: (-loads[id], id)):
        number = min(range(count), key=lambda i: (sums[i], i))
        sums[number] += loads[id]
        found[id] = number
    return found
