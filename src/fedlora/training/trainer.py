"""Local training: Train requests of clients, one after the other, over one base model that stays in memory.

The frozen model computes in `dtype` (bfloat16 where the hardware has it); what trains is kept, differentiated into and stepped in
float32. Dropout is off. A masked entry has no gradient and is put back after each step, so weight decay cannot move it either.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora import seeds
from fedlora.config import TrainConfig
from fedlora.models.load import Pretrained
from fedlora.models.slots import Adapted, bind, bind_routers, transposed
from fedlora.training.encode import Encoded, by_length, collate
from fedlora.training.observe import observe, similarity_weights
from fedlora.types import (
    BASE,
    GATE,
    ROLES,
    BaseUpdate,
    ByTask,
    Factors,
    Gate,
    Mix,
    Model,
    Observe,
    Observed,
    Penalty,
    ProductDecay,
    Role,
    Router,
    Similarity,
    Slots,
    Tensors,
    Train,
    Trained,
)

EVAL_TOKENS = 2048  # padded tokens in one forward pass of an evaluation


@dataclass(frozen=True)
class Job:
    """One client's request. `head` holds the head's parameters where the head trains; the seed orders the batches."""

    ask: Train
    data: Encoded
    seed: int
    head: Tensors


@dataclass(frozen=True)
class Outcome:
    """The answer, and the trained head (empty where the head does not train)."""

    trained: Trained
    head: Tensors


class Key(NamedTuple):
    """What trains: a role of a slot in a module, or, in the slot BASE, a parameter of the model itself ("W") or of its head
    ("head")."""

    slot: str
    role: str
    name: str


class Trainer:
    """The resident base model with slots on its target modules, and what has been merged into it.

    Attributes:
        shapes: target module -> (d_out, d_in).
        params: parameter name -> shape, of what full fine-tuning trains: everything but the head.
        tasks: task -> its classes, in a run of several: an example competes among the logits of its own task only, which makes
            one head a head a task.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        targets: Sequence[str],
        settings: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        tasks: Mapping[str, range] | None = None,
    ) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        self.tasks = dict(tasks or {})
        self._seen_by = _own_classes(list(self.tasks.values())).to(device)
        self.pad = pretrained.model.config.pad_token_id or 0
        # The fp32 values live on here: casting the model below gives its parameters new storage.
        self.pretrained: dict[str, Tensor] = {name: p.detach() for name, p in pretrained.model.named_parameters()}
        self.head_names = pretrained.head
        self.model = pretrained.model.to(device=device, dtype=dtype)
        self.adapted = Adapted(self.model, targets)
        self.shapes = self.adapted.shapes
        self.parameters = dict(self.model.named_parameters())
        self.params = {name: tuple(p.shape) for name, p in self.pretrained.items() if name not in self.head_names}
        self.version, self.merged = 0, dict[str, Tensor]()

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
        for m in self.merged:
            self._write(f"{m}.weight", self._resident(f"{m}.weight"))

    def _unmerge(self) -> None:
        for m in self.merged:
            self._write(f"{m}.weight", self.pretrained[f"{m}.weight"])
        self.version, self.merged = 0, {}

    def _write(self, name: str, value: Tensor) -> None:
        self.parameters[name].data = value.to(device=self.device, dtype=self.dtype)

    # ---- training ------------------------------------------------------------------------------------------------------

    def train(self, jobs: Sequence[Job], on_examples: Callable[[int], None] = lambda n: None) -> Iterator[Outcome]:
        """The outcomes of the jobs, in their order. `on_examples` hears of every batch."""
        for job in jobs:
            yield self._train_one(job, on_examples)

    def _train_one(self, job: Job, on_examples: Callable[[int], None]) -> Outcome:
        ask = job.ask
        job = replace(job, data=self._of_task(job.data, ask.data))
        self.fold(ask.base)
        leaves = self._leaves(job)
        masks = {key: ask.mask[key.slot, key.role][key.name].to(self.device) for key in leaves if (key.slot, key.role) in ask.mask}
        before = {key: leaves[key].detach().clone() for key in masks}
        sums = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()} if ask.want_grad else {}
        optimizer = self._optimizer(leaves, ask.lr_scale)
        total, seen, steps = 0.0, 0, 0
        with self._live(ask.slots, leaves, ask.gate, ask.drop_base) as own:
            for where in batches(job, self.settings):
                if steps == ask.max_steps:
                    break
                loss = self._loss(collate(job.data, where, self.pad, self.device))
                whole = loss if ask.penalty is None else loss + penalty(ask.penalty, ask.slots[ask.penalty.slot], leaves)
                whole.backward()  # type: ignore[no-untyped-call]
                for key in own:
                    leaves[key].grad = _grad(self.parameters[key.name]).to(torch.float32)
                    self.parameters[key.name].grad = None
                for key, mask in masks.items():
                    _grad(leaves[key]).mul_(mask)
                for key, sum_ in sums.items():
                    sum_ += _grad(leaves[key])
                if self.settings.clip is not None:
                    torch.nn.utils.clip_grad_norm_(leaves.values(), self.settings.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                with torch.no_grad():
                    for key, mask in masks.items():
                        leaves[key].copy_(torch.where(mask.bool(), leaves[key], before[key]))
                for key in own:
                    self._write(key.name, leaves[key].detach())
                total, seen, steps = total + loss.item() * len(where), seen + len(where), steps + 1
                on_examples(len(where))
        done = {key: leaf.detach().cpu() for key, leaf in leaves.items()}
        trained = Trained(
            slots=_with_trained(ask.slots, done),
            gate=_with_trained_router(ask.gate, done),
            loss=total / max(1, seen),
            num_steps=steps,
            full={key.name: x - self.pretrained[key.name] for key, x in done.items() if key.slot == BASE and key.role == "W"},
            grad=_by_role({key: g / max(1, steps) for key, g in sums.items()}),
        )
        return Outcome(trained, {key.name: x for key, x in done.items() if key.slot == BASE and key.role == "head"})

    def _leaves(self, job: Job) -> dict[Key, Tensor]:
        """A fresh fp32 leaf of everything that trains."""
        start: dict[Key, Tensor] = {}
        for slot, role in sorted(job.ask.roles):
            if slot == BASE:
                for name in job.ask.mask.get((BASE, "W"), self.params):
                    value = self.pretrained[name]
                    start[Key(BASE, "W", name)] = value + job.ask.full[name] if name in job.ask.full else value
            elif slot == GATE and isinstance(job.ask.gate, Router):
                start |= {Key(GATE, role, m): G for m, G in job.ask.gate.G.items()}
            else:
                start |= {Key(slot, role, m): x for m, x in job.ask.slots[slot].role(role).items()}
        start |= {Key(BASE, "head", name): x for name, x in job.head.items()}
        return {key: x.to(self.device, torch.float32, copy=True).requires_grad_(True) for key, x in start.items()}

    @contextmanager
    def _live(
        self, slots: Slots, leaves: Mapping[Key, Tensor], gate: Gate | None = None, drop_base: bool = False
    ) -> Iterator[list[Key]]:
        """The model with these slots bound, and with the leaves in the place of what they stand for. Gives the keys of the
        model's own parameters among the leaves; the body's go back to their merged values afterwards. With `drop_base` a target
        module's own weight is what was merged into it, or zero."""
        own = [key for key in leaves if key.slot == BASE]
        placed = {s: _each_role(f, partial(self._placed, leaves, s)) for s, f in slots.items()}
        self.adapted.bound = bind(placed, list(self.shapes), gate.weights if isinstance(gate, Mix) else {})
        if isinstance(gate, Router):
            gate = replace(gate, G={m: self._placed(leaves, GATE, "G", m, G) for m, G in gate.G.items()})
        self.adapted.routers = bind_routers(gate, placed)
        dropped = [f"{m}.weight" for m in self.shapes] if drop_base else []
        for name in dropped:
            self._write(name, self._resident(name, torch.zeros_like(self.pretrained[name])))
        for key in own:
            self._write(key.name, leaves[key].detach())
            self.parameters[key.name].requires_grad_(True)
        try:
            yield own
        finally:
            self.adapted.bound, self.adapted.routers = {}, {}
            for key in own:
                self.parameters[key.name].requires_grad_(False)
            for name in {*dropped, *(key.name for key in own)}:
                self._write(name, self._resident(name))

    def _placed(self, leaves: Mapping[Key, Tensor], slot: str, role: str, m: str, x: Tensor) -> Tensor:
        key = Key(slot, role, m)
        return leaves[key] if key in leaves else x.to(self.device)

    def _resident(self, name: str, start: Tensor | None = None) -> Tensor:
        """A parameter as pre-trained, or as `start`, and merged, fp32."""
        m, value = name.removesuffix(".weight"), self.pretrained[name] if start is None else start
        if m not in self.merged:
            return value
        return value + (self.merged[m].mT if transposed(self.adapted.modules[m]) else self.merged[m])

    def _optimizer(self, leaves: Mapping[Key, Tensor], lr_scale: Mapping[str, float]) -> torch.optim.Optimizer:
        groups = [
            {"params": [x for key, x in leaves.items() if key.role == role], "lr": self.settings.lr * lr_scale.get(role, 1.0)}
            for role in sorted({key.role for key in leaves})
        ]
        if self.settings.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.settings.lr, weight_decay=self.settings.weight_decay)
        return torch.optim.AdamW(groups, lr=self.settings.lr, weight_decay=self.settings.weight_decay, fused=True)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(self._logits(batch), batch["labels"])  # a class of another task is at -inf: it weighs nothing

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if "tasks" in batch:
            return logits.float().masked_fill(~self._seen_by[batch["tasks"]], -torch.inf)
        return logits.float()

    # ---- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, model: Model, head: Tensors, data: Encoded) -> np.ndarray:
        """Logits of every example, (n, classes) in fp32; -inf for the classes of other tasks. `head` may be empty: the seed's."""
        if isinstance(model.gate, ByTask):
            return self._logits_by_task(model, model.gate, head, data)
        gate = model.gate
        near = similarity_weights(self.features(data), gate.anchors, gate.cap) if isinstance(gate, Similarity) else torch.zeros(0)
        placed = {s: _each_role(f, lambda role, m, x: x.to(self.device)) for s, f in model.slots.items()}
        self.fold(model.base)
        values = {Key(BASE, "head", name): x for name, x in head.items()}
        values |= {Key(BASE, "W", name): self.pretrained[name] + delta for name, delta in model.full.items()}
        out = np.zeros((len(data), self.model.config.num_labels), dtype=np.float32)
        with self._live(model.slots, values, model.gate, model.drop_base):
            for where in by_length(data, EVAL_TOKENS):
                if isinstance(gate, Similarity):
                    own = near[torch.from_numpy(where)].to(self.device)
                    weights = {slot: own if slot == gate.slot else 1.0 - own for slot in model.slots}
                    self.adapted.bound = bind(placed, list(self.shapes), weights)
                out[where] = self._logits(collate(data, where, self.pad, self.device)).cpu().numpy()
        return out

    @torch.no_grad()
    def features(self, data: Encoded) -> Tensor:
        """The mean over each text's tokens of the last hidden state of the pre-trained model, (n, d) in fp32 on the CPU. No slots
        are bound, and what has been merged is out of the way meanwhile."""
        for m in self.merged:
            self._write(f"{m}.weight", self.pretrained[f"{m}.weight"])
        out = torch.zeros(len(data), self.model.config.hidden_size)
        for where in by_length(data, EVAL_TOKENS):
            batch = collate(data, where, self.pad, self.device)
            hidden = self.model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"][..., None]
            out[torch.from_numpy(where)] = ((hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)).cpu()
        for m in self.merged:
            self._write(f"{m}.weight", self._resident(f"{m}.weight"))
        return out

    def observe(self, ask: Observe, data: Encoded, seed: int) -> Observed:
        """A statistic of a client's data."""
        own = self._of_task(data, ask.data)
        return Observed(observe(ask.statistic, own.labels, lambda where: self.features(own.take(where)), seed))

    def _of_task(self, data: Encoded, task: str) -> Encoded:
        return data.take(np.flatnonzero(data.tasks == list(self.tasks).index(task))) if task else data

    def _logits_by_task(self, model: Model, gate: ByTask, head: Tensors, data: Encoded) -> np.ndarray:
        out = np.zeros((len(data), self.model.config.num_labels), dtype=np.float32)
        for t, task in enumerate(self.tasks):
            where = np.flatnonzero(data.tasks == t)
            slots = {name: slot for name, slot in model.slots.items() if name == gate.slots.get(task)}
            out[where] = self.logits(replace(model, slots=slots, gate=None), head, data.take(where))
        return out


def _own_classes(tasks: Sequence[range]) -> Tensor:
    """Which of all classes are a task's own: (tasks, classes), bool."""
    own = torch.zeros(len(tasks), sum(map(len, tasks)), dtype=torch.bool)
    for row, classes in zip(own, tasks, strict=True):
        row[classes.start : classes.stop] = True
    return own


def batches(job: Job, settings: TrainConfig) -> Iterator[np.ndarray]:
    """Positions of each batch, epoch after epoch, every epoch a new order from the job's seed."""
    epochs = settings.epochs if job.ask.epochs is None else job.ask.epochs
    for epoch in range(epochs):
        order = seeds.generator(job.seed, "epoch", epoch).permutation(len(job.data))
        for start in range(0, len(order), settings.batch_size):
            yield order[start : start + settings.batch_size]


def penalty(term: Penalty, slot: Factors, leaves: Mapping[Key, Tensor]) -> Tensor:
    """TailNorm: weight * sum over modules of ||B[:, first:]||_F ||A[first:, :]||_F. ProductDecay: of ||B A||_F^2, by the trace of
    (B' B)(A A'), so that the product is never formed."""

    def of_module(m: str) -> Tensor:
        B, A = leaves.get(Key(term.slot, "B", m), slot.B[m]), leaves.get(Key(term.slot, "A", m), slot.A[m])
        if isinstance(term, ProductDecay):
            return ((B.mT @ B) * (A @ A.mT)).sum()
        product: Tensor = torch.linalg.norm(B[:, term.first :]) * torch.linalg.norm(A[term.first :])
        return product

    return term.weight * torch.stack([of_module(m) for m in slot.A]).sum()


def _grad(leaf: Tensor) -> Tensor:
    """Its gradient; zero where the loss does not reach it."""
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf)
    return leaf.grad


def _each_role(slot: Factors, f: Callable[[str, str, Tensor], Tensor]) -> Factors:
    """The slot with every tensor x of role and module replaced by f(role, module, x)."""
    for role in ROLES:
        slot = slot.with_role(role, {m: f(role, m, x) for m, x in slot.role(role).items()})
    return slot


def _with_trained(slots: Slots, done: Mapping[Key, Tensor]) -> dict[str, Factors]:
    """The slots with what trained in place, on the device and in the dtype it came in."""
    return {s: _each_role(f, partial(_trained_or_as_it_was, done, s)) for s, f in slots.items()}


def _with_trained_router(gate: Gate | None, done: Mapping[Key, Tensor]) -> Gate | None:
    if not isinstance(gate, Router):
        return gate
    return replace(gate, G={m: _trained_or_as_it_was(done, GATE, "G", m, G) for m, G in gate.G.items()})


def _trained_or_as_it_was(done: Mapping[Key, Tensor], slot: str, role: str, m: str, x: Tensor) -> Tensor:
    key = Key(slot, role, m)
    return done[key].to(x) if key in done else x


def _by_role(flat: Mapping[Key, Tensor]) -> dict[Role, dict[str, Tensor]]:
    out: dict[Role, dict[str, Tensor]] = {}
    for key, g in flat.items():
        out.setdefault((key.slot, key.role), {})[key.name] = g.cpu()
    return out
