"""Who plays the clients of workers elsewhere when some of these are gone."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedlora import messages, wire
from fedlora.clients.serve import whole
from fedlora.errors import BadInput, RunFailed
from fedlora.messages import Answer, Envelope, ScoreAsk, Scored, Unstarted
from fedlora.transports.pool import Heard, Pool, balanced
from fedlora.types import Client


@dataclass
class Echo:
    """A worker that answers at once who it is, in bundles of two; `dies` with this ask of its life, `damages` the answer to that
    one, `why` it cannot start."""

    number: int
    heard: Heard
    dies: int | None = None
    why: str | None = None
    damages: int | None = None
    alive: bool = True
    asked: int = 0

    def ask(self, shared: Any, own: bytes) -> None:
        if self.why is not None:
            self.heard.put((self, [wire.encode(Unstarted(self.why))]))
            return
        bundle: list[bytes] = []
        for ask in whole(shared, own, messages.CLASSES):
            self.asked += 1
            if self.asked == self.dies:
                self.alive = False
                self.heard.put((self, None))
                return
            answer = Answer(ask.envelope, ask.client.id, Scored({"worker": torch.tensor(float(self.number))}))
            data = wire.encode(answer)
            bundle.append(data[:-1] if self.asked == self.damages else data)
            if len(bundle) == 2:
                self.heard.put((self, bundle))
                bundle = []
        self.heard.put((self, bundle))

    def take(self, said: Any) -> list[bytes]:
        return list(said)

    def stop(self) -> None:
        self.alive = False


@dataclass
class Cluster:
    """Machines with room for so many workers; `dies` is when each that is started first dies."""

    room: int | None = None
    dies: dict[int, int] = field(default_factory=dict)
    why: str | None = None
    damages: int | None = None
    started: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def start(self, number: int, heard: Heard) -> Echo:
        self.started.append(number)
        return Echo(number, heard, self.dies.pop(number, None), self.why, self.damages)

    def pool(self, count: int) -> Pool:
        numbers = {id: id % count for id in range(6)}
        return Pool(self.start, count, numbers, messages.CLASSES, note=self.notes.append, room=lambda: self.room)


def played(pool: Pool, exchange: int = 1) -> dict[int, int]:
    """Client -> the worker that answers for it."""
    asks = [ScoreAsk(1, Client(id, 8, 10), "test", envelope=Envelope(1, exchange)) for id in range(6)]
    found = {}
    for answer in pool.exchange(asks):
        assert isinstance(answer.body, Scored), answer
        found[answer.client] = int(answer.body.sums["worker"])
    return found


def test_each_client_has_its_worker_also_after_it_died() -> None:
    cluster = Cluster(dies={1: 2})
    pool = cluster.pool(3)
    assert played(pool) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}
    assert sorted(cluster.started) == [0, 1, 1, 2] and cluster.notes == ["worker 2 died; what it has not answered is asked again"]
    assert played(pool, 2) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2} and len(cluster.started) == 4


def test_clients_of_a_machine_that_is_gone_are_played_by_the_others_until_there_is_another() -> None:
    cluster = Cluster(room=2, dies={1: 1})
    pool = cluster.pool(2)
    cluster.room = 1  # worker 1 dies in its first ask, and its machine with it
    pool.peers = {number: cluster.start(number, pool.heard) for number in (0, 1)}
    assert played(pool) == dict.fromkeys(range(6), 0)
    assert cluster.started == [0, 1]
    assert cluster.notes[1] == "1 of 2 workers: they play all clients"
    assert played(pool, 2) == dict.fromkeys(range(6), 0) and len(cluster.notes) == 2
    cluster.room = 2
    assert played(pool, 3) == {id: id % 2 for id in range(6)} and cluster.started == [0, 1, 1]
    assert cluster.notes[2] == "2 of 2 workers: each has its own clients again"


def test_without_any_machine_the_run_stops_and_says_so() -> None:
    with pytest.raises(RunFailed, match="no worker is left"):
        played(Cluster(room=0).pool(2))


def test_a_worker_that_cannot_start_ends_the_run_by_its_reason() -> None:
    with pytest.raises(BadInput, match="worker 1 cannot start: /data is gone"):
        played(Cluster(why="/data is gone").pool(1))


def test_only_the_damaged_answer_of_a_bundle_is_asked_for_again() -> None:
    cluster = Cluster(damages=2)
    pool = cluster.pool(1)
    pool.patience = 0.2
    asked = []
    pool.start = lambda number, heard: asked.append(cluster.start(number, heard)) or asked[-1]
    assert played(pool) == dict.fromkeys(range(6), 0)
    assert cluster.started == [0] and asked[0].asked == 7


def test_loads_are_about_equal() -> None:
    loads = {0: 100, 1: 10, 2: 10, 3: 10, 4: 70, 5: 0}
    found = balanced(loads, 2)
    sums = [sum(load for id, load in loads.items() if found[id] == number) for number in range(2)]
    assert sums == [100, 100] and found == {0: 0, 4: 1, 1: 1, 2: 1, 3: 1, 5: 0}
