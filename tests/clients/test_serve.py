"""What a worker remembers of what it has answered."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fedlora.clients import serve
from fedlora.clients.serve import answered, bundles
from fedlora.clients.worker import Worker
from fedlora.messages import Answer, Ask, Envelope, TrainAsk
from fedlora.types import Client, Reply


@dataclass
class Counts:
    """A worker that counts how often it trains."""

    trained: list[int] = field(default_factory=list)
    method: Any = field(default_factory=SimpleNamespace)

    def answer(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        for ask in asks:
            self.trained.append(ask.client.id)
            yield Answer(ask.envelope, ask.client.id, Reply(ask.client, {"x": torch.ones(3)}))


def asks(round: int, ids: Sequence[int], exchange: int, down: float = 1.0) -> list[TrainAsk]:
    shared = torch.full((4,), down)
    clients = [Client(id, 8, 10) for id in ids]
    return [TrainAsk(round, client, {"w": shared}, envelope=Envelope(1, exchange)) for client in clients]


def test_who_is_asked_again_is_not_trained_again_and_earlier_rounds_are_forgotten() -> None:
    worker, last = Counts(), cast(dict[int, tuple[str, Reply]], {})

    def ask(*args: Any, **more: Any) -> list[int]:
        return [answer.client for answer in answered(cast(Worker, worker), asks(*args, **more), last)]

    assert ask(1, [0, 1, 2], 1) == [0, 1, 2] and worker.trained == [0, 1, 2]
    assert ask(1, [1, 2], 2) == [1, 2] and worker.trained == [0, 1, 2]  # another envelope, the same work
    assert ask(1, [2], 3, down=2.0) == [2] and worker.trained == [0, 1, 2, 2]  # not the same: it is sent something else
    for round in range(2, 50):
        ask(round, [3 * round, 3 * round + 1], round + 2)
    assert set(last) == {3 * 49, 3 * 49 + 1}


def test_answers_that_come_fast_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])

    def after(waits: Sequence[float], size: int) -> list[int]:
        """How many answers of this size go together, each coming so many seconds after the one before."""

        def come() -> Iterator[bytes]:
            for wait in waits:
                now[0] += wait
                yield bytes(size)

        return list(map(len, bundles(come())))

    assert after([0.0] * 10, 1 << 20) == [4, 4, 2]
    assert after([0.0] * 3, 5 << 20) == [1, 1, 1]
    assert after([0.04] * 7, 10) == [4, 3]
    assert after([60.0, 60.0, 0.0], 10) == [2, 1]
    assert after([], 10) == []
