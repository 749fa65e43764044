"""FedEx-LoRA (2410.09432). Modules: q (12, 8) and up (20, 12)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import dense, federate, make_clients, make_setup

from fedlora.methods import make
from fedlora.methods.fedex_lora import FedExLoRA, State, Up
from fedlora.types import Factors, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}


def world(K: int, r: int):
    """A state in the middle of a run, random replies, and the clients' factors in numpy."""
    setup = make_setup(make_clients((r,) * K, (10, 30, 60)))
    rng = np.random.default_rng(0)

    def random():
        return {m: rng.normal(size=(r, i)) for m, (_, i) in SHAPES.items()}, {
            m: rng.normal(size=(o, r)) for m, (o, _) in SHAPES.items()
        }

    A0, B0 = random()
    state = State(Factors({m: torch.tensor(x) for m, x in A0.items()}, {m: torch.tensor(x) for m, x in B0.items()}, 4.0 / r))
    own, replies = [], []
    for client in setup.clients:
        dA, dB = random()
        own.append(({m: A0[m] + dA[m] for m in SHAPES}, {m: B0[m] + dB[m] for m in SHAPES}))
        replies.append(Reply(client, Up({m: torch.tensor(x) for m, x in dA.items()}, {m: torch.tensor(x) for m, x in dB.items()})))
    return setup, state, replies, own


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("K, r", [(1, 2), (2, 1), (3, 2), (6, 3)])
def test_base_and_factors_together_are_the_mean_of_the_products(K, r, uniform):
    """Also the defect of the public code: a transposed residual would not even have the shape of these modules."""
    setup, state, replies, own = world(K, r)
    after, _ = FedExLoRA(uniform_weights=uniform).aggregate(state, iter(replies), 1)
    p = np.array([1.0 if uniform else reply.client.num_examples for reply in replies])
    p = p / p.sum()
    got, base = dense(FedExLoRA().deploy(after), setup), dense(replace(FedExLoRA().deploy(after), slots={}), setup)
    for m in SHAPES:
        want = 4.0 / r * sum(w * B[m] @ A[m] for w, (A, B) in zip(p, own, strict=True))
        np.testing.assert_allclose(got[f"{m}.weight"], want, rtol=0, atol=1e-11)
        np.testing.assert_allclose(after.shared.A[m].numpy(), sum(w * A[m] for w, (A, _) in zip(p, own, strict=True)), atol=1e-12)
        np.testing.assert_allclose(after.shared.B[m].numpy(), sum(w * B[m] for w, (_, B) in zip(p, own, strict=True)), atol=1e-12)
        assert np.linalg.matrix_rank(base[f"{m}.weight"], tol=1e-9) == min((K - 1) * r, *SHAPES[m])


def test_the_residual_travels_with_K_minus_1_blocks_and_no_more_than_the_smaller_side():
    for K, r, widths in ((3, 1, {"q": 2, "up": 2}), (1, 2, {"q": 0, "up": 0})):
        _, state, replies, _ = world(K, r)
        after, _ = FedExLoRA().aggregate(state, iter(replies), 1)
        (pair,) = after.merged.pairs
        assert {m: len(A) for m, A in pair.A.items()} == widths
    _, state, replies, _ = world(6, 3)  # fifteen ranks: the dense matrices are smaller
    after, _ = FedExLoRA().aggregate(state, iter(replies), 1)
    assert not after.merged.pairs and {m: x.shape for m, x in after.merged.total.items()} == SHAPES


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_residual_leaves_the_tail_of_its_singular_values(rank):
    setup, state, replies, own = world(4, 2)
    method = FedExLoRA(residual_rank=rank)
    after, _ = method.aggregate(state, iter(replies), 1)
    got = dense(method.deploy(after), setup)
    for m in SHAPES:
        A, B = np.mean([a[m] for a, _ in own], axis=0), np.mean([b[m] for _, b in own], axis=0)
        exact = np.mean([b[m] @ a[m] for a, b in own], axis=0)
        tail = np.linalg.svd(exact - B @ A, compute_uv=False)[rank:]
        assert len(after.merged.pairs[0].A[m]) == rank
        np.testing.assert_allclose(np.linalg.norm(2.0 * exact - got[f"{m}.weight"]), 2.0 * np.linalg.norm(tail), rtol=1e-9)


def test_clients_go_on_from_the_averaged_factors_and_the_base_that_they_miss():
    setup = make_setup(make_clients((1,) * 4))
    run = federate(FedExLoRA(), setup, 3, lambda t: setup.clients[: 4 if t == 3 else 2])
    for order, _ in run.rounds[3]:
        assert order.down.shared is run.states[2].shared
        assert (order.down.base.since, order.down.base.version) == ((1 if order.client.id < 2 else 0), 2)
    assert run.states[3].merged.seen == dict.fromkeys(range(4), 2)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="residual_rank"):
        make("fedex-lora", {"residual_rank": 0})
