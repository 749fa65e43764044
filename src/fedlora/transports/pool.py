"""Clients that several workers elsewhere play, each client always by the same one. A worker that dies is started again, and what it
had not answered is asked again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any, Protocol

from fedlora import wire
from fedlora.clients.serve import parts
from fedlora.errors import BadInput, RunFailed
from fedlora.messages import Answer, Ask, Lost, Unstarted
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

    def take(self, said: Any) -> Sequence[bytes]:
        """The messages that it has put there at once. Gone: there are none any more."""

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
        note: hears what a user should know.
        once: where what all workers of an exchange are told is put.
        room: how many workers can be there now; None where that does not change. Clients of one for which there is none are
            played by the others.
    """

    start: Callable[[int, Heard], Peer]
    count: int
    number: Mapping[int, int]
    classes: Sequence[type[Any]]
    retries: int = 3
    patience: float = 600.0
    on_examples: Callable[[int], None] = lambda n: None
    note: Callable[[str], None] = lambda text: None
    once: Callable[[bytes], Any] = bytes
    room: Callable[[], int | None] = lambda: None
    peers: dict[int, Peer] = field(default_factory=dict)
    heard: Heard = field(default_factory=Queue)
    left: int | None = None  # how many workers play, when that was last said

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        waiting = {ask.client.id: ask for ask in asks}
        why = "no answer"
        for _ in range(1 + self.retries):
            owing = self._send(waiting)
            while any(id in owing for id in waiting):
                try:
                    peer, said = self.heard.get(timeout=self.patience)
                except Empty:
                    why = f"no answer within {self.patience:g} s"
                    break
                number = next((number for number, each in self.peers.items() if each is peer), None)
                if number is None:  # of one that was given up
                    continue
                try:
                    messages = self._taken(number, said)
                except Gone as gone:
                    why = str(gone)
                    if any(owing.get(id) == number for id in waiting):
                        self.note(f"{why}; what it has not answered is asked again")
                    owing = {id: own for id, own in owing.items() if own != number}
                    continue
                for answer in self._read(number, messages):
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

    def _there(self) -> list[int]:
        """The numbers of workers that live, or that can be started. RunFailed: there are none."""
        alive = {number for number, peer in self.peers.items() if peer.alive}
        missing = [number for number in range(self.count) if number not in alive]
        room = self.room() if missing else None
        there = sorted([*alive, *(missing if room is None else missing[: max(0, room - len(alive))])])
        if not there:
            raise RunFailed("no worker is left, and there is no machine that has room for one; the run goes on with --resume")
        if len(there) != (self.left or self.count):
            whole = len(there) == self.count
            self.note(
                f"{len(there)} of {self.count} workers: {'each has its own clients again' if whole else 'they play all clients'}"
            )
        self.left = len(there)
        return there

    def _send(self, waiting: Mapping[int, Ask]) -> dict[int, int]:
        """Ask those who owe an answer, each worker in one message. Client -> the number of the worker that is asked."""
        there = self._there()
        by_worker: dict[int, list[Ask]] = {}
        for id, ask in waiting.items():
            number = self.number.get(id, id % self.count)
            by_worker.setdefault(number if number in there else there[id % len(there)], []).append(ask)
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
        return {ask.client.id: number for number, asks in by_worker.items() for ask in asks}

    def _taken(self, number: int, said: Any) -> Sequence[bytes]:
        """What a worker says. Gone: there is nothing, for the worker is gone."""
        if said is None:
            raise Gone(f"worker {1 + number} died")
        try:
            return self.peers[number].take(said)
        except Gone as gone:
            raise Gone(f"worker {1 + number} {gone}") from gone

    def _read(self, number: int, messages: Sequence[bytes]) -> Iterator[Answer]:
        """A worker's answers; one that is damaged is left out, and asked for again in time. BadInput: the worker cannot start."""
        for data in messages:
            try:
                answer = wire.decode(data, self.classes)
            except ValueError:
                continue
            if isinstance(answer, Unstarted):
                raise BadInput(f"worker {1 + number} cannot start: {answer.why}")
            if isinstance(answer, Answer) and type(answer.client) is int:
                yield answer


def balanced(loads: Mapping[int, int], count: int) -> dict[int, int]:
    """Client -> one of `count` workers, so that their loads are about equal: the largest first, each to who has least by then."""
    sums, found = [0] * count, {}
    for id in sorted(loads, key=lambda id: (-loads[id], id)):
        number = min(range(count), key=lambda i: (sums[i], i))
        sums[number] += loads[id]
        found[id] = number
    return found
