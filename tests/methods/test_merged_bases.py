"""Sixty rounds of the methods that merge into the base, with clients that skip, against the papers' equations in float64 and dense.

Half of eight clients are drawn anew for every round; in the last one all are there. Modules: q (12, 8) and up (20, 12): 336 numbers
as matrices, 52 a rank as pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, distance, federate, make_clients, make_setup

from fedlora.methods import make
from fedlora.types import BaseUpdate, Client

ROUNDS, WHOLE, PER_RANK = 60, 336, 52
MIXED = (1, 2, 4, 2, 1, 1, 3, 2)
Dense = dict[str, np.ndarray]


@dataclass(frozen=True)
class After:
    """What there is after a round: what was merged into every base, the weights of the deployed model, both as changes from the
    pre-trained ones, and how many numbers the round's pair has, where it merged."""

    base: Dense
    model: Dense
    size: int = 0


def zeros() -> Dense:
    return {m: np.zeros(shape) for m, shape in SHAPES.items()}


def shares(exchanged, uniform: bool) -> np.ndarray:
    n = np.array([1.0 if uniform else reply.client.num_examples for _, reply in exchanged])
    return n / n.sum()


def pair_size(rank: int) -> int:
    return sum(min(rank, d_out, d_in) * (d_out + d_in) for d_out, d_in in SHAPES.values())


def flora(setup, run) -> Iterator[After]:
    """W <- W + sum_k w_k s_k B_k A_k."""
    base = zeros()
    for exchanged in run:
        w = shares(exchanged, False)
        for m in SHAPES:
            products = [4.0 / r.client.rank * r.up.B[m].numpy() @ r.up.A[m].numpy() for _, r in exchanged]
            base[m] = base[m] + np.tensordot(w, products, 1)
        yield After(dict(base), dict(base), pair_size(sum(r.client.rank for _, r in exchanged)))


def fedex(setup, run) -> Iterator[After]:
    """A, B <- uniform means; W <- W + s (mean_k B_k A_k - B A)."""
    start, s = setup.fresh(2), 4.0 / 2
    A, B, base = {m: x.numpy() for m, x in start.A.items()}, {m: x.numpy() for m, x in start.B.items()}, zeros()
    for exchanged in run:
        for m in SHAPES:
            As = [A[m] + r.up.A[m].numpy() for _, r in exchanged]
            Bs = [B[m] + r.up.B[m].numpy() for _, r in exchanged]
            A[m], B[m] = np.mean(As, axis=0), np.mean(Bs, axis=0)
            base[m] = base[m] + s * (np.mean([b @ a for b, a in zip(Bs, As, strict=True)], axis=0) - B[m] @ A[m])
        yield After(dict(base), {m: base[m] + s * B[m] @ A[m] for m in SHAPES}, pair_size(2 * (len(exchanged) - 1)))


def frlora(setup, run) -> Iterator[After]:
    """W <- W - s B_0 A_0 at the start, of the principal factors; then W <- W + s (B A - B_0 A_0) with the uniform means."""
    start, s = make("frlora", {}).hold(setup, setup.clients[0]), 4.0 / 2
    principal, base = {}, {}
    for m in SHAPES:
        U, S, Vt = np.linalg.svd(setup.base(m).numpy(), full_matrices=False)
        principal[m] = (U[:, :2] * S[:2]) @ Vt[:2]
        np.testing.assert_allclose(s * start.B[m].numpy() @ start.A[m].numpy(), principal[m], atol=1e-12)
        base[m] = -principal[m]
    for exchanged in run:
        for m in SHAPES:
            A = start.A[m].numpy() + np.mean([r.up.A[m].numpy() for _, r in exchanged], axis=0)
            B = start.B[m].numpy() + np.mean([r.up.B[m].numpy() for _, r in exchanged], axis=0)
            base[m] = base[m] + s * B @ A - principal[m]
        yield After(dict(base), {m: base[m] + principal[m] for m in SHAPES}, pair_size(2))


def loru(setup, run, states=()) -> Iterator[After]:
    """A <- A + sum_k w_k P dQ_k, B <- B + sum_k w_k dL_k P^+, where P is 1 for who holds every rank; every second round
    W <- W + s B A, B is zero, and A is what the state drew."""
    rank = max(c.rank for c in setup.clients)
    start, s = setup.fresh(rank), 4.0 / rank
    A, B, base = {m: x.numpy() for m, x in start.A.items()}, {m: x.numpy() for m, x in start.B.items()}, zeros()
    for t, exchanged in enumerate(run, 1):
        w, merges = shares(exchanged, False), t % 2 == 0
        for m in SHAPES:
            dA, dB = [], []
            for order, reply in exchanged:
                P = np.eye(rank)
                if reply.client.rank < rank:  # P = A Q', since the rows of Q are orthonormal and lie in those of A
                    L, Q = (x[m].numpy() for x in (order.down.inner.B, order.down.inner.A))
                    U, S, Vt = np.linalg.svd(B[m] @ A[m])
                    k = reply.client.rank
                    np.testing.assert_allclose(L @ Q, (U[:, :k] * S[:k]) @ Vt[:k], atol=1e-9)
                    P = A[m] @ Q.T
                dA.append(P @ reply.up.A[m].numpy())
                dB.append(reply.up.B[m].numpy() @ np.linalg.pinv(P))
            A[m], B[m] = A[m] + np.tensordot(w, dA, 1), B[m] + np.tensordot(w, dB, 1)
        model = {m: base[m] + s * B[m] @ A[m] for m in SHAPES}
        if merges:
            base = model
            A, B = {m: x.numpy() for m, x in states[t].shared.A.items()}, {m: np.zeros_like(x) for m, x in B.items()}
        yield After(dict(base), model, pair_size(rank) if merges else 0)


CASES = {
    "flora": (flora, (1, 2, 1, 1, 1, 1, 1, 1), {}),  # five ranks a round at most, which fit
    "fedex-lora": (fedex, (2,) * 8, {}),
    "frlora": (frlora, (2,) * 8, {}),
    "fedloru": (loru, (4,) * 8, {"period": 2}),
    "pfedloru": (loru, (4,) * 8, {"period": 2}),
    "mfedloru": (loru, MIXED, {"period": 2}),
}


def present(setup, t: int) -> list[Client]:
    drawn = np.random.default_rng(t).choice(len(setup.clients), len(setup.clients) // 2, replace=False)
    return [c for c in setup.clients if t == ROUNDS or c.id in drawn]


def sent(update: BaseUpdate) -> int:
    """How many numbers an update holds."""
    tensors = [x for pair in update.pairs for x in (*pair.A.values(), *pair.B.values())] or list(update.dense.values())
    return sum(x.numel() for x in tensors)


@pytest.mark.parametrize("name", CASES)
def test_a_long_run_with_clients_that_skip(name):
    oracle, ranks, settings = CASES[name]
    method, setup = make(name, settings), make_setup(make_clients(ranks), rounds=ROUNDS, epochs=1)
    trainer, server = Trainer(setup, lr=0.05, steps_per_epoch=1), Client(99, 1, 1)
    run = federate(method, setup, 0)
    states, held, exchanged, bases = [run.states[0]], run.held[0], [], []
    for t in range(1, ROUNDS + 1):
        run = federate(method, setup, t, lambda t: present(setup, t), trainer, resume=(t - 1, states[-1], held))
        trainer.base.pop(server.id, None)
        trainer.fold(server, method.deploy(states[-1]).base)
        whole = trainer.merged.pop(server.id)
        for order, _ in run.rounds[-1]:  # every base has the bits of the server's when its client trains
            assert all(torch.equal(trainer.merged[order.client.id][m], whole[m]) for m in SHAPES)
        bases.append({m: x.numpy() for m, x in whole.items()})
        states, held, exchanged = [*states, run.states[-1]], run.held[-1], [*exchanged, run.rounds[-1]]
    after = list(oracle(setup, exchanged, states) if oracle is loru else oracle(setup, exchanged))

    for t, expected in enumerate(after, 1):
        assert t == ROUNDS or distance(bases[t], expected.base) < 1e-9
        deployed = dense(method.deploy(states[t]), setup)
        assert distance(expected.model, {m: deployed[f"{m}.weight"] for m in SHAPES}) < 1e-9
    assert 0.1 < max(np.abs(x).max() for x in after[-1].model.values()) < 10

    last, many, caught_up = dict.fromkeys(setup.ranks, 1), 0, 0
    for t, orders in enumerate(exchanged, 1):
        for order, _ in orders:
            missed = sum(expected.size for expected in after[last[order.client.id] - 1 : t - 1])
            assert sent(order.down.base) == min(missed, WHOLE), f"round {t}, client {order.client.id}"
            last[order.client.id] = t
            many, caught_up = many + (missed > WHOLE), caught_up + (0 < missed <= WHOLE and t > ROUNDS / 2)
    assert many > 5 and caught_up > 5  # the run is long enough for both
