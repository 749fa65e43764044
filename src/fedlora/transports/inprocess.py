"""Clients in this process: their generators advance together, and their pending requests train over one resident base."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora import seeds
from fedlora.clients.state import ClientState, StateStore
from fedlora.clients.watch import MOST_CLIENTS, LocalUpdate
from fedlora.config import HeadMode
from fedlora.training.batched import Trainer
from fedlora.training.encode import Encoded
from fedlora.training.learner import Job
from fedlora.transforms.pipeline import UNCHANGED, Pipeline
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
    Slots,
    Tensors,
    Train,
    Trained,
    Unfit,
)
from fedlora.wire import finite, message_classes

WAVE_BYTES = 1 << 28  # trained parameters of the clients that are under way at once


@dataclass
class _Running:
    """A client in the middle of its round."""

    order: Order
    local: Local
    ask: Train | Observe
    head: Tensors
    memory: Tensors
    before: Slots | None = None  # as it began to train in earnest
    after: Slots = field(default_factory=dict)
    requests: int = 0
    loss: float = 0.0
    num_steps: int = 0


class InProcess:
    """A transport over one trainer. `shelf` holds what clients keep; `learned` is what some clients did in the last round."""

    def __init__(
        self,
        method: Method,
        setup: Setup,
        trainer: Trainer,
        data: Mapping[int, Encoded],
        head: HeadMode,
        shelf: StateStore | None = None,
        on_examples: Callable[[int], None] = lambda n: None,
        transforms: Pipeline = UNCHANGED,
    ) -> None:
        self.method, self.setup, self.trainer, self.data, self.head = method, setup, trainer, data, head
        self.shelf = StateStore(None, message_classes(method)) if shelf is None else shelf
        self.on_examples, self.transforms = on_examples, transforms
        self.learned: list[LocalUpdate] = []

    def kept_by(self, client: Client) -> ClientState:
        """What a client keeps; what it starts with when it was never accepted."""
        kept = self.shelf.get(client.id)
        if kept is not None:
            return kept
        return ClientState(self.method.hold(self.setup, client), self.trainer.head if self.head is HeadMode.PERSONAL else {})

    def exchange(self, orders: Sequence[Order]) -> Iterator[Reply]:
        self.learned = []
        wave: list[_Running] = []
        size = 0
        for order in sorted(orders, key=lambda o: o.client.id):
            kept = self.kept_by(order.client)
            local = self.method.local(order.down, kept.held, order.client, order.round)
            head = kept.head if self.head is HeadMode.PERSONAL else order.head
            run = _Running(order, local, next(local), head, kept.memory)
            extra = self.trained_bytes(run.ask, order.client)
            if wave and size + extra > WAVE_BYTES:
                yield from self._finish(wave)
                wave, size = [], 0
            wave.append(run)
            size += extra
        yield from self._finish(wave)

    def commit(self, accepted: Collection[int]) -> None:
        self.shelf.commit(accepted)

    def _finish(self, wave: Sequence[_Running]) -> Iterator[Reply]:
        """Advance all clients of a wave until each has replied. Who has most to train begins first, so that nobody is left to train
        alone at the end."""
        replies: dict[int, Reply] = {}
        jobs: deque[Job] = deque()
        asked: dict[Job, _Running] = {}

        def ask(run: _Running) -> None:
            """Put a client's request in the queue, at its head when the client is in the middle of its round."""
            while isinstance(run.ask, Observe):
                seen = self.trainer.observe(run.ask, self.data[run.order.client.id], self._seed(run))
                if not self._advance(run, seen, replies):
                    return
            job = self._job(run, run.ask)
            asked[job] = run
            if run.num_steps:
                jobs.appendleft(job)
            else:
                jobs.append(job)

        for run in sorted(wave, key=lambda run: -len(self.data[run.order.client.id])):
            ask(run)
        for job, outcome in self.trainer.train(jobs, self.on_examples):
            run = asked.pop(job)
            if not job.ask.probe:
                run.head, run.loss = outcome.head, outcome.trained.loss
                run.before = job.ask.slots if run.before is None else run.before
                # A slot is as the last request left it that trained it: others may hold it as it was received.
                slots = outcome.trained.slots
                run.after = {
                    **slots,
                    **run.after,
                    **{s: f for s, f in slots.items() if any(s == slot for slot, _ in job.ask.roles)},
                }
            run.num_steps += outcome.trained.num_steps
            if self._advance(run, outcome.trained, replies):
                ask(run)
        for id in sorted(replies):
            yield replies.pop(id)

    def _advance(self, run: _Running, answer: Trained | Observed, replies: dict[int, Reply]) -> bool:
        """Answer a client's request; False when that was its last one, and its reply is there."""
        run.requests += 1
        try:
            run.ask = run.local.send(answer)
        except StopIteration as end:
            up, held = end.value
            id = run.order.client.id
            personal = self.head is HeadMode.PERSONAL
            up, memory = self.transforms.pack(up, run.memory, run.order.round, run.order.client)
            if not finite([held, run.head if personal else {}, memory]):
                up = Unfit("what it would keep is not finite: its training diverged")
            if run.before is not None and len(self.learned) < MOST_CLIENTS:
                self.learned.append(LocalUpdate(id, run.order.client.num_examples, run.before, run.after))
            self.shelf.put(run.order.round, id, ClientState(held, run.head if personal else {}, memory))
            replies[id] = Reply(run.order.client, up, {} if personal else run.head, run.loss, run.num_steps)
            return False
        return True

    def _job(self, run: _Running, ask: Train) -> Job:
        return Job(ask, self.data[run.order.client.id], self._seed(run), run.head)

    def _seed(self, run: _Running) -> int:
        return seeds.derive(self.setup.seed, "train", run.order.round, run.order.client.id, run.requests)

    def trained_bytes(self, ask: Train | Observe, client: Client) -> int:
        """Of what a client trains, in fp32."""
        if isinstance(ask, Observe):  # it has yet to ask for training: as a rule, of an adapter of its rank
            return 4 * client.rank * sum(map(sum, self.setup.shapes.values()))
        count = 0
        for slot, role in ask.roles:
            if slot == BASE:
                count += sum(math.prod(shape) for shape in self.setup.params.values())
            elif slot == GATE and isinstance(ask.gate, Router):
                count += sum(G.numel() for G in ask.gate.G.values())
            else:
                count += sum(x.numel() for x in getattr(ask.slots[slot], role).values())
        return 4 * count
