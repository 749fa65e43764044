"""A tiny federation without models: every module is one linear map, fitted to its client's data by least squares.

It trains all that a `Train` can ask for, written plainly, so that a method can be played from end to end in milliseconds. Nothing
of fedlora's own training or server is used, but for `refuse`. The oracles at the end are numpy, dense and in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora import seeds
from fedlora.algebra.tensors import Flat
from fedlora.check import refuse, unasked
from fedlora.messages import TrainAsk
from fedlora.types import (
    BASE,
    GATE,
    BaseUpdate,
    ByDomain,
    Client,
    Factors,
    Features,
    Gate,
    Masks,
    Mix,
    Model,
    Observe,
    Observed,
    Penalty,
    ProductDecay,
    Reply,
    Router,
    Setup,
    Similarity,
    Statistic,
    Train,
    Trained,
    own_model,
)

SHAPES = {"q": (12, 8), "up": (20, 12)}  # never square: a transposed update must not pass


# ---- the world -----------------------------------------------------------------------------------------------------------


def make_clients(
    ranks: Sequence[int], examples: Sequence[int] = (10, 40, 20, 30), tasks: Sequence[Sequence[str]] = ()
) -> list[Client]:
    """`tasks` are those of each client in turn: its examples, ten times as many so that tasks can be told apart, are dealt to them
    evenly, the last one taking what is left over."""

    def dealt(count: int, names: Sequence[str]) -> dict[str, int]:
        each = count // max(1, len(names))
        return {name: each if name != names[-1] else count - each * (len(names) - 1) for name in names}

    sizes = [examples[i % len(examples)] * (10 if tasks else 1) for i in range(len(ranks))]
    names = [tasks[i % len(tasks)] if tasks else () for i in range(len(ranks))]
    return [Client(i, r, n, dealt(n, t)) for i, (r, n, t) in enumerate(zip(ranks, sizes, names, strict=True))]


def make_setup(
    clients: Sequence[Client],
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    seed: int = 0,
    rounds: int = 4,
    epochs: int = 2,
    dtype: torch.dtype = torch.float64,
    lora_alpha: float = 4.0,
) -> Setup:
    def draw(low_high: float, shape: tuple[int, ...], *purpose: str | int) -> Tensor:
        return torch.tensor(seeds.generator(seed, *purpose).uniform(-low_high, low_high, shape), dtype=dtype)

    def fresh(rank: int) -> Factors:
        A = {m: draw(d_in**-0.5, (rank, d_in), "adapter", m) for m, (_, d_in) in shapes.items()}
        B = {m: torch.zeros(d_out, rank, dtype=dtype) for m, (d_out, _) in shapes.items()}
        return Factors(A, B, setup.scaling(rank))

    setup = Setup(
        shapes=dict(shapes),
        params={name: shape for m, (o, i) in shapes.items() for name, shape in ((f"{m}.weight", (o, i)), (f"{m}.bias", (o,)))},
        clients=tuple(clients),
        rounds=rounds,
        epochs=epochs,
        seed=seed,
        lora_alpha=lora_alpha,
        rslora=False,
        fresh=fresh,
        base=lambda m: draw(0.25, shapes[m], "base", m),  # small, as pre-trained weights are: FRLoRA's start has its size
        dtype=dtype,
    )
    return setup


Data = Mapping[str, tuple[Tensor, Tensor]]  # module -> X (n, d_in), Y (n, d_out)


def make_data(setup: Setup, client: Client, dtype: torch.dtype) -> Data:
    """Targets of the pre-trained map plus a change: one half common to all clients, one half the client's own. With several
    tasks, whose examples follow each other, the first half is common to a task, and there is little of the other."""
    data = {}
    for m, (d_out, d_in) in setup.shapes.items():
        common = seeds.generator(setup.seed, "common", m).normal(size=(d_out, d_in)) / d_in**0.5
        rng = seeds.generator(setup.seed, "data", m, client.id)
        own, X = rng.normal(size=(d_out, d_in)) / d_in**0.5, rng.normal(size=(client.num_examples, d_in))
        Y = X @ (setup.base(m).double().numpy() + common + own).T + 0.3 * rng.normal(size=d_out)
        for task, where in rows_of(client).items():
            change = 2 * seeds.generator(setup.seed, "common", m, task).normal(size=(d_out, d_in)) / d_in**0.5 + 0.05 * own
            Y[where] = X[where] @ (setup.base(m).double().numpy() + change).T
        data[m] = torch.tensor(X, dtype=dtype), torch.tensor(Y, dtype=dtype)
    return data


def rows_of(client: Client) -> dict[str, slice]:
    """Which of its examples are of which task."""
    ends = np.cumsum([0, *client.domains.values()])
    return {task: slice(int(a), int(b)) for task, a, b in zip(client.domains, ends, ends[1:], strict=False)}


def weigh(gate: Gate | None, slot: str) -> float:
    """What a slot counts; where that depends on the input, for an input most like the client's own."""
    if isinstance(gate, Similarity):
        return gate.cap if slot == gate.slot else 1.0 - gate.cap
    return gate.weights.get(slot, 1.0) if isinstance(gate, Mix) else 1.0


def look(X: Tensor, statistic: Statistic) -> dict[str, Tensor]:
    """A statistic of rows X (n, d), which are their own features: the first ones, or mixtures of two classes, told apart by the
    first column, whose parts are every k-th row."""
    if isinstance(statistic, Features):
        return {"features": X[: statistic.count]}
    k = statistic.components
    classes = [(label, rows) for label, rows in enumerate((X[X[:, 0] <= 0], X[X[:, 0] > 0])) if len(rows) > 1]
    parts = [[rows[i::k] for i in range(k)] for _, rows in classes]
    none = X.new_zeros(X.shape[1])

    def stacked(numbers: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([numbers(part) for by_part in parts for part in by_part] or [X.new_zeros(0)]).reshape(-1, k, *shape)

    return {
        "labels": torch.tensor([label for label, _ in classes], dtype=torch.int64),
        "counts": torch.tensor([len(rows) for _, rows in classes], dtype=torch.int64),
        "weights": torch.tensor([[len(p) / sum(map(len, by)) for p in by] for by in parts], dtype=X.dtype).reshape(-1, k),
        "means": stacked(lambda p: p.mean(dim=0) if len(p) else none, (X.shape[1],)),
        "variances": stacked(lambda p: p.var(dim=0, unbiased=False) if len(p) else none, (X.shape[1],)),
    }


def product(f: Factors, m: str) -> Tensor:
    """scale * D * B C A."""
    C, D = f.C.get(m), f.D.get(m)
    left = f.B[m] if C is None else f.B[m] * C if C.ndim == 1 else f.B[m] @ C
    change = f.scale * (left @ f.A[m])
    return change if D is None else change * D[:, None]


# ---- the trainer ---------------------------------------------------------------------------------------------------------


def through(x: Tensor, A: Tensor, B: Tensor, C: Tensor | None, D: Tensor | None, scale: float) -> Tensor:
    """scale * D * (B C A x), for rows of x."""
    h = x @ A.T
    if C is not None:
        h = h * C if C.ndim == 1 else h @ C.T
    y = h @ B.T
    return scale * (y if D is None else y * D)


def routed(x: Tensor, G: Tensor, own: Tensor, others: Sequence[Tensor], renormalise: bool) -> Tensor:
    """FedLEASE's mixture for rows of x, from the outputs (n, d_out) of the experts: 2M - 1 places, the M most probable answer."""
    M = len(others) + 1
    p = torch.softmax(x @ G.T, dim=1)
    least = p.topk(M, dim=1).values[:, -1:]
    g = torch.where(p >= least, p, 0.0)
    places = torch.stack([own] * M + list(others), dim=1)
    return torch.einsum("np,npo->no", g / g.sum(dim=1, keepdim=True) if renormalise else g, places)


@dataclass
class Trainer:
    """Trains a client's requests, each from a fresh optimiser, and remembers them all in `log`, and what it was asked to look at in
    `looked`. Full batches."""

    setup: Setup
    lr: float = 0.02
    optimizer: str = "sgd"
    steps_per_epoch: int = 2
    weight_decay: float = 0.01  # of AdamW
    log: list[tuple[Client, Train, Trained]] = field(default_factory=list)
    looked: list[Observe] = field(default_factory=list)
    base: dict[int, tuple[int, dict[str, Tensor]]] = field(default_factory=dict)  # client -> version of its base, and the base
    merged: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # client -> all its base took up, summed apart from it

    def __post_init__(self) -> None:
        self.pretrained = {m: self.setup.base(m) for m in self.setup.shapes}
        self.dtype = next(iter(self.pretrained.values())).dtype
        self.data = {c.id: make_data(self.setup, c, self.dtype) for c in self.setup.clients}

    def fold(self, client: Client, update: BaseUpdate) -> dict[str, Tensor]:
        """The client's base, brought to the version of the update."""
        version, W = self.base.get(client.id, (0, self.pretrained))
        merged = self.merged.get(client.id, {m: torch.zeros_like(x) for m, x in W.items()})
        assert version >= update.since, f"base is at version {version}, the update starts at {update.since}"
        if version < update.version and update.dense:
            merged = dict(update.dense)
        elif version < update.version:
            assert len(update.pairs) == update.version - update.since
            for pair in update.pairs[version - update.since :]:
                merged = {m: merged[m] + product(pair, m) for m in merged}
        W = {m: self.pretrained[m] + merged[m] for m in merged}
        self.base[client.id], self.merged[client.id] = (max(version, update.version), W), merged
        return W

    def __call__(self, client: Client, ask: Train | Observe) -> Trained | Observed:
        if isinstance(ask, Observe):
            self.looked.append(ask)
            X, _ = self.data[client.id]["q"]
            return Observed(look(X[rows_of(client)[ask.data]] if ask.data else X, ask.statistic))
        W, data = self.fold(client, ask.base), self.data[client.id]
        if ask.drop_base:
            W = self.merged[client.id]
        if ask.data:
            data = {m: (X[rows_of(client)[ask.data]], Y[rows_of(client)[ask.data]]) for m, (X, Y) in data.items()}
        start = {(s, role, m): x for s, f in ask.slots.items() for role in "ABCD" for m, x in getattr(f, role).items()}
        if ask.full or any(slot == BASE for slot, _ in ask.roles):
            zeros = {n: torch.zeros(shape, dtype=self.dtype) for n, shape in self.setup.params.items()}
            masked = ask.mask.get((BASE, "W"), zeros)  # what no mask names does not train
            start |= {(BASE, "W", n): x for n, x in (zeros | dict(ask.full)).items() if n in masked}
        start |= {(GATE, "G", m): G for m, G in ask.gate.G.items()} if isinstance(ask.gate, Router) else {}
        assert ask.roles <= {k[:2] for k in start}, "a role to train that no slot has"
        live = {k: x.detach().clone().requires_grad_(k[:2] in ask.roles) for k, x in start.items()}
        moving = {k: x for k, x in live.items() if x.requires_grad}
        may = {
            k: ask.mask[k[:2]][k[2]].bool().expand_as(x) if k[:2] in ask.mask else torch.ones_like(x).bool()
            for k, x in moving.items()
        }
        rate = {k: self.lr * ask.lr_scale.get(k[1], 1.0) for k in moving}
        groups = [{"params": [x], "lr": rate[k]} for k, x in moving.items()]
        adamw = torch.optim.AdamW(groups, weight_decay=self.weight_decay) if self.optimizer == "adamw" else None
        steps = self.steps_per_epoch * (self.setup.epochs if ask.epochs is None else ask.epochs)
        steps = steps if ask.max_steps is None else min(steps, ask.max_steps)
        total, grads = 0.0, {k: torch.zeros_like(x) for k, x in moving.items()}
        for _ in range(steps):
            loss = self._loss(W, data, live, ask)
            total += loss.item()
            gradients = torch.autograd.grad(loss + _penalty(live, ask.penalty), list(moving.values()))
            for (k, x), g in zip(moving.items(), gradients, strict=True):
                x.grad = torch.where(may[k], g, 0.0)
                grads[k] += x.grad / steps
            if adamw:
                adamw.step()
            with torch.no_grad():
                for k, x in moving.items():
                    x.copy_(torch.where(may[k], x if adamw else x - rate[k] * x.grad, start[k]))
        done = {k: live[k].detach() if k in moving else x for k, x in start.items()}
        slots = {s: replace(f, **{r: {m: done[s, r, m] for m in getattr(f, r)} for r in "ABCD"}) for s, f in ask.slots.items()}
        full = {n: x for (slot, _, n), x in done.items() if slot == BASE}
        grad: Masks = {role: {k[2]: g for k, g in grads.items() if k[:2] == role} for role in ask.roles} if ask.want_grad else {}
        gate = replace(ask.gate, G={m: done[GATE, "G", m] for m in ask.gate.G}) if isinstance(ask.gate, Router) else ask.gate
        trained = Trained(slots, total / max(steps, 1), steps, full, grad, gate)
        self.log.append((client, ask, trained))
        return trained

    def _loss(self, W: Mapping[str, Tensor], data: Data, live: Mapping[tuple[str, str, str], Tensor], ask: Train) -> Tensor:
        loss = torch.zeros((), dtype=self.dtype)
        for m, (X, Y) in data.items():
            weight, bias = live.get((BASE, "W", f"{m}.weight")), live.get((BASE, "W", f"{m}.bias"))
            y = X @ (W[m] if weight is None else W[m] + weight).T + (0.0 if bias is None else bias)
            out = {s: through(X, *(live.get((s, role, m)) for role in "ABCD"), f.scale) for s, f in ask.slots.items()}
            if isinstance(ask.gate, Router):
                others = [out[s] for s in ask.gate.others]
                y = y + routed(X, live[GATE, "G", m], out[ask.gate.own], others, ask.gate.renormalise)
            else:
                y = y + sum(weigh(ask.gate, s) * each for s, each in out.items())
            loss = loss + (y - Y).square().sum() / len(X)
        return loss


def _penalty(live: Mapping[tuple[str, str, str], Tensor], penalty: Penalty | None) -> Tensor | float:
    if penalty is None:
        return 0.0
    modules = [m for s, role, m in live if (s, role) == (penalty.slot, "A")]
    if isinstance(penalty, ProductDecay):
        return penalty.weight * sum((live[penalty.slot, "B", m] @ live[penalty.slot, "A", m]).square().sum() for m in modules)
    q = penalty.first
    tails = [live[penalty.slot, "B", m][:, q:].norm() * live[penalty.slot, "A", m][q:].norm() for m in modules]
    return penalty.weight * torch.stack(tails).sum()


# ---- the rounds ----------------------------------------------------------------------------------------------------------


def top_up(trainer: Trainer, method: Any, state: Any, order: TrainAsk) -> None:
    """The server's log brings a client's base to where its order begins, after a restart."""
    if hasattr(order.down, "base") and trainer.base.get(order.client.id, (0,))[0] < order.down.base.since:
        trainer.fold(order.client, method.deploy(state).base)


def play(method: Any, trainer: Trainer, down: Any, held: Any, client: Client, round: int = 1) -> tuple[Any, Any]:
    """What one client's generator returns: (Up, held)."""
    g = method.local(down, held, client, round)
    try:
        ask = next(g)
        while True:
            ask = g.send(trainer(client, ask))
    except StopIteration as end:
        return end.value


def deployed(method: Any, state: Any, client: Client | None = None, held: Any = None, round: int = 1) -> Model:
    """The common model, or, with a client, the one that it ends with."""
    return method.deploy(state) if client is None else own_model(method, state, held, client, round)


@dataclass
class Run:
    """`states[t]` and `held[t]` are what there is after round t of this run; `rounds[t]` its (order, reply), from 1 on."""

    states: list[Any]
    held: list[dict[int, Any]]
    rounds: list[list[tuple[TrainAsk, Reply]]]
    refused: list[dict[int, str]]  # round -> client -> why


def federate(
    method: Any,
    setup: Setup,
    rounds: int,
    sample: Callable[[int], Sequence[Client]] | None = None,
    trainer: Trainer | None = None,
    tamper: Callable[[TrainAsk, Any], Any] = lambda order, up: up,
    carry: Callable[[Any], Any] = lambda message: message,
    resume: tuple[int, Any, dict[int, Any]] | None = None,
) -> Run:
    """Plays up to round `rounds`; `resume` is (rounds done, state, held). `tamper` changes uploads, `carry` is what messages and
    what clients keep go through on their way."""
    trainer = trainer or Trainer(setup)
    done, state, held = resume or (0, method.init(setup), {c.id: method.hold(setup, c) for c in setup.clients})
    run = Run([state], [held], [[]], [{}])
    for t in range(done + 1, rounds + 1):
        exchanged, now, why = [], dict(held), {}
        for client in sorted(sample(t) if sample else setup.clients, key=lambda c: c.id):
            order = TrainAsk(t, client, carry(method.send(state, client, t)))
            top_up(trainer, method, state, order)
            up, keep = play(method, trainer, order.down, held[client.id], client, t)
            up, keep = tamper(order, carry(up)), carry(keep)
            if problem := refuse(up, method, setup, client) or unasked(up, method, state, client, t):
                why[client.id] = problem
            else:
                now[client.id] = keep
                exchanged.append((order, Reply(client, up)))
        if exchanged:
            state, _ = method.aggregate(state, iter([reply for _, reply in exchanged]), t)
        held = now
        run.states.append(state)
        run.held.append(held)
        run.rounds.append(exchanged)
        run.refused.append(why)
    return run


# ---- looking at trees ----------------------------------------------------------------------------------------------------


def tensors(x: Any) -> list[Tensor]:
    """Every tensor in a tree, in order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        return [t for v in x.values() for t in tensors(v)]
    if is_dataclass(x):
        return [t for f in fields(x) for t in tensors(getattr(x, f.name))]
    return [t for v in x for t in tensors(v)] if isinstance(x, list | tuple) else []


def same(x: Any, y: Any) -> bool:
    """Whether two trees are equal in type, in order and in every bit; flat tensors are the same tensors."""
    x, y = (dict(z) if isinstance(z, Flat) else z for z in (x, y))
    if type(x) is not type(y):
        return False
    if isinstance(x, Tensor):
        return x.dtype == y.dtype and x.shape == y.shape and _bits(x) == _bits(y)
    if isinstance(x, Mapping):
        return list(x) == list(y) and all(same(x[k], y[k]) for k in x)
    if is_dataclass(x):
        return all(same(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, float):
        return np.float64(x).tobytes() == np.float64(y).tobytes()
    return x is y if isinstance(x, Enum) else bool(x == y)


def _bits(x: Tensor) -> bytes:
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).contiguous().numpy().tobytes()


# ---- dense oracles, in numpy and float64 -----------------------------------------------------------------------------------


def _np(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def dense_slot(f: Factors, m: str) -> np.ndarray:
    """scale * D * B C A of one module, entry by entry."""
    A, B = _np(f.A[m]), _np(f.B[m])
    C = _np(f.C[m]) if m in f.C else np.eye(A.shape[0])
    C = np.diag(C) if C.ndim == 1 else C
    D = _np(f.D[m]) if m in f.D else np.ones(1)
    return f.scale * D[:, None] * np.einsum("or,rs,si->oi", B, C, A)


def dense(model: Model, setup: Setup) -> dict[str, np.ndarray]:
    """Parameter -> how far a model is from the pre-trained one. Of a model with a router: by its own expert alone, and the
    router; of one with an adapter a task: the sum of all, and each; of one that weighs its slots: see `weigh`."""
    change = {name: np.zeros(shape) for name, shape in setup.params.items()}
    for m in setup.shapes:
        at = f"{m}.weight"
        change[at] = change[at] + (_np(model.base.dense[m]) if model.base.dense else 0.0)
        change[at] = change[at] - (_np(setup.base(m)) if model.drop_base else 0.0)
        if isinstance(model.gate, Router):
            change[f"{m}.router"] = _np(model.gate.G[m])
        if isinstance(model.gate, ByDomain):
            change |= {f"{m}.{task}": dense_slot(model.slots[slot], m) for task, slot in model.gate.slots.items()}
        for f in [] if model.base.dense else model.base.pairs:
            change[at] = change[at] + dense_slot(f, m)
        for s, f in model.slots.items():
            if not isinstance(model.gate, Router) or s == model.gate.own:
                change[at] = change[at] + weigh(model.gate, s) * dense_slot(f, m)
    for name, x in model.full.items():
        change[name] = change[name] + _np(x)
    return change


def weighted(weights: Sequence[float], changes: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """sum_k w_k x_k with the weights brought to sum 1."""
    return {n: sum(w * x[n] for w, x in zip(weights, changes, strict=True)) / sum(weights) for n in changes[0]}


def distance(x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> float:
    """The largest difference between two models."""
    return max(float(np.abs(x[n] - y[n]).max()) for n in x)
