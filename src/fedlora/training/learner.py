"""One client's local training under way: what trains, its optimiser, its batches.

What trains lies in one flat vector a role, so that casting it to the precision of the forward pass, clipping and the optimiser are
one operation each, however many modules there are. Of a factor whose mask chooses whole ranks only the chosen ones are in it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.tensors import flat
from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.training.length import steps_of
from fedlora.types import BASE, GATE, ROLES, Factors, Gate, Penalty, ProductDecay, Role, Router, Slots, Tensors, Train, Trained

TRAINED_OF_ROW = 4096  # numbers that a client trains for each row of a step that it takes


@dataclass(frozen=True, eq=False)
class Job:
    """One client's request. `head` holds the head's parameters where the head trains; the seed orders the batches; `lr_factor` is
    that of the round."""

    ask: Train
    data: Encoded
    seed: int
    head: Tensors
    lr_factor: float = 1.0


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


@dataclass(frozen=True)
class Leaf:
    """A tensor of which some or all trains. `whole` is where it starts from; `chosen` the positions along `axis` that train, all
    where it is None."""

    key: Key
    whole: Tensor
    axis: int = 0
    chosen: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what trains."""
        shape = list(self.whole.shape)
        if self.chosen is not None:
            shape[self.axis] = len(self.chosen)
        return tuple(shape)

    def part(self, x: Tensor) -> Tensor:
        """What trains of a tensor of the whole's shape."""
        return x if self.chosen is None else x.index_select(self.axis, self.chosen)

    def put(self, part: Tensor, whole: Tensor) -> Tensor:
        """The whole with this part in it."""
        return part if self.chosen is None else whole.index_copy(self.axis, self.chosen, part)


def rows_of(tokens: int, trained: int) -> int:
    """Of a step, those that a client takes: its tokens, or more where it trains much and has few. Each client that takes part
    holds what it trains some five times, and a hundred of two texts are no faster together than twenty."""
    return max(tokens, trained // TRAINED_OF_ROW)


class Learner:
    """One client in the middle of a Train request. It computes in `dtype`; what it learns is kept in `master`, at least fp32.

    Attributes:
        where: positions of the examples of its next batch; None when it has had its last one.
    """

    def __init__(
        self,
        job: Job,
        pretrained: Tensors,
        params: Mapping[str, object],
        settings: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.job, self.settings, self.device, self.dtype = job, settings, device, dtype
        self.master = torch.promote_types(torch.float32, dtype)
        masks = _masks(job.ask)
        leaves = [_leaf(key, x.to(device, self.master), masks.get(key)) for key, x in _trains(job, pretrained, params).items()]
        self.by_role: dict[str, list[Leaf]] = {}
        for leaf in leaves:
            if leaf.chosen is None or len(leaf.chosen):
                self.by_role.setdefault(leaf.key.role, []).append(leaf)
        self.flats = {role: _flat([leaf.part(leaf.whole) for leaf in own]) for role, own in self.by_role.items()}
        self.masks = {role: mask for role, own in self.by_role.items() if (mask := _flat_mask(own, masks)) is not None}
        self.before = {role: self.flats[role].clone() for role in self.masks}
        self.sums = {role: torch.zeros_like(x) for role, x in self.flats.items()} if job.ask.want_grad else {}
        replaced = {leaf.key for leaf in leaves if leaf.chosen is None}  # by what it is at each step
        self.fixed = {s: _each_role(f, partial(_there, device, dtype, replaced, s)) for s, f in job.ask.slots.items()}
        for vector in self.flats.values():
            vector.requires_grad_(True)
        self.optimizer = self._optimizer()
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.seen, self.steps = 0.0, 0
        self._batches = batches(job, settings)
        self.where = next(self._batches, None)

    def values(self, dtype: torch.dtype) -> dict[Key, Tensor]:
        """What trains as it now is, each tensor whole, in the graph of the flat vectors."""
        out: dict[Key, Tensor] = {}
        for role, own in self.by_role.items():
            parts = torch.split(self.flats[role].to(dtype), [math.prod(leaf.shape) for leaf in own])
            for leaf, part in zip(own, parts, strict=True):
                own_part = part.view(leaf.shape)
                out[leaf.key] = own_part if leaf.chosen is None else leaf.put(own_part, self._fixed(leaf, dtype))
        return out

    def placed(self, values: Mapping[Key, Tensor]) -> tuple[dict[str, Factors], Gate | None]:
        """The slots and the gate of the request, with `values` in the places of what trains."""
        slots = {s: _each_role(f, partial(_value_or, values, s)) for s, f in self.fixed.items()}
        gate = self.job.ask.gate
        if isinstance(gate, Router):
            gate = replace(gate, G={m: values.get(Key(GATE, "G", m), G.to(self.device)) for m, G in gate.G.items()})
        return slots, gate

    def step(self) -> None:
        """One step of the optimiser, the gradient of this batch's loss being in the flat vectors."""
        for role, vector in self.flats.items():
            if vector.grad is None:
                vector.grad = torch.zeros_like(vector)
            if role in self.masks:
                vector.grad.mul_(self.masks[role])
            if role in self.sums:
                self.sums[role] += vector.grad
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.flats.values(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for role, mask in self.masks.items():
                self.flats[role].copy_(torch.where(mask.bool(), self.flats[role], self.before[role]))

    @property
    def rows(self) -> int:
        """Of a step, those that its next batch takes."""
        if self.where is None:
            return 0
        return rows_of(int(self.job.data.sizes[self.where].sum()), sum(x.numel() for x in self.flats.values()))

    def took(self, loss: Tensor, weight: float) -> None:
        """This batch is done, with this mean loss over examples or tokens that weigh so much: on to the next."""
        self.loss += loss.detach() * weight
        self.seen, self.steps = self.seen + weight, self.steps + 1
        self.where = next(self._batches, None)

    def outcome(self, pretrained: Tensors) -> Outcome:
        """The answer to the request."""
        ask = self.job.ask
        with torch.no_grad():
            done = {key: x.detach().cpu() for key, x in self.values(self.master).items()}
        trained = Trained(
            slots={s: _after(done, s, f, ask.roles) for s, f in ask.slots.items()},
            gate=_with_trained_router(ask.gate, done),
            loss=self.loss.item() / max(1.0, self.seen),
            num_steps=self.steps,
            full={key.name: x - pretrained[key.name] for key, x in done.items() if key.slot == BASE and key.role == "W"},
            grad=self._mean_gradient(),
        )
        return Outcome(trained, {key.name: x for key, x in done.items() if key.slot == BASE and key.role == "head"})

    def _fixed(self, leaf: Leaf, dtype: torch.dtype) -> Tensor:
        """The whole tensor of a leaf of which only a part trains, in the precision asked for."""
        if dtype != self.dtype or leaf.key.slot not in self.fixed:
            return leaf.whole.to(dtype)
        return self.fixed[leaf.key.slot].role(leaf.key.role)[leaf.key.name]

    def _mean_gradient(self) -> dict[Role, dict[str, Tensor]]:
        out: dict[Role, dict[str, Tensor]] = {}
        for role, total in self.sums.items():
            own = self.by_role[role]
            parts = torch.split(total / max(1, self.steps), [math.prod(leaf.shape) for leaf in own])
            for leaf, part in zip(own, parts, strict=True):
                whole = leaf.put(part.view(leaf.shape), torch.zeros_like(leaf.whole))
                out.setdefault((leaf.key.slot, leaf.key.role), {})[leaf.key.name] = whole.cpu()
        return out

    def _optimizer(self) -> torch.optim.Optimizer:
        settings, scale, lr = self.settings, self.job.ask.lr_scale, self.settings.lr * self.job.lr_factor
        groups = [{"params": [flat], "lr": lr * scale.get(role, 1.0)} for role, flat in sorted(self.flats.items())]
        groups = groups or [{"params": [torch.zeros(0)]}]  # every rank masked: nothing to step
        if settings.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)


def batches(job: Job, settings: TrainConfig) -> Iterator[np.ndarray]:
    """Positions of each batch, epoch after epoch, every epoch a new order from the job's seed."""
    return islice(_epochs(job, settings.batch_size), steps_of(job.ask, len(job.data), settings))


def _epochs(job: Job, batch_size: int) -> Iterator[np.ndarray]:
    for epoch in count():
        order = seeds.generator(job.seed, "epoch", epoch).permutation(len(job.data))
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def penalty(term: Penalty, slot: Factors, values: Mapping[Key, Tensor]) -> Tensor:
    """TailNorm: weight * sum over modules of ||B[:, first:]||_F ||A[first:, :]||_F. ProductDecay: of ||B A||_F^2, by the trace of
    (B' B)(A A'), so that the product is never formed."""

    def of_module(m: str) -> Tensor:
        B, A = values.get(Key(term.slot, "B", m), slot.B[m]), values.get(Key(term.slot, "A", m), slot.A[m])
        if isinstance(term, ProductDecay):
            return ((B.mT @ B) * (A @ A.mT)).sum()
        product: Tensor = torch.linalg.norm(B[:, term.first :]) * torch.linalg.norm(A[term.first :])
        return product

    return term.weight * torch.stack([of_module(m) for m in slot.A]).sum()


def _trains(job: Job, pretrained: Tensors, params: Mapping[str, object]) -> dict[Key, Tensor]:
    """Where everything that trains starts from."""
    start: dict[Key, Tensor] = {}
    for slot, role in sorted(job.ask.roles):
        if slot == BASE:
            for name in job.ask.mask.get((BASE, "W"), params):
                value = pretrained[name]
                start[Key(BASE, "W", name)] = value + job.ask.full[name] if name in job.ask.full else value
        elif slot == GATE and isinstance(job.ask.gate, Router):
            start |= {Key(GATE, role, m): G for m, G in job.ask.gate.G.items()}
        else:
            start |= {Key(slot, role, m): x for m, x in job.ask.slots[slot].role(role).items()}
    return start | {Key(BASE, "head", name): x for name, x in job.head.items()}


def _masks(ask: Train) -> dict[Key, Tensor]:
    return {Key(slot, role, name): mask for (slot, role), own in ask.mask.items() for name, mask in own.items()}


def _leaf(key: Key, whole: Tensor, mask: Tensor | None) -> Leaf:
    """A mask along one axis chooses what of the leaf there is at all; any other works on its gradient."""
    axis = _axis(mask, whole)
    if mask is None or axis is None:
        return Leaf(key, whole)
    return Leaf(key, whole, axis, mask.flatten().nonzero().flatten().to(whole.device))


def _axis(mask: Tensor | None, whole: Tensor) -> int | None:
    """The axis of `whole` along which a mask chooses; None where it is no such mask."""
    if mask is None:
        return None
    shape = (1,) * (whole.ndim - mask.ndim) + tuple(mask.shape)
    wide = [i for i, size in enumerate(shape) if size > 1]
    return wide[0] if len(wide) == 1 and shape[wide[0]] == whole.shape[wide[0]] and whole.ndim > 1 else None


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in parts]).detach()


def _flat_mask(own: list[Leaf], masks: Mapping[Key, Tensor]) -> Tensor | None:
    """What of a flat vector may move, 1 or 0 by entry; None where all of it may."""
    if all(leaf.chosen is not None or leaf.key not in masks for leaf in own):
        return None
    one = torch.ones((), dtype=own[0].whole.dtype)
    parts = [one if leaf.chosen is not None else masks.get(leaf.key, one) for leaf in own]
    return _flat([mask.to(leaf.whole).expand_as(leaf.whole) for leaf, mask in zip(own, parts, strict=True)])


def _each_role(slot: Factors, f: Callable[[str, str, Tensor], Tensor]) -> Factors:
    """The slot with every tensor x of role and module replaced by f(role, module, x)."""
    for role in ROLES:
        slot = slot.with_role(role, {m: f(role, m, x) for m, x in slot.role(role).items()})
    return slot


def on_device(slots: Slots, device: torch.device, dtype: torch.dtype) -> dict[str, Factors]:
    """Slots as a forward pass without training uses them."""
    return {s: _each_role(f, lambda role, m, x: x.to(device, dtype)) for s, f in slots.items()}


def _there(device: torch.device, dtype: torch.dtype, but: Collection[Key], slot: str, role: str, m: str, x: Tensor) -> Tensor:
    return x if Key(slot, role, m) in but else x.to(device, dtype)


def _value_or(values: Mapping[Key, Tensor], slot: str, role: str, m: str, x: Tensor) -> Tensor:
    return values.get(Key(slot, role, m), x)


def _after(done: Mapping[Key, Tensor], slot: str, before: Factors, roles: Collection[Role]) -> Factors:
    """A slot with what was trained of it in its place; roles that trained are flat."""
    for role in (role for role in ROLES if (slot, role) in roles):
        own = before.role(role)
        before = before.with_role(role, flat({m: _trained_or_as_it_was(done, slot, role, m, x) for m, x in own.items()}))
    return before


def _with_trained_router(gate: Gate | None, done: Mapping[Key, Tensor]) -> Gate | None:
    if not isinstance(gate, Router):
        return gate
    return replace(gate, G={m: _trained_or_as_it_was(done, GATE, "G", m, G) for m, G in gate.G.items()})


def _trained_or_as_it_was(done: Mapping[Key, Tensor], slot: str, role: str, m: str, x: Tensor) -> Tensor:
    key = Key(slot, role, m)
    return done[key].to(x) if key in done else x
