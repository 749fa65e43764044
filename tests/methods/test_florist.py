"""FLoRIST (2506.09199). Modules: q (12, 8) and up (20, 12)."""

import numpy as np
import pytest
import torch
from toy import Trainer, dense, dense_slot, federate, make_clients, make_setup

from fedlora.methods import make
from fedlora.methods.florist import FLoRIST, Up
from fedlora.types import SHARED, Client, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}


def averaged(tau: float, ranks=(1, 2, 4)):
    """The state after one aggregation, and W_g = sum_k w_k s_k B_k A_k by numpy."""
    setup = make_setup(make_clients(ranks, examples=(10, 30, 60)))
    rng = np.random.default_rng(0)
    replies, W, n = [], dict.fromkeys(SHAPES, 0.0), sum(c.num_examples for c in setup.clients)
    for client in setup.clients:
        A = {m: rng.normal(size=(client.rank, i)) for m, (_, i) in SHAPES.items()}
        B = {m: rng.normal(size=(o, client.rank)) for m, (o, _) in SHAPES.items()}
        for m in SHAPES:
            W[m] = W[m] + client.num_examples / n * 4.0 / client.rank * B[m] @ A[m]
        replies.append(Reply(client, Up({m: torch.tensor(x) for m, x in A.items()}, {m: torch.tensor(x) for m, x in B.items()})))
    method = FLoRIST(tau)
    return setup, *method.aggregate(method.init(setup), iter(replies), 1), W


@pytest.mark.parametrize("tau", [0.3, 0.7, 0.95, 0.999])
def test_the_global_rank_is_the_smallest_that_keeps_the_energy_and_the_rest_is_cut(tau):
    setup, state, diagnostics, W = averaged(tau)
    got = dense(FLoRIST(tau).deploy(state), setup)
    for m in SHAPES:
        energy = np.linalg.svd(W[m], compute_uv=False) ** 2
        p = next(p for p in range(1, 13) if energy[:p].sum() >= tau * energy.sum())
        assert state.shared.A[m].shape == (p, SHAPES[m][1]) and diagnostics["ranks"][m] == p
        np.testing.assert_allclose(((W[m] - got[f"{m}.weight"]) ** 2).sum(), energy[p:].sum(), rtol=1e-9, atol=1e-24)
        assert energy[p:].sum() <= (1 - tau) * energy.sum()
        np.testing.assert_allclose((state.shared.A[m] @ state.shared.A[m].T).numpy(), np.eye(p), rtol=0, atol=1e-12)


def test_all_of_the_energy_is_all_of_the_update():
    setup, state, _, W = averaged(1.0)
    got = dense(FLoRIST(1.0).deploy(state), setup)
    for m in SHAPES:
        np.testing.assert_allclose(got[f"{m}.weight"], W[m], rtol=0, atol=1e-12)
        assert len(state.shared.A[m]) == 7


@pytest.mark.parametrize("fresh_rows", [False, True], ids=["zeros", "fresh rows"])
@pytest.mark.parametrize("tau", [0.3, 0.95])
def test_every_client_trains_its_first_ranks_and_fills_up(tau, fresh_rows):
    setup, state, diagnostics, W = averaged(tau, (1, 2, 6))
    method, filled = make("florist", {"tau": tau, "fresh_rows": True} if fresh_rows else {"tau": tau}), 0
    for client in setup.clients:
        down = method.send(state, client, 1)
        start = next(method.local(down, method.hold(setup, client), client, 1)).slots[SHARED]
        assert start.scale == 4.0 / client.rank
        for m in SHAPES:
            p = min(diagnostics["ranks"][m], client.rank)
            assert down.A[m].shape[0] == down.B[m].shape[1] == p
            U, S, Vt = np.linalg.svd(W[m])
            np.testing.assert_allclose(dense_slot(start, m), (U[:, :p] * S[:p]) @ Vt[:p], rtol=0, atol=1e-12)
            assert start.A[m].shape[0] == start.B[m].shape[1] == client.rank
            rows = setup.fresh(client.rank).A[m][p:]
            assert torch.equal(start.A[m][p:], rows if fresh_rows else 0 * rows) and not start.B[m][:, p:].any()
            filled += client.rank - p
    assert filled > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_padded_ranks_are_dead_and_fresh_rows_learn(optimizer):
    """Clients of rank 4, of which one rank came down: what they send back has rank 1 or rank 4."""
    setup = make_setup(make_clients((4, 4)))
    for settings, expected in (({}, 1), ({"fresh_rows": True}, 4)):
        method = make("florist", {"tau": 1e-6, **settings})
        run = federate(method, setup, 3, trainer=Trainer(setup, optimizer=optimizer))
        ranks = [[np.linalg.matrix_rank(reply.up.B["q"] @ reply.up.A["q"]) for _, reply in run.rounds[t]] for t in (1, 2, 3)]
        assert ranks == [[4, 4], [expected] * 2, [expected] * 2]
        assert all(len(reply.up.A["q"]) == 4 for _, reply in run.rounds[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_of_the_energy_is_the_numerical_rank(dtype):
    """Three clients of rank 2 with the same two rows: the mean has two ranks, and rounding of the stack is no third one."""
    setup, rng = make_setup(make_clients((2, 2, 2)), dtype=dtype), np.random.default_rng(0)
    rows = {m: rng.normal(size=(2, i)) for m, (_, i) in SHAPES.items()}
    replies = []
    for client in setup.clients:
        mix = rng.normal(size=(2, 2))
        A = {m: torch.tensor(mix @ x, dtype=dtype) for m, x in rows.items()}
        replies.append(
            Reply(client, Up(A, {m: torch.tensor(rng.normal(size=(o, 2)), dtype=dtype) for m, (o, _) in SHAPES.items()}))
        )
    method = FLoRIST(1.0)
    _, diagnostics = method.aggregate(method.init(setup), iter(replies), 1)
    assert diagnostics["ranks"] == {"q": 2, "up": 2}


def test_round_one_is_the_start_that_the_seed_gives_to_everybody():
    setup = make_setup(make_clients((1, 2, 4)))
    trainer = Trainer(setup)
    run = federate(FLoRIST(), setup, 1, trainer=trainer)
    for client, ask, _ in trainer.log:
        start, fresh = ask.slots[SHARED], setup.fresh(client.rank)
        assert start.scale == fresh.scale
        for m in SHAPES:
            assert torch.equal(start.A[m], fresh.A[m]) and torch.equal(start.B[m], fresh.B[m])
    assert all(order.down.A["q"].numel() == 0 for order, _ in run.rounds[1])


def test_a_module_that_learned_nothing_keeps_one_rank_of_zero():
    setup = make_setup([Client(0, 2, 10)])
    up = Up(
        {m: torch.ones(2, i).double() for m, (_, i) in SHAPES.items()},
        {m: torch.zeros(o, 2).double() for m, (o, _) in SHAPES.items()},
    )
    state, diagnostics = FLoRIST().aggregate(FLoRIST().init(setup), iter([Reply(setup.clients[0], up)]), 1)
    assert diagnostics["ranks"] == {"q": 1, "up": 1} and not any(B.any() for B in state.shared.B.values())


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.01])
def test_impossible_settings_are_refused(tau):
    with pytest.raises(ValueError, match="tau"):
        make("florist", {"tau": tau})
