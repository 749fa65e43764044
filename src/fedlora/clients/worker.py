"""A worker plays clients, the same behind every transport: asks in, answers out.

Clients' generators advance together, and their pending requests train over one resident base. Each client is played from exactly
the state that its ask names, and what it then keeps is on disk before its reply leaves.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from fedlora import seeds
from fedlora.clients.state import ClientState, StateStore
from fedlora.clients.watch import MOST_CLIENTS, LocalUpdate
from fedlora.config import HeadMode
from fedlora.data.encoded import Encoded
from fedlora.messages import Answer, Ask, Behind, Body, Forgot, ScoreAsk, Scored, TrainAsk
from fedlora.training.learner import Job
from fedlora.training.score import ScoreJob
from fedlora.training.trainer import Trainer
from fedlora.transforms.pipeline import UNCHANGED, Pipeline
from fedlora.types import (
    BASE,
    GATE,
    BaseUpdate,
    Client,
    Local,
    Method,
    Observe,
    Observed,
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


@dataclass(frozen=True)
class Examples:
    """What a client has: examples to train on, and by part those that it is scored on. `constant` (domains,) is what one would
    always answer who knows only its training examples: in a run of several domains, one for each."""

    train: Encoded
    parts: Mapping[str, Encoded] = field(default_factory=dict)
    constant: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))


@dataclass
class _Running:
    """A client in the middle of its round."""

    ask: TrainAsk
    local: Local
    request: Train | Observe
    head: Tensors
    memory: Tensors
    before: Slots | None = None  # as it began to train in earnest
    after: Slots = field(default_factory=dict)
    requests: int = 0
    loss: float = 0.0
    num_steps: int = 0

    @property
    def id(self) -> int:
        return self.ask.client.id


class Worker:
    """Plays clients over one trainer. `examples` are those of each client by id; `states` holds what clients keep; `on_examples`
    hears how many examples each step saw, and `watch` what training did to each of the first clients of an exchange; `lr_factor` is
    what the learning rate of a round is multiplied with."""

    def __init__(
        self,
        method: Method,
        setup: Setup,
        trainer: Trainer,
        examples: Mapping[int, Examples],
        head: HeadMode,
        states: StateStore | None = None,
        transforms: Pipeline = UNCHANGED,
        on_examples: Callable[[int], None] = lambda n: None,
        watch: Callable[[LocalUpdate], None] = lambda update: None,
        lr_factor: Callable[[int], float] = lambda round: 1.0,
    ) -> None:
        self.method, self.setup, self.trainer, self.examples, self.head = method, setup, trainer, examples, head
        self.states = StateStore(None, message_classes(method)) if states is None else states
        self.transforms, self.on_examples, self.watch, self.lr_factor = transforms, on_examples, watch, lr_factor
        self._incarnation = 0
        self._constants: dict[tuple[int, str], dict[str, np.ndarray]] = {}

    def catch_up(self, incarnation: int, base: BaseUpdate) -> None:
        """Be at the base of a server that has just started."""
        self._incarnation = incarnation
        self.trainer.fold(base)

    def answer(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """The answers to the asks of one exchange, one for each, as they come."""
        if not asks:
            return
        envelope = asks[0].envelope
        if envelope.incarnation != self._incarnation:  # the server may have gone back, to a base of other merges
            self.catch_up(envelope.incarnation, BaseUpdate())
        trained = self._train([ask for ask in asks if isinstance(ask, TrainAsk)])
        scored = self._score([ask for ask in asks if isinstance(ask, ScoreAsk)])
        for id, body in chain(trained, scored):
            yield Answer(envelope, id, body)

    def state(self, client: Client, held: int) -> ClientState | None:
        """What a client kept in a round, 0 being the start; None where that is not here."""
        if held:
            return self.states.get(client.id, held)
        head = self.trainer.head if self.head is HeadMode.PERSONAL else {}
        return ClientState(self.method.hold(self.setup, client), head)

    # ---- training ------------------------------------------------------------------------------------------------------

    def _train(self, asks: Sequence[TrainAsk]) -> Iterator[tuple[int, Body]]:
        """In order of the clients' ids, as many at a time as there is room for what they train."""
        asks = sorted(asks, key=lambda ask: ask.client.id)
        watched = {ask.client.id for ask in asks[:MOST_CLIENTS]}
        wave: list[_Running] = []
        size = 0
        for ask in asks:
            self.states.release(ask.client.id, ask.held, ask.best)
            kept = self.state(ask.client, ask.held)
            if kept is None:
                yield ask.client.id, Forgot()
                continue
            local = self.method.local(ask.down, kept.held, ask.client, ask.round)
            head = kept.head if self.head is HeadMode.PERSONAL else ask.head
            run = _Running(ask, local, next(local), head, kept.memory)
            extra = self.trained_bytes(run.request, ask.client)
            if wave and size + extra > WAVE_BYTES:
                yield from self._play(wave, watched)
                wave, size = [], 0
            wave.append(run)
            size += extra
        yield from self._play(wave, watched)

    def _play(self, wave: Sequence[_Running], watched: Collection[int]) -> Iterator[tuple[int, Body]]:
        """Advance all clients of a wave until each has answered. Who has most to train begins first, so that nobody is left to
        train alone at the end."""
        done: dict[int, Body] = {}
        training = [run for run in wave if self._observed(run, done)]
        behind = self._behind([(run, run.request.base) for run in training if isinstance(run.request, Train)])
        for run in training:
            if run.id in behind:
                run.local.close()
                done[run.id] = Behind(behind[run.id])
        going = [run for run in training if run.id not in behind]
        jobs: deque[Job] = deque()
        asked: dict[Job, _Running] = {}

        def queue(run: _Running) -> None:
            """A client's request, at the head of the queue when the client is in the middle of its round."""
            assert isinstance(run.request, Train)
            factor = self.lr_factor(run.ask.round)
            job = Job(run.request, self.examples[run.id].train, self._seed(run), run.head, factor)
            asked[job] = run
            if run.num_steps:
                jobs.appendleft(job)
            else:
                jobs.append(job)

        for run in sorted(going, key=lambda run: -len(self.examples[run.id].train)):
            queue(run)
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
            if self._advanced(run, outcome.trained, done) and self._observed(run, done):
                queue(run)
        self.states.flush()
        for run in wave:
            if run.before is not None and run.id in watched:
                self.watch(LocalUpdate(run.id, run.ask.client.num_examples, run.before, run.after))
            yield run.id, done.pop(run.id)

    def _behind(self, first: Sequence[tuple[_Running, BaseUpdate]]) -> dict[int, int]:
        """Bring the base to where the clients' first requests have it, those that start earliest first; the clients whose updates
        start later than the base then is, and where it is."""
        found = {}
        for run, base in sorted(first, key=lambda each: each[1].since):
            if not self.trainer.fold(base):
                found[run.id] = self.trainer.version
        return found

    def _observed(self, run: _Running, done: dict[int, Body]) -> bool:
        """Answer a client's requests for statistics; False when it has none left to train."""
        while isinstance(run.request, Observe):
            seen = self.trainer.observe(run.request, self.examples[run.id].train, self._seed(run))
            if not self._advanced(run, seen, done):
                return False
        return True

    def _advanced(self, run: _Running, answer: Trained | Observed, done: dict[int, Body]) -> bool:
        """Answer a client's request; False when that was its last one, and its reply is there."""
        run.requests += 1
        try:
            run.request = run.local.send(answer)
        except StopIteration as end:
            up, held = end.value
            head = run.head if self.head is HeadMode.PERSONAL else {}
            up, memory = self.transforms.pack(up, run.memory, run.ask.round, run.ask.client)
            if not finite([held, head, memory]):
                up = Unfit("what it would keep is not finite: its training diverged")
            self.states.put(run.id, run.ask.round, ClientState(held, head, memory))
            done[run.id] = Reply(run.ask.client, up, {} if self.head is HeadMode.PERSONAL else run.head, run.loss, run.num_steps)
            return False
        return True

    def _seed(self, run: _Running) -> int:
        return seeds.derive(self.setup.seed, "train", run.ask.round, run.id, run.requests)

    def trained_bytes(self, request: Train | Observe, client: Client) -> int:
        """Of what a client trains, in fp32."""
        if isinstance(request, Observe):  # it has yet to ask for training: as a rule, of an adapter of its rank
            return 4 * client.rank * sum(map(sum, self.setup.shapes.values()))
        count = 0
        for slot, role in request.roles:
            if slot == BASE:
                count += sum(math.prod(shape) for shape in self.setup.params.values())
            elif slot == GATE and isinstance(request.gate, Router):
                count += sum(G.numel() for G in request.gate.G.values())
            else:
                count += sum(x.numel() for x in getattr(request.slots[slot], role).values())
        return 4 * count

    # ---- scoring -------------------------------------------------------------------------------------------------------

    def _score(self, asks: Sequence[ScoreAsk]) -> Iterator[tuple[int, Body]]:
        """In the order of the asks; who forgot comes as it is found."""
        scored: deque[ScoreAsk] = deque()
        forgot: deque[int] = deque()

        def jobs() -> Iterator[ScoreJob]:
            for ask in asks:
                # Before its first round a client's own head is the seed's, which a job without one has.
                own = ask.model is None or (self.head is HeadMode.PERSONAL and ask.held > 0)
                kept = self.state(ask.client, ask.held) if own else ClientState()
                if kept is None:
                    forgot.append(ask.client.id)
                    continue
                scored.append(ask)
                method: Any = self.method  # a personal one, where it is asked for a client's own model
                model = method.own(ask.down, kept.held, ask.client) if ask.model is None else ask.model
                yield ScoreJob(model, kept.head or ask.head, self.examples[ask.client.id].parts[ask.part])

        for sums in self.trainer.sums(jobs()):
            ask = scored.popleft()
            sums |= self._of_constant(ask.client.id, ask.part)
            yield ask.client.id, Scored({name: torch.from_numpy(x) for name, x in sums.items()})
        yield from ((id, Forgot()) for id in forgot)

    def _of_constant(self, id: int, part: str) -> dict[str, np.ndarray]:
        """The sums of the constant answer, which are the same in every round."""
        if (id, part) not in self._constants:
            own = self.examples[id]
            found = self.trainer.objective.of_constant(own.constant, own.parts[part], self.trainer.untrained)
            self._constants[id, part] = found
        return self._constants[id, part]
