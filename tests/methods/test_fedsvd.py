"""FedSVD (2505.12805). Modules: q (12, 8) and up (20, 12)."""

import numpy as np
import pytest
import torch
from toy import Trainer, dense_slot, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.fedsvd import FedSVD, State, Up
from fedlora.types import SHARED, Factors, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}


def world(rank: int = 3, **options):
    return make_setup(make_clients((rank,) * 4), **options)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_product_is_that_of_the_mean_and_A_is_orthonormal_by_falling_size(rank):
    setup = world(rank)
    run = federate(FedSVD(), setup, 4)
    for t in range(1, 5):
        before, after = run.states[t - 1].shared, run.states[t].shared
        n = [c.num_examples for c in setup.clients]
        for m in SHAPES:
            dB = sum(w * reply.up.B[m].numpy() for w, (_, reply) in zip(n, run.rounds[t], strict=True)) / sum(n)
            product = (before.B[m].numpy() + dB) @ before.A[m].numpy()
            np.testing.assert_allclose(after.B[m].numpy() @ after.A[m].numpy(), product, rtol=0, atol=1e-12)
            np.testing.assert_allclose((after.A[m] @ after.A[m].T).numpy(), np.eye(rank), rtol=0, atol=1e-12)
            S = np.linalg.svd(product, compute_uv=False)[:rank]
            np.testing.assert_allclose((after.B[m].T @ after.B[m]).numpy(), np.diag(S**2), rtol=0, atol=1e-12)


def test_clients_train_B_alone_from_the_factors_of_the_server():
    setup = world()
    trainer = Trainer(setup)
    run = federate(FedSVD(), setup, 3, lambda t: setup.clients[: 4 if t == 3 else 2], trainer)
    for t, asked in zip((1, 1, 2, 2, 3, 3, 3, 3), trainer.log, strict=True):
        assert asked[1].roles == {(SHARED, "B")}
        assert same(asked[1].slots[SHARED], run.states[t - 1].shared)


@pytest.mark.parametrize(
    "period, warmup, turns",
    [(1, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [2, 4, 6]), (1, 3, [4, 5, 6]), (3, 1, [3, 6]), (2, 3, [4, 6]), (0, 0, []), (0, 2, [])],
)
def test_when_A_turns_and_travels(period, warmup, turns):
    setup = world()
    run = federate(FedSVD(period, warmup), setup, 6)
    for t in range(1, 7):
        turned = not same(run.states[t].shared.A, run.states[t - 1].shared.A)
        assert turned == (t in turns)
        assert (run.states[t].turned == t) == turned
        if t < 6:
            assert all(bool(order.down.A) == turned for order, _ in run.rounds[t + 1])
    assert not any(order.down.A for order, _ in run.rounds[1])


def test_with_period_zero_it_is_ffa_lora():
    setup = world()
    one, two = federate(FedSVD(period=0), setup, 4), federate(make("ffa-lora", {}), setup, 4)
    assert all(same(x.shared, y) for x, y in zip(one.states, two.states, strict=True))
    assert not same(federate(FedSVD(), setup, 4).states[-1].shared, two.states[-1])


def test_a_client_that_was_away_gets_A_only_if_it_turned_since():
    """Period 2: A turns after rounds 2 and 4."""
    setup, method = world(), FedSVD(period=2)
    gone = {1: (0, 1, 2), 2: (0, 1), 3: (0, 3), 4: (0, 2), 5: (0, 1, 2, 3)}
    run = federate(method, setup, 5, lambda t: [setup.clients[k] for k in gone[t]])
    sent = {t: {order.client.id for order, _ in run.rounds[t] if order.down.A} for t in gone}
    assert sent == {1: set(), 2: set(), 3: {0, 3}, 4: {2}, 5: {0, 1, 2, 3}}


def test_a_module_that_learned_nothing_keeps_its_A():
    setup = world(2)
    state = FedSVD().init(setup)
    B = {"q": torch.zeros(12, 2, dtype=torch.float64), "up": torch.ones(20, 2, dtype=torch.float64)}
    after, _ = FedSVD().aggregate(state, iter([Reply(setup.clients[0], Up(B))]), 1)
    assert torch.equal(after.shared.A["q"], state.shared.A["q"]) and not torch.equal(after.shared.A["up"], state.shared.A["up"])
    nothing, _ = FedSVD().aggregate(state, iter([Reply(setup.clients[0], Up({m: torch.zeros_like(x) for m, x in B.items()}))]), 1)
    assert nothing.turned == 0 and same(nothing.shared, state.shared)


def test_no_direction_of_A_is_lost_when_B_has_fewer_ranks():
    """B of rank 1 at rank 3: A turns within its own row space, so that clients go on learning in all of it."""
    rng = np.random.default_rng(0)
    A = {m: torch.tensor(rng.normal(size=(3, i))) for m, (_, i) in SHAPES.items()}
    B = {m: torch.tensor(np.outer(rng.normal(size=o), rng.normal(size=3))) for m, (o, _) in SHAPES.items()}
    state = State(0, Factors(A, B, 1.0))
    after, _ = FedSVD().aggregate(state, iter([Reply(world().clients[0], Up({m: torch.zeros_like(x) for m, x in B.items()}))]), 1)
    for m in SHAPES:
        np.testing.assert_allclose(dense_slot(after.shared, m), dense_slot(state.shared, m), rtol=0, atol=1e-12)
        assert np.linalg.matrix_rank(np.concatenate([A[m].numpy(), after.shared.A[m].numpy()]), tol=1e-9) == 3
        np.testing.assert_allclose((after.shared.A[m] @ after.shared.A[m].T).numpy(), np.eye(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"period": -1}, {"warmup": -1}], ids=str)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make("fedsvd", settings)
