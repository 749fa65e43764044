"""What models answer to examples, and features of texts; nothing trains."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encoded import Encoded
from fedlora.models.base import ResidentBase
from fedlora.models.generate import Hear, generate
from fedlora.models.slots import Weight
from fedlora.training.forward import Forward
from fedlora.training.learner import on_device
from fedlora.training.observe import first_of_each, mean_of_each, similarity_weights
from fedlora.training.passes import Part, fill, in_order, passes, take
from fedlora.types import BaseUpdate, ByDomain, Model, Pool, Router, Similarity, Tensors

NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """A model to run on examples. `head` may be empty: the seed's."""

    model: Model
    head: Tensors
    data: Encoded


@dataclass(frozen=True, eq=False)
class _Asked:
    """The model of a job, to be asked for more than its outputs on the job's examples."""

    scorer: "Scorer"
    job: ScoreJob

    def outputs(self, data: Encoded) -> np.ndarray:
        (found,) = self.scorer.outputs([replace(self.job, data=data)])
        return found

    def generate(self, prompts: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
        return self.scorer.generate(replace(self.job, data=prompted(prompts, self.job.data.domains)), limit)


@dataclass(frozen=True, eq=False)
class Untrained:
    """The model as it was before any training: nothing bound to it, nothing merged, wherever its base is by now."""

    scorer: "Scorer"

    def outputs(self, data: Encoded) -> np.ndarray:
        with self._alone() as model:
            return model.outputs(data)

    def generate(self, prompts: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
        with self._alone() as model:
            return model.generate(prompts, limit)

    @contextmanager
    def _alone(self) -> Iterator[_Asked]:
        base = self.scorer.base
        base.drop(False)  # before the weights are shown, for they would be dropped from them
        with base.as_pretrained():
            here = Model(base=BaseUpdate(base.version, base.version))
            yield _Asked(self.scorer, ScoreJob(here, {}, Encoded((), NOTHING, NOTHING)))


def prompted(prompts: Sequence[np.ndarray], domains: np.ndarray) -> Encoded:
    """Prompts as examples of which nothing is to be said."""
    sizes = np.array([len(each) for each in prompts], dtype=np.int64)
    return Encoded(tuple(prompts), np.zeros(len(prompts), dtype=np.int64), sizes, domains)


def _alike(model: Model, data: Encoded, domains: Sequence[str]) -> Iterator[tuple[Model, np.ndarray]]:
    """Positions of the examples that pass through one and the same model, and it."""
    if isinstance(model.gate, ByDomain):
        for t, domain in enumerate(domains):
            slots = {name: slot for name, slot in model.slots.items() if name == model.gate.slots.get(domain)}
            if len(own := np.flatnonzero(data.domains == t)):
                yield replace(model, slots=slots, gate=None), own
    elif isinstance(model.gate, Similarity):  # which weighs each by what it is like
        yield from ((model, np.array([i])) for i in range(len(data)))
    else:
        yield model, np.arange(len(data))


class Scorer:
    """Scores models that share the resident base. `first` is the id of the token that the tokenizer puts before every text, where
    there is one; a pass takes `tokens`, or as many as a step of training; `stop` are the tokens that end what a language model
    writes. Jobs share passes as clients share steps."""

    def __init__(self, base: ResidentBase, forward: Forward, first: int | None, tokens: int, stop: Collection[int] = ()) -> None:
        self.base, self.forward, self._first, self._tokens, self._stop = base, forward, first, tokens, stop

    @property
    def tokens(self) -> int:
        """Of one forward pass."""
        return max(self._tokens, self.forward.rows)

    def outputs(self, jobs: Iterable[ScoreJob]) -> Iterator[np.ndarray]:
        """What the model of each job gives of each of its examples, (n, outputs) in fp32; -inf for the classes of other domains.
        Jobs on one base share forward passes."""
        for group in self._groups(jobs):
            out = [np.zeros((len(job.data), self.forward.objective.outputs), dtype=np.float32) for job, _ in group]
            for i, where, given in self._answers(group):
                out[i][where] = given
            yield from out

    def sums(self, jobs: Iterable[ScoreJob]) -> Iterator[dict[str, np.ndarray]]:
        """The sums of the task over the examples of each job, but for those of the constant answer; no more outputs are there at
        once than a forward pass gives."""
        objective = self.forward.objective
        for group in self._groups(jobs):
            sums: list[dict[str, np.ndarray]] = [objective.sums(self._nothing(), job.data.take(NOTHING)) for job, _ in group]
            for i, where, given in self._answers(group):
                for name, x in objective.sums(given, group[i][0].data.take(where)).items():
                    sums[i][name] = sums[i][name] + x
            for (job, _), own in zip(group, sums, strict=True):
                yield own | objective.further(job.data, _Asked(self, job))

    @torch.no_grad()
    def generate(self, job: ScoreJob, limit: int, hear: Hear | None = None) -> list[np.ndarray]:
        """What the model of a job writes after each of its examples: token ids, at most `limit`, without the one that ends it.
        `hear` is told of a single example's as they come."""
        found: list[np.ndarray] = [NOTHING] * len(job.data)
        self.base.fold(job.model.base)
        self.base.drop(job.model.drop_base)
        body = {name: self.base.pretrained[name] + delta for name, delta in job.model.full.items()}
        with self.base.replaced(body):
            for model, where in _alike(job.model, job.data, self.forward.domains):
                own = ScoreJob(model, job.head, job.data.take(where))
                with self.forward.bound(self.part(own)):
                    texts = generate(self.base.model, own.data.inputs, limit, self._stop, self.tokens, hear)
                for i, text in zip(where, texts, strict=True):
                    found[i] = text
        self.base.drop(False)
        return found

    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self.forward.objective.outputs), dtype=np.float32)

    def _groups(self, jobs: Iterable[ScoreJob]) -> Iterator[list[tuple[ScoreJob, Part]]]:
        """Jobs that share forward passes, each as a part of one."""
        waiting: list[tuple[ScoreJob, Part]] = []
        rows = 0
        for job in jobs:
            if waiting and not (rows < self.forward.rows and self._shares(waiting[0][0], job)):
                yield waiting
                waiting, rows = [], 0
            waiting.append((job, self.part(job)))
            rows += job.data.tokens
        if waiting:
            yield waiting
        self.base.drop(False)

    def _shares(self, one: ScoreJob, other: ScoreJob) -> bool:
        a, b = one.model, other.model
        plain = not any(model.full or isinstance(model.gate, ByDomain) for model in (a, b))
        return plain and a.base.version == b.base.version and a.drop_base == b.drop_base

    @torch.no_grad()
    def part(self, job: ScoreJob) -> Part:
        """A job as a part of a forward pass, with all its examples."""
        model, data = job.model, job.data
        weights: dict[str, Weight] = {}
        if isinstance(model.gate, Similarity):
            near = similarity_weights(self.features(data), model.gate.anchors, model.gate.cap).to(self.base.device)
            weights = {slot: near if slot == model.gate.slot else 1.0 - near for slot in model.slots}
        head = {name: x.to(self.base.device, self.base.dtype) for name, x in job.head.items()}
        gate = model.gate
        if isinstance(gate, Router):
            gate = replace(gate, G={m: G.to(self.base.device) for m, G in gate.G.items()})
        return Part(data, on_device(model.slots, self.base.device, self.base.dtype), gate, weights, head)

    @torch.no_grad()
    def _answers(self, asked: Sequence[tuple[ScoreJob, Part]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """By and by: which job, the positions of some of its examples, and their outputs."""
        first = asked[0][0].model
        if isinstance(first.gate, ByDomain):
            yield from self._by_domain(asked[0][0], first.gate)
            return
        self.base.fold(first.base)
        self.base.drop(first.drop_base)
        body = {n: (self.base.pretrained[n] + delta).to(self.base.device, self.base.dtype) for n, delta in first.full.items()}
        pieces = [(i, where) for i, (q, _) in enumerate(asked) for where in by_length(q.data, self.tokens)]
        for group in fill(pieces, lambda piece: int(asked[piece[0]][0].data.sizes[piece[1]].sum()), self.tokens):
            parts = [take(asked[i][1], where) for i, where in group]
            for (i, where), given in zip(group, self.forward.outputs(parts, body), strict=True):
                yield i, where, given.cpu().numpy()

    def _by_domain(self, job: ScoreJob, gate: ByDomain) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each example through the slot of its domain alone."""
        model, data = job.model, job.data
        for t, domain in enumerate(self.forward.domains):
            own = np.flatnonzero(data.domains == t)
            slots = {name: slot for name, slot in model.slots.items() if name == gate.slots.get(domain)}
            alone = ScoreJob(replace(model, slots=slots, gate=None), job.head, data.take(own))
            for _, where, given in self._answers([(alone, self.part(alone))]):
                yield 0, own[where], given

    @torch.no_grad()
    def features(self, data: Encoded, pool: Pool = "mean") -> Tensor:
        """Features of each text (see `types.Observe`), (n, d) in fp32 on the CPU. No slots are bound, and what has been merged is
        out of the way meanwhile."""
        found: list[Tensor] = []
        places: list[np.ndarray] = []
        with self.base.as_pretrained():
            read = first_of_each if pool == "first" and self.has_first else mean_of_each
            for near in by_length(data, self.tokens):
                for ((_, where),) in passes([Part(data.take(near), {}, None, {}, {})], self.forward.form):
                    found.append(self.forward.hidden([data.inputs[i] for i in near[where]], read))
                    places.append(near[where])
            if not found:
                shape = self.forward.form.shape or (1,)
                return self.forward.hidden([np.zeros(shape, dtype=np.int64)], read)[:0]
        return in_order(found, places, torch.device("cpu"))

    @cached_property
    def has_first(self) -> bool:
        """Whether the first token stands for the text: it is the same for all of them, and sees what follows."""
        if self._first is None:
            return False
        with torch.no_grad(), self.base.as_pretrained():
            texts = [np.array([self._first, id, id]) for id in (0, 1)]
            one, two = (self.forward.hidden([ids], first_of_each) for ids in texts)
        return not torch.allclose(one, two, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def by_length(data: Encoded, tokens: int) -> Iterator[np.ndarray]:
    """Positions of all examples in batches of similar size, at most `tokens` padded tokens each (or one example): the order for
    evaluation."""
    order = np.argsort(data.sizes, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * data.sizes[order[end]] <= tokens:
            end += 1
        yield order[start:end]
        start = end
