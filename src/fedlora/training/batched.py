"""Local training: Train requests of many clients over one base model that stays in memory.

Clients train together: a step takes the next batch of each of several clients, side by side in one forward and backward pass, each
passing through its own slots; on a CPU in one pass a thread, where the clients can be shared out evenly (`replicas`). A client that
has finished makes room for the next one. How many take part in a step follows from their tokens and from how much they train
alone, so a run that is repeated or resumed makes the same steps.

The frozen model computes in `dtype` (bfloat16 where the hardware has it); what trains is kept, differentiated into and stepped in
float32. Dropout is off. A masked entry has no gradient and is put back after each step, so weight decay cannot move it either.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.base import ResidentBase
from fedlora.models.checkpointing import checkpointing, switch_on
from fedlora.models.generate import Hear, stops
from fedlora.models.heads import padding, text_config
from fedlora.models.load import Pretrained
from fedlora.models.packing import Form
from fedlora.models.trial import try_model
from fedlora.tasks.base import Objective, Running
from fedlora.training.forward import Forward
from fedlora.training.learner import Job, Learner, Outcome, on_device, penalty
from fedlora.training.observe import observe
from fedlora.training.passes import Part, by_tokens, fill
from fedlora.training.replicas import Replicas
from fedlora.training.score import ScoreJob, Scorer, Untrained
from fedlora.types import BASE, BaseUpdate, Observe, Observed, Pool

# Tokens in one step: what is fastest on a CPU, what keeps a GPU busy. On "meta" there are only shapes.
ROWS = {"cpu": 4096, "cuda": 32768, "meta": 0}
WIDE = 12_000  # numbers that a token's states have, over all layers, above which a step on a CPU would keep too much memory:
ROWS_OF_WIDE = 2048  # then it has as many tokens, and is hardly slower, for products of such models are large anyway


@dataclass(frozen=True)
class Replica:
    """A way to run the model, and its blocks that are checkpointed."""

    forward: Forward
    blocks: Sequence[nn.Module]


@dataclass(frozen=True)
class Share:
    """Examples of a learner's next batch, which weighs so much in all; whether they are the first ones of it."""

    learner: Learner
    batch: Encoded
    weight: float
    begins: bool


class Trainer:
    """Trains, observes and scores on one resident base model.

    Attributes:
        base: the model, with slots on its target modules and with what has been merged into it.
        forward: how it is run. Its form is tried here where none is given, on texts of at most 128 tokens.
        scorer: runs models on examples.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        targets: Sequence[str],
        settings: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        objective: Objective,
        form: Form | None = None,
    ) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.pad = padding(pretrained.model)
        if form is None:
            form = Form() if device.type == "meta" else try_model(pretrained.model, targets, 128).form
        self.base = ResidentBase(pretrained, targets, device, dtype)
        rows = rows_of_step(self.base.model, device)
        self.forward = Forward(self.base.adapted, device, dtype, form, self.pad, objective, settings.rows or rows)
        self._replicas = Replicas(self._replica(self.forward), self._another)
        stop = stops(pretrained.model, pretrained.processor) if form.tokens else ()
        self.scorer = Scorer(self.base, self.forward, pretrained.first, rows, stop)
        self.shapes, self.params, self.pretrained = self.base.shapes, self.base.params, self.base.pretrained

    @property
    def objective(self) -> Objective:
        """The task."""
        return self.forward.objective

    @property
    def rows(self) -> int:
        """Tokens that fill a step; with 1 every client trains and is scored by itself."""
        return self.forward.rows

    @rows.setter
    def rows(self, rows: int) -> None:
        self.forward.rows = rows

    @property
    def version(self) -> int:
        """Of the base."""
        return self.base.version

    @property
    def transposed(self) -> frozenset[str]:
        """The target modules whose weight parameter is stored (d_in, d_out)."""
        return self.base.transposed

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's parameters as the seed drew them, fp32."""
        return self.base.head

    def refuses(self, asks: frozenset[str]) -> list[str]:
        """It does all of them."""
        return []

    def base_weight(self, module: str) -> Tensor:
        """The pre-trained weight of a target module, (d_out, d_in) in fp32."""
        return self.base.base_weight(module)

    def fold(self, update: BaseUpdate) -> bool:
        """Bring the base to `update.version`; False where the update starts after the version that it is at."""
        return self.base.fold(update)

    def outputs(self, jobs: Iterable[ScoreJob]) -> Iterator[np.ndarray]:
        """See `Scorer.outputs`."""
        return self.scorer.outputs(jobs)

    def generate(self, job: ScoreJob, limit: int, hear: Hear | None = None) -> list[np.ndarray]:
        """See `Scorer.generate`."""
        return self.scorer.generate(job, limit, hear)

    def sums(self, jobs: Iterable[ScoreJob]) -> Iterator[dict[str, np.ndarray]]:
        """See `Scorer.sums`."""
        return self.scorer.sums(jobs)

    @property
    def untrained(self) -> Running:
        """The model as it was before any training."""
        return Untrained(self.scorer)

    def features(self, data: Encoded, pool: Pool = "mean") -> Tensor:
        """See `Scorer.features`."""
        return self.scorer.features(data, pool)

    def observe(self, ask: Observe, data: Encoded, seed: int) -> Observed:
        """A statistic of a client's data."""
        own = self.forward.of_domain(data, ask.data)
        return Observed(observe(ask.statistic, own.targets, lambda where: self.features(own.take(where), ask.pool), seed))

    def train(self, jobs: deque[Job], on_examples: Callable[[int], None] = lambda n: None) -> Iterator[tuple[Job, Outcome]]:
        """Take jobs from the left until there are none and all are done; each with its outcome, as they finish. Jobs may be added
        meanwhile. `on_examples` hears of every batch."""
        active: dict[Learner, Job] = {}
        while active or jobs:
            while jobs and self._has_room(active, jobs[0]):
                active[self._begin(jobs[0])] = jobs[0]
                jobs.popleft()
            going = [learner for learner in active if learner.where is not None]
            if going:
                on_examples(self._step(going))
            for learner in [each for each in active if each.where is None]:
                yield active.pop(learner), learner.outcome(self.pretrained)
        self.base.drop(False)

    def _has_room(self, active: Iterable[Learner], job: Job) -> bool:
        """Whether a job can begin beside those that are under way: on the same base, while their next batches leave rows free."""
        under_way = [learner for learner in active if learner.where is not None]
        if not under_way:
            return True
        alone = _trains_base(job) or _trains_base(under_way[0].job)
        same = job.ask.base.version == self.base.version and job.ask.drop_base == self.base.dropped
        return same and not alone and sum(learner.rows for learner in under_way) < self.rows

    def _begin(self, job: Job) -> Learner:
        if not self.base.fold(job.ask.base):
            raise ValueError(f"the base is at version {self.version}, the update starts at {job.ask.base.since}")
        self.base.drop(job.ask.drop_base)
        job = replace(job, data=self.forward.of_domain(job.data, job.ask.data))
        return Learner(job, self.pretrained, self.params, self.settings, self.device, self.dtype)

    @record_function("train step")
    def _step(self, learners: Sequence[Learner]) -> int:
        """One step of each learner; returns how many examples they saw. Batches that are longer than `train.micro_tokens` pass in
        pieces, whose gradients add up."""
        batches = [learner.job.data.take(learner.where) for learner in learners if learner.where is not None]
        weights = [float(self.objective.weights(batch).sum()) for batch in batches]
        micro = self.settings.micro_tokens or sum(batch.tokens for batch in batches)
        pieces = [
            Share(learner, batch if len(where) == len(batch) else batch.take(where), weight, int(where[0]) == 0)
            for learner, batch, weight in zip(learners, batches, weights, strict=True)
            for where in by_tokens(batch.sizes, micro)
        ]
        losses = {learner: torch.zeros((), device=self.device) for learner in learners}
        for shares in fill(pieces, lambda share: share.batch.tokens, micro):
            groups = self._replicas.spread([share.batch.tokens for share in shares])
            found = self._replicas.run(self._descend, [[shares[i] for i in own] for own in groups])
            for own, given in zip(groups, found, strict=True):
                for i, loss in zip(own, given, strict=True):
                    losses[shares[i].learner] = losses[shares[i].learner] + loss
        for learner, weight in zip(learners, weights, strict=True):
            learner.step()
            learner.took(losses[learner], weight)
        return sum(map(len, batches))

    def _replica(self, forward: Forward) -> Replica:
        return Replica(forward, switch_on(forward.adapted) if self.settings.checkpointing else [])

    def _another(self) -> Replica | None:
        replica = self.forward.replica() if self.device.type == "cpu" else None
        return None if replica is None else self._replica(replica)

    def _descend(self, replica: Replica, shares: Sequence[Share]) -> list[Tensor]:
        """Add the gradients of some learners' examples to theirs; returns each one's loss."""
        with checkpointing(replica.blocks):
            given = replica.forward.outputs(*self._passing(shares))
        losses: list[Tensor] = []
        total = torch.zeros((), device=self.device)
        for share, outputs in zip(shares, given, strict=True):
            each = self.objective.losses(outputs, share.batch)
            loss = (each * torch.from_numpy(self.objective.weights(share.batch)).to(each)).sum() / share.weight
            losses.append(loss.detach())
            total = total + loss + (self._penalty(share.learner) if share.begins else 0.0)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        return losses

    def _passing(self, shares: Sequence[Share]) -> tuple[list[Part], dict[str, Tensor]]:
        """Examples of learners as parts of a forward pass, and the parameters of the base that one of them trains."""
        parts: list[Part] = []
        body: dict[str, Tensor] = {}
        for share in shares:
            values = share.learner.values(self.dtype)
            slots, gate = share.learner.placed(values)
            own = [(key, x) for key, x in values.items() if key.slot == BASE]
            body |= {key.name: x for key, x in own if key.role == "W"}  # whoever trains the base is alone
            parts.append(Part(share.batch, slots, gate, {}, {key.name: x for key, x in own if key.role == "head"}))
        return parts, body

    def _penalty(self, learner: Learner) -> Tensor | float:
        term = learner.job.ask.penalty
        if term is None:
            return 0.0
        slot = on_device({"": learner.job.ask.slots[term.slot]}, self.device, learner.master)[""]
        return penalty(term, slot, learner.values(learner.master))


def rows_of_step(model: nn.Module, device: torch.device) -> int:
    """Tokens in one step, where the configuration does not say."""
    config = text_config(model)
    layers, size = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    small = isinstance(layers, int) and isinstance(size, int) and layers * size <= WIDE
    return ROWS_OF_WIDE if device.type == "cpu" and not small else ROWS[device.type]


def _trains_base(job: Job) -> bool:
    return any(slot == BASE for slot, _ in job.ask.roles)
