"""Local training: Train requests of many clients over one base model that stays in memory.

Clients train together: a step takes the next batch of each of several clients, side by side in one forward and backward pass, each
passing through its own slots. A client that has finished makes room for the next one. How many take part in a step follows from
the number of tokens in their batches alone, so a run that is repeated or resumed makes the same steps.

The frozen model computes in `dtype` (bfloat16 where the hardware has it); what trains is kept, differentiated into and stepped in
float32. Dropout is off. A masked entry has no gradient and is put back after each step, so weight decay cannot move it either.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.profiler import record_function

from fedlora.config import TrainConfig
from fedlora.models.heads import Body, Head, Whole, padding
from fedlora.models.load import Pretrained, prepended
from fedlora.models.packing import Form, Texts, pack
from fedlora.models.slots import Adapted, Weight, bind, bind_routers, transposed
from fedlora.models.trial import try_model
from fedlora.training.encode import Encoded, by_length
from fedlora.training.learner import Job, Learner, Outcome, on_device, penalty
from fedlora.training.observe import first_of_each, mean_of_each, observe, similarity_weights
from fedlora.training.passes import Part, fill, in_order, passes, take
from fedlora.types import (
    BASE,
    BaseUpdate,
    ByTask,
    Mix,
    Model,
    Observe,
    Observed,
    Pool,
    Similarity,
    Tensors,
)

# Tokens in one step: on a CPU what its caches hold, on a GPU what keeps it busy. On "meta" there are only shapes.
ROWS = {"cpu": 2048, "cuda": 32768, "meta": 0}


@dataclass(frozen=True, eq=False)
class ScoreJob:
    """A model to run on examples. `head` may be empty: the seed's."""

    model: Model
    head: Tensors
    data: Encoded


class Trainer:
    """The resident base model with slots on its target modules, and what has been merged into it.

    Attributes:
        shapes: target module -> (d_out, d_in).
        params: parameter name -> shape, of what full fine-tuning trains: everything but the head.
        tasks: task -> its classes, in a run of several: an example competes among the logits of its own task only, which makes
            one head a head a task.
        form: how the model is run; tried here where it is not given, on texts of at most 128 tokens.
        rows: tokens that fill a step.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        targets: Sequence[str],
        settings: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        tasks: Mapping[str, range] | None = None,
        rows: int | None = None,
        form: Form | None = None,
    ) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.rows = ROWS[device.type] if rows is None else rows
        self.tasks = dict(tasks or {})
        self._seen_by = _own_classes(list(self.tasks.values())).to(device)
        self.pad = padding(pretrained.model)
        self._first = None if pretrained.tokenizer is None else prepended(pretrained.tokenizer)
        # The fp32 values live on here: casting the model below gives its parameters new storage.
        self.pretrained: dict[str, Tensor] = {name: p.detach() for name, p in pretrained.model.named_parameters()}
        self.head_names = pretrained.head
        if form is None:
            form = Form() if device.type == "meta" else try_model(pretrained.model, targets, 128).form
        self.form = form
        self.model = pretrained.model.to(device=device, dtype=dtype)
        self.adapted = Adapted(self.model, targets)
        self._body, self._head, self._whole = Body(self.model, form), Head(self.model, form), Whole(self.model, form)
        self.shapes = self.adapted.shapes
        self.parameters = dict(self.model.named_parameters())
        self.params = {name: tuple(p.shape) for name, p in self.pretrained.items() if name not in self.head_names}
        self.version, self.merged, self.dropped = 0, dict[str, Tensor](), False

    # ---- the base ------------------------------------------------------------------------------------------------------

    def base_weight(self, module: str) -> Tensor:
        """The pre-trained weight of a target module, (d_out, d_in) in fp32."""
        weight: Tensor = self.pretrained[f"{module}.weight"]
        return weight.mT if transposed(self.adapted.modules[module]) else weight

    @property
    def transposed(self) -> frozenset[str]:
        """The target modules whose weight parameter is stored (d_in, d_out)."""
        return frozenset(m for m in self.shapes if transposed(self.adapted.modules[m]))

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's parameters as the seed drew them, fp32."""
        return {name: self.pretrained[name] for name in self.head_names}

    def fold(self, update: BaseUpdate) -> None:
        """Bring the base to `update.version`. The sum of all merges is kept apart in fp32 and added to the pre-trained weight,
        so the base at a version has the same bits however it got there."""
        if update.version == self.version:
            return
        if update.dense:
            self.merged = dict(update.dense)
        else:
            if not update.since <= self.version < update.version:
                if update.since:
                    raise ValueError(
                        f"the base is at version {self.version}, the update leads from {update.since} to {update.version}"
                    )
                self._unmerge()  # the update holds the whole history, so start over
            for pair in update.pairs[self.version - update.since :]:
                for m, B in pair.B.items():
                    self.merged[m] = self.merged.get(m, torch.zeros(())) + pair.scale * (B @ pair.A[m])
        self.version = update.version
        self._show(self.merged)

    def drop(self, dropped: bool) -> None:
        """With True, a target module's own weight is what was merged into it, or zero; with False, it is itself again."""
        if dropped != self.dropped:
            self.dropped = dropped
            self._show(self.shapes)

    def _unmerge(self) -> None:
        gone, self.version, self.merged = self.merged, 0, {}
        self._show(gone)

    def _show(self, modules: Iterable[str]) -> None:
        """Give these modules the weights that the state of the base says."""
        for m in modules:
            name = f"{m}.weight"
            value = torch.zeros_like(self.pretrained[name]) if self.dropped else self.pretrained[name]
            if m in self.merged:
                value = value + (self.merged[m].mT if transposed(self.adapted.modules[m]) else self.merged[m])
            self._write(name, value)

    @contextmanager
    def _as_pretrained(self) -> Iterator[None]:
        dropped = self.dropped
        for name in (f"{m}.weight" for m in {*self.merged, *(self.shapes if dropped else ())}):
            self._write(name, self.pretrained[name])
        try:
            yield
        finally:
            self._show({*self.merged, *(self.shapes if dropped else ())})

    def _write(self, name: str, value: Tensor) -> None:
        self.parameters[name].data = value.to(device=self.device, dtype=self.dtype)

    # ---- a forward pass ------------------------------------------------------------------------------------------------

    def _pack(self, ids: Sequence[np.ndarray]) -> Texts:
        return pack(ids, self.form, self.pad, self.device)

    def _logits(self, parts: Sequence[Part], body: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits of each part's texts, (texts, classes); -inf for the classes of other tasks. `body` replaces parameters of the
        model below its head."""
        found: list[list[Tensor]] = [[] for _ in parts]
        places: list[list[np.ndarray]] = [[] for _ in parts]
        for pieces in passes(parts, self.form):
            shares = [parts[i] if len(where) == len(parts[i].ids) else take(parts[i], where) for i, where in pieces]
            for (i, where), logits in zip(pieces, self._pass(shares, body), strict=True):
                found[i].append(logits)
                places[i].append(where)
        whole = [x[0] if len(x) == 1 else in_order(x, where, self.device) for x, where in zip(found, places, strict=True)]
        return [self._of_own_task(logits, part.tasks) for logits, part in zip(whole, parts, strict=True)]

    def _pass(self, parts: Sequence[Part], body: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits of each part's texts, from one forward pass."""
        texts = self._pack([row for part in parts for row in part.ids])
        spans = [slice(a, b) for a, b in pairwise(accumulate((len(part.ids) for part in parts), initial=0))]
        ends = np.concatenate([[0], np.cumsum(texts.lengths)])
        rows = [slice(None)] if self.form.apart else [slice(int(ends[s.start]), int(ends[s.stop])) for s in spans]
        self._bind(parts, rows, [texts.lengths[s] for s in spans])
        try:
            if not self.form.split:  # one part, where parts have heads of their own
                whole = _call(self._whole, {**body, **parts[0].head}, texts)
                return [whole[s] for s in spans]
            hidden = _call(self._body, body, texts)
            if any(part.head for part in parts) or texts.layout is None:
                each = zip(parts, spans, strict=True)
                return [_call(self._head, {**body, **part.head}, hidden[s], _some(texts, s)) for part, s in each]
            whole = _call(self._head, body, hidden, texts)
            return [whole[s] for s in spans]
        finally:
            self.adapted.bound, self.adapted.routers = {}, {}

    def _bind(self, parts: Sequence[Part], rows: Sequence[slice], lengths: Sequence[np.ndarray]) -> None:
        bound, routers = [], []
        for part, own in zip(parts, lengths, strict=True):
            weights = (
                part.gate.weights if isinstance(part.gate, Mix) else {s: self._by_row(w, own) for s, w in part.weights.items()}
            )
            bound.append(bind(part.slots, list(self.shapes), weights))
            routers.append(bind_routers(part.gate, part.slots))
        self.adapted.bound = {
            m: [(where, slots[m]) for where, slots in zip(rows, bound, strict=True)]
            for m in self.shapes
            if any(s[m] for s in bound)
        }
        self.adapted.routers = {m: [r.get(m) for r in routers] for m in self.shapes if any(m in r for r in routers)}

    def _by_row(self, weight: Weight, lengths: np.ndarray) -> Weight:
        """What weighs each text, for each of its rows."""
        if not isinstance(weight, Tensor):
            return weight
        return float(weight) if self.form.apart else weight.repeat_interleave(torch.from_numpy(lengths).to(weight.device))

    def _of_own_task(self, logits: Tensor, tasks: np.ndarray) -> Tensor:
        if not len(tasks):
            return logits
        return logits.masked_fill(~self._seen_by[torch.from_numpy(tasks).to(self.device)], -torch.inf)

    # ---- training ------------------------------------------------------------------------------------------------------

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
        self.drop(False)

    def _has_room(self, active: Iterable[Learner], job: Job) -> bool:
        """Whether a job can begin beside those that are under way: on the same base, while their next batches leave rows free."""
        under_way = [learner for learner in active if learner.where is not None]
        if not under_way:
            return True
        alone = _trains_base(job) or _trains_base(under_way[0].job)
        same = job.ask.base.version == self.version and job.ask.drop_base == self.dropped
        return same and not alone and sum(learner.rows for learner in under_way) < self.rows

    def _begin(self, job: Job) -> Learner:
        self.fold(job.ask.base)
        self.drop(job.ask.drop_base)
        job = replace(job, data=self._of_task(job.data, job.ask.data))
        return Learner(job, self.pretrained, self.params, self.settings, self.device, self.dtype)

    @record_function("train step")
    def _step(self, learners: Sequence[Learner]) -> int:
        """One step of each learner; returns how many examples they saw."""
        parts: list[Part] = []
        body: dict[str, Tensor] = {}
        data = [learner.job.data.take(learner.where) for learner in learners if learner.where is not None]
        for learner, batch in zip(learners, data, strict=True):
            values = learner.values(self.dtype)
            slots, gate = learner.placed(values)
            own = [(key, x) for key, x in values.items() if key.slot == BASE]
            body |= {key.name: x for key, x in own if key.role == "W"}  # whoever trains the base is alone
            head = {key.name: x for key, x in own if key.role == "head"}
            parts.append(Part(batch.ids, batch.tasks, slots, gate, {}, head))
        total = torch.zeros((), device=self.device)
        losses: list[Tensor] = []
        for learner, logits, batch in zip(learners, self._logits(parts, body), data, strict=True):
            # A class of another task is at -inf: it weighs nothing.
            loss = cross_entropy(logits, torch.from_numpy(batch.labels).to(self.device))
            losses.append(loss)
            total = total + loss + self._penalty(learner)
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        for learner, loss in zip(learners, losses, strict=True):
            learner.step()
            learner.took(loss)
        return sum(map(len, data))

    def _penalty(self, learner: Learner) -> Tensor | float:
        term = learner.job.ask.penalty
        if term is None:
            return 0.0
        slot = on_device({"": learner.job.ask.slots[term.slot]}, self.device, learner.master)[""]
        return penalty(term, slot, learner.values(learner.master))

    # ---- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, questions: Iterable[ScoreJob]) -> Iterator[np.ndarray]:
        """Logits of every example of each question, (n, classes) in fp32; -inf for the classes of other tasks. Questions on one
        base share forward passes."""
        waiting: list[tuple[ScoreJob, Part]] = []
        rows = 0
        for question in questions:
            if waiting and not (rows < self.rows and self._shares(waiting[0][0], question)):
                yield from self._answer(waiting)
                waiting, rows = [], 0
            waiting.append((question, self._part(question)))
            rows += sum(map(len, question.data.ids))
        if waiting:
            yield from self._answer(waiting)
        self.drop(False)

    def _shares(self, one: ScoreJob, other: ScoreJob) -> bool:
        a, b = one.model, other.model
        plain = not any(model.full or isinstance(model.gate, ByTask) for model in (a, b))
        return plain and a.base.version == b.base.version and a.drop_base == b.drop_base

    def _part(self, question: ScoreJob) -> Part:
        """A question as a part of a forward pass, with all its examples."""
        model, data = question.model, question.data
        weights: dict[str, Weight] = {}
        if isinstance(model.gate, Similarity):
            near = similarity_weights(self.features(data), model.gate.anchors, model.gate.cap).to(self.device)
            weights = {slot: near if slot == model.gate.slot else 1.0 - near for slot in model.slots}
        head = {name: x.to(self.device, self.dtype) for name, x in question.head.items()}
        return Part(data.ids, data.tasks, on_device(model.slots, self.device, self.dtype), model.gate, weights, head)

    def _answer(self, asked: Sequence[tuple[ScoreJob, Part]]) -> Iterator[np.ndarray]:
        first = asked[0][0].model
        if isinstance(first.gate, ByTask):
            yield self._by_task(asked[0][0], first.gate)
            return
        self.fold(first.base)
        self.drop(first.drop_base)
        body = {n: (self.pretrained[n] + delta).to(self.device, self.dtype) for n, delta in first.full.items()}
        out = [np.zeros((len(q.data), self.model.config.num_labels), dtype=np.float32) for q, _ in asked]
        pieces = [(i, where) for i, (q, _) in enumerate(asked) for where in by_length(q.data, self.rows)]
        for group in fill(pieces, lambda piece: sum(len(asked[piece[0]][0].data.ids[j]) for j in piece[1]), self.rows):
            parts = [take(asked[i][1], where) for i, where in group]
            for (i, where), logits in zip(group, self._logits(parts, body), strict=True):
                out[i][where] = logits.cpu().numpy()
        yield from out

    def _by_task(self, question: ScoreJob, gate: ByTask) -> np.ndarray:
        """Each example through the slot of its task alone."""
        model, data = question.model, question.data
        out = np.zeros((len(data), self.model.config.num_labels), dtype=np.float32)
        for t, task in enumerate(self.tasks):
            where = np.flatnonzero(data.tasks == t)
            slots = {name: slot for name, slot in model.slots.items() if name == gate.slots.get(task)}
            alone = ScoreJob(replace(model, slots=slots, gate=None), question.head, data.take(where))
            (out[where],) = self._answer([(alone, self._part(alone))])
        return out

    @torch.no_grad()
    def features(self, data: Encoded, pool: Pool = "mean") -> Tensor:
        """Features of each text (see `types.Observe`), (n, d) in fp32 on the CPU. No slots are bound, and what has been merged is
        out of the way meanwhile."""
        found: list[Tensor] = []
        places: list[np.ndarray] = []
        with self._as_pretrained():
            read = first_of_each if pool == "first" and self.has_first else mean_of_each
            for near in by_length(data, self.rows):
                for ((_, where),) in passes([Part([data.ids[i] for i in near], data.tasks, {}, None, {}, {})], self.form):
                    found.append(self._hidden([data.ids[i] for i in near[where]], read))
                    places.append(near[where])
            if not found:
                return self._hidden([np.zeros(1, dtype=np.int64)], read)[:0]
        return in_order(found, places, torch.device("cpu"))

    @cached_property
    def has_first(self) -> bool:
        """Whether the first token stands for the text: it is the same for all of them, and sees what follows."""
        if self._first is None:
            return False
        with torch.no_grad(), self._as_pretrained():
            texts = [np.array([self._first, id, id]) for id in (0, 1)]
            one, two = (self._hidden([ids], first_of_each) for ids in texts)
        return not torch.allclose(one, two, rtol=1e-3, atol=1e-5 * float(one.abs().max()))

    def _hidden(self, ids: Sequence[np.ndarray], read: Callable[[Tensor, Texts], Tensor]) -> Tensor:
        """What `read` makes of the last hidden states of texts that share a pass, (n, d)."""
        texts = self._pack(ids)
        hidden = self._body.all_tokens(texts).float()
        if texts.layout is None and hidden.shape[1] != texts.ids.shape[1]:  # a body that shortens its texts
            if len(ids) > 1:
                return torch.cat([self._hidden([each], read) for each in ids])
            texts = replace(texts, lengths=np.array([hidden.shape[1]]), mask=None)
        return read(hidden.flatten(0, -2), texts).cpu()

    def observe(self, ask: Observe, data: Encoded, seed: int) -> Observed:
        """A statistic of a client's data."""
        own = self._of_task(data, ask.data)
        return Observed(observe(ask.statistic, own.labels, lambda where: self.features(own.take(where), ask.pool), seed))

    def _of_task(self, data: Encoded, task: str) -> Encoded:
        return data.take(np.flatnonzero(data.tasks == list(self.tasks).index(task))) if task else data


def _call(module: torch.nn.Module, parameters: Mapping[str, Tensor], *args: object) -> Tensor:
    """The module's output, with these tensors in the place of its model's parameters."""
    if not parameters:
        plain: Tensor = module(*args)
        return plain
    out: Tensor = functional_call(module, {f"model.{name}": x for name, x in parameters.items()}, args)
    return out


def _some(texts: Texts, where: slice) -> Texts:
    """Some of the texts, as far as a head needs to know them."""
    if texts.layout is not None:
        return texts
    return replace(texts, ids=texts.ids[where], mask=None if texts.mask is None else texts.mask[where])


def _trains_base(job: Job) -> bool:
    return any(slot == BASE for slot, _ in job.ask.roles)


def _own_classes(tasks: Sequence[range]) -> Tensor:
    """Which of all classes are a task's own: (tasks, classes), bool."""
    own = torch.zeros(len(tasks), sum(map(len, tasks)), dtype=torch.bool)
    for row, classes in zip(own, tasks, strict=True):
        row[classes.start : classes.stop] = True
    return own
