"""The toy world itself, since every law leans on it; its oracle is numpy."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, distance, federate, make_clients, make_setup, same, through

from fedlora.types import (
    BASE,
    FULL,
    SHARED,
    BaseUpdate,
    Client,
    Factors,
    Facts,
    Model,
    Reply,
    Setup,
    TailNorm,
    Tensors,
    Train,
    value,
)


def slots_of(setup: Setup) -> dict[str, Factors]:
    """Two slots with every role: C full in one, a diagonal in the other; D per output, and one number."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> dict[str, torch.Tensor]:
        return {m: torch.tensor(rng.normal(size=[{-1: o, -2: i}.get(n, n) for n in shape]) / 2) for m, (o, i) in SHAPES.items()}

    return {
        SHARED: Factors(draw(3, -2), draw(-1, 3), 0.5, draw(3, 3), draw(-1)),
        "personal": Factors(draw(2, -2), draw(-1, 2), 2.0, draw(2), draw(1)),
    }


def numpy_loss(trainer: Trainer, client: Client, model: Model) -> float:
    change, loss = dense(model, trainer.setup), 0.0
    for m, (X, Y) in trainer.data[client.id].items():
        W = trainer.pretrained[m].numpy() + change[f"{m}.weight"]
        loss += ((X.numpy() @ W.T + change[f"{m}.bias"] - Y.numpy()) ** 2).sum() / len(X)
    return loss


@pytest.fixture
def trainer():
    return Trainer(make_setup(make_clients((2, 2))))


ROLES = [(slot, role) for slot in (SHARED, "personal") for role in "ABCD"]


@pytest.mark.parametrize("role", [*ROLES, (BASE, "W")], ids=str)
def test_one_step_follows_the_numerical_gradient_of_the_dense_loss_and_moves_that_role_alone(trainer, role):
    client, slots = trainer.setup.clients[0], slots_of(trainer.setup)
    done = trainer(client, Train(slots, frozenset({role}), max_steps=1, lr_scale={role[1]: 0.1}, want_grad=True))
    assert done.num_steps == 1
    np.testing.assert_allclose(done.loss, numpy_loss(trainer, client, Model(slots)), rtol=1e-12)
    after = {r: getattr(done.slots[r[0]], r[1]) for r in ROLES} | {(BASE, "W"): done.full}
    before = {r: getattr(slots[r[0]], r[1]) for r in ROLES} | {
        (BASE, "W"): {n: torch.zeros(s).double() for n, s in trainer.setup.params.items()}
    }
    for r in ROLES:
        assert same(after[r], before[r]) == (r != role)
    for name, x in before[role].items():
        step = torch.zeros_like(x)
        step.view(-1)[-1] = 1e-6
        moved = {**before[role], name: x + step}
        model = (
            Model(slots, full=moved) if {role} == FULL else Model({**slots, role[0]: replace(slots[role[0]], **{role[1]: moved})})
        )
        numerical = (numpy_loss(trainer, client, model) - numpy_loss(trainer, client, Model(slots))) / 1e-6
        gradient = done.grad[role][name].reshape(-1)[-1].item()
        np.testing.assert_allclose(gradient, numerical, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after[role][name], x - 0.1 * trainer.lr * done.grad[role][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_mask_keeps_the_rest_bit_for_bit(optimizer):
    trainer = Trainer(make_setup(make_clients((2, 2))), optimizer=optimizer)
    slots = slots_of(trainer.setup)
    mask = {(SHARED, "B"): {m: torch.tensor([1.0, 0.0, 1.0]) for m in SHAPES}}
    done = trainer(trainer.setup.clients[0], Train(slots, frozenset({(SHARED, "B")}), mask=mask))
    for m in SHAPES:
        moved = (done.slots[SHARED].B[m] != slots[SHARED].B[m]).numpy()
        assert moved[:, [0, 2]].all() and not moved[:, 1].any()


def test_the_penalty_shrinks_the_tail(trainer):
    start = slots_of(trainer.setup)[SHARED]
    tails = []
    for weight in (0.0, 30.0):
        ask = Train({SHARED: start}, frozenset({(SHARED, "A"), (SHARED, "B")}), penalty=TailNorm(SHARED, 2, weight))
        done = trainer(trainer.setup.clients[0], ask).slots[SHARED]
        tails.append(sum(float(done.B[m][:, 2:].norm() * done.A[m][2:].norm()) for m in SHAPES))
    assert tails[1] < tails[0] / 2


def test_base_updates_fold_once_in_pairs_or_dense(trainer):
    one, two = trainer.setup.clients
    pairs = tuple(slots_of(trainer.setup).values())
    whole = {m: torch.tensor(dense(Model(base=BaseUpdate(0, 2, pairs)), trainer.setup)[f"{m}.weight"]) for m in SHAPES}
    trainer.fold(one, BaseUpdate(0, 1, pairs[:1]))
    for update in (BaseUpdate(0, 2, pairs), BaseUpdate(1, 2, pairs[1:]), BaseUpdate(0, 2, dense=whole)):
        W = trainer.fold(one, update)
        for m in SHAPES:
            torch.testing.assert_close(W[m], trainer.pretrained[m] + whole[m], rtol=0, atol=1e-12)
    assert all(torch.equal(trainer.fold(two, BaseUpdate(0, 2, dense=whole))[m], trainer.pretrained[m] + whole[m]) for m in SHAPES)
    with pytest.raises(AssertionError, match="base is at version 2, the update starts at 3"):
        trainer.fold(two, BaseUpdate(3, 4, pairs[:1]))
    x = torch.eye(8, dtype=torch.float64)
    f = pairs[0]
    torch.testing.assert_close(
        through(x, f.A["q"], f.B["q"], f.C["q"], f.D["q"], f.scale).T,
        torch.tensor(dense(Model({"s": f}), trainer.setup)["q.weight"]),
    )


# ---- a method of stacks, to play base updates from end to end -----------------------------------------------------------------


@dataclass(frozen=True)
class Up:
    A: Tensors = value("rank", "in")
    B: Tensors = value("out", "rank")


@dataclass(frozen=True)
class Down:
    base: BaseUpdate


@dataclass(frozen=True)
class State:
    log: tuple[Factors, ...] = ()
    seen: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """FLoRA in short: the clients' factors are stacked and folded into the base; adapters start afresh."""

    FACTS = Facts("Stack", "", 2024, True, True, False, "", "", "")

    def init(self, setup: Setup) -> State:
        return State()

    def hold(self, setup: Setup, client: Client) -> Factors:
        return setup.fresh(client.rank)

    def send(self, state: State, client: Client, round: int, since: int | None = None) -> Down:
        since = state.seen.get(client.id, 0)
        return Down(BaseUpdate(since, len(state.log), state.log[since:]))

    def local(self, down: Down, held: Factors, client: Client, round: int) -> Any:
        done = (yield Train({SHARED: held}, frozenset({(SHARED, "A"), (SHARED, "B")}), base=down.base)).slots[SHARED]
        return Up(done.A, done.B), held

    def aggregate(self, state: State, replies: Iterator[Reply], round: int) -> tuple[State, dict[str, Any]]:
        got = list(replies)
        n = sum(r.client.num_examples for r in got)
        A = {m: torch.cat([r.client.num_examples / n * 4.0 / r.client.rank * r.up.A[m] for r in got]) for m in SHAPES}
        B = {m: torch.cat([r.up.B[m] for r in got], dim=1) for m in SHAPES}
        seen = {**state.seen, **{r.client.id: len(state.log) for r in got}}
        return State((*state.log, Factors(A, B, 1.0)), seen), {}

    def deploy(self, state: State) -> Model:
        return Model(base=BaseUpdate(0, len(state.log), state.log))


def test_base_updates_reach_clients_that_skip_rounds_and_runs_that_resume():
    setup = make_setup(make_clients((1, 2, 4, 2)))
    trainer = Trainer(setup)
    run = federate(Stack(), setup, 4, lambda t: setup.clients if t in (1, 4) else setup.clients[:2], trainer)
    bases = [W for _, W in trainer.base.values()]
    assert all(version == 3 for version, _ in trainer.base.values())
    assert all(same(W, bases[0]) for W in bases)
    change = {f"{m}.weight": (bases[0][m] - trainer.pretrained[m]).numpy() for m in SHAPES}
    assert distance(change, dense(Stack().deploy(run.states[3]), setup)) < 1e-12
    rest = federate(Stack(), setup, 4, resume=(3, run.states[3], run.held[3]))
    assert same(rest.states[-1], run.states[-1])
