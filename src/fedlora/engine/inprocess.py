"""Clients in this process: their generators advance together, and their pending requests train over one resident base."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora import seeds
from fedlora.config import Head
from fedlora.engine.pipeline import UNCHANGED, Pipeline
from fedlora.training.encode import Encoded
from fedlora.training.trainer import Job, Trainer
from fedlora.types import (
    BASE,
    GATE,
    Client,
    Local,
    Method,
    Observe,
    Observed,
    Order,
    Reply,
    Router,
    Setup,
    Tensors,
    Train,
    Trained,
)

WAVE_BYTES = 1 << 30  # trained parameters of the clients that are under way at once


@dataclass(frozen=True)
class Kept:
    """What one client keeps between rounds: the method's part, its own head where heads are personal, the transforms' part."""

    held: Any = None
    head: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)  # what the transforms of its changes lost so far


@dataclass
class _Running:
    """A client in the middle of its round."""

    order: Order
    local: Local
    ask: Train | Observe
    head: Tensors
    requests: int = 0
    loss: float = 0.0
    num_steps: int = 0


class InProcess:
    """A transport over one trainer. `kept` is what every client that was ever accepted keeps."""

    def __init__(
        self,
        method: Method,
        setup: Setup,
        trainer: Trainer,
        data: Mapping[int, Encoded],
        head: Head,
        kept: Mapping[int, Kept] | None = None,
        on_examples: Callable[[int], None] = lambda n: None,
        transforms: Pipeline = UNCHANGED,
    ) -> None:
        self.method, self.setup, self.trainer, self.data, self.head = method, setup, trainer, data, head
        self.kept = dict(kept or {})
        self.on_examples, self.transforms = on_examples, transforms
        self._fresh: dict[int, Kept] = {}

    def kept_by(self, client: Client) -> Kept:
        """What a client keeps; what it starts with when it was never accepted."""
        if client.id in self.kept:
            return self.kept[client.id]
        return Kept(self.method.hold(self.setup, client), self.trainer.head if self.head is Head.PERSONAL else {})

    def exchange(self, orders: Sequence[Order]) -> Iterator[Reply]:
        self._fresh = {}
        wave: list[_Running] = []
        size = 0
        for order in sorted(orders, key=lambda o: o.client.id):
            kept = self.kept_by(order.client)
            local = self.method.local(order.down, kept.held, order.client)
            run = _Running(order, local, next(local), kept.head if self.head is Head.PERSONAL else order.head)
            extra = self._trained_bytes(run.ask)
            if wave and size + extra > WAVE_BYTES:
                yield from self._finish(wave)
                wave, size = [], 0
            wave.append(run)
            size += extra
        yield from self._finish(wave)

    def commit(self, accepted: Collection[int]) -> None:
        self.kept |= {i: kept for i, kept in self._fresh.items() if i in accepted}
        self._fresh = {}

    def _finish(self, wave: Sequence[_Running]) -> Iterator[Reply]:
        """Advance all clients of a wave until each has replied."""
        replies: dict[int, Reply] = {}
        pending = list(wave)
        while pending:
            jobs = [self._job(run, run.ask) for run in pending if isinstance(run.ask, Train)]
            outcomes = self.trainer.train(jobs, self.on_examples)
            unfinished = []
            for run in pending:
                answer: Trained | Observed
                if isinstance(run.ask, Observe):
                    answer = self.trainer.observe(run.ask, self.data[run.order.client.id], self._seed(run))
                else:
                    outcome = next(outcomes)
                    answer = outcome.trained
                    if not run.ask.probe:
                        run.head, run.loss = outcome.head, answer.loss
                    run.num_steps += answer.num_steps
                run.requests += 1
                try:
                    run.ask = run.local.send(answer)
                    unfinished.append(run)
                except StopIteration as end:
                    up, held = end.value
                    id = run.order.client.id
                    personal = self.head is Head.PERSONAL
                    memory = self.kept[id].memory if id in self.kept else {}
                    up, memory = self.transforms.pack(up, memory, run.order.round, run.order.client)
                    self._fresh[id] = Kept(held, run.head if personal else {}, memory)
                    replies[id] = Reply(run.order.client, up, {} if personal else run.head, run.loss, run.num_steps)
            pending = unfinished
        for id in sorted(replies):
            yield replies.pop(id)

    def _job(self, run: _Running, ask: Train) -> Job:
        return Job(ask, self.data[run.order.client.id], self._seed(run), run.head)

    def _seed(self, run: _Running) -> int:
        return seeds.derive(self.setup.seed, "train", run.order.round, run.order.client.id, run.requests)

    def _trained_bytes(self, ask: Train | Observe) -> int:
        if isinstance(ask, Observe):
            return 0
        count = 0
        for slot, role in ask.roles:
            if slot == BASE:
                count += sum(math.prod(shape) for shape in self.setup.params.values())
            elif slot == GATE and isinstance(ask.gate, Router):
                count += sum(G.numel() for G in ask.gate.G.values())
            else:
                count += sum(x.numel() for x in getattr(ask.slots[slot], role).values())
        return 4 * count
