"""FlexLoRA (2402.11505). Modules: q (12, 8) and up (20, 12)."""

import numpy as np
import pytest
import torch
from toy import Trainer, dense, dense_slot, distance, federate, make_clients, make_setup

from fedlora.methods.flexlora import FlexLoRA, Up
from fedlora.types import Client, Factors, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}
METHOD = FlexLoRA()


@pytest.fixture(scope="module")
def averaged():
    """The state after one aggregation of clients of ranks 1, 2, 4 and W_g = sum_k w_k s_k B_k A_k by numpy."""
    setup = make_setup(make_clients((1, 2, 4), examples=(10, 30, 60)))
    rng = np.random.default_rng(0)
    replies, W = [], {m: 0.0 for m in SHAPES}
    for client in setup.clients:
        A = {m: rng.normal(size=(client.rank, i)) for m, (_, i) in SHAPES.items()}
        B = {m: rng.normal(size=(o, client.rank)) for m, (o, _) in SHAPES.items()}
        for m in SHAPES:
            W[m] = W[m] + client.num_examples / 100 * 4.0 / client.rank * B[m] @ A[m]
        replies.append(Reply(client, Up({m: torch.tensor(x) for m, x in A.items()}, {m: torch.tensor(x) for m, x in B.items()})))
    state, _ = METHOD.aggregate(METHOD.init(setup), iter(replies), 1)
    return setup, state, W


def test_every_client_receives_the_best_approximation_at_its_rank(averaged):
    setup, state, W = averaged
    for client in setup.clients:
        down = METHOD.send(state, client, 1)
        assert down.scale == 4.0 / client.rank
        for m in SHAPES:
            assert down.A[m].shape == (client.rank, SHAPES[m][1])
            U, S, Vt = np.linalg.svd(W[m])
            best = (U[:, : client.rank] * S[: client.rank]) @ Vt[: client.rank]
            np.testing.assert_allclose(dense_slot(down, m), best, rtol=0, atol=1e-12)
            error = ((W[m] - dense_slot(down, m)) ** 2).sum()
            np.testing.assert_allclose(error, (S[client.rank :] ** 2).sum(), rtol=1e-10)


def test_A_is_orthonormal_and_smaller_ranks_are_prefixes_of_larger_ones(averaged):
    setup, state, _ = averaged
    downs = [METHOD.send(state, c, 1) for c in setup.clients]
    for c, down in zip(setup.clients, downs, strict=True):
        for m in SHAPES:
            torch.testing.assert_close(down.A[m] @ down.A[m].T, torch.eye(c.rank, dtype=torch.float64), rtol=0, atol=1e-12)
            assert torch.equal(down.A[m], downs[-1].A[m][: c.rank])
            torch.testing.assert_close(down.scale * down.B[m], downs[-1].scale * downs[-1].B[m][:, : c.rank])


def test_the_scale_counts_once():
    """By hand: s = 4 at rank 1, so B A = (1, 0)' (2, 0, 0) is W_g = 8 E_11, and comes back as A = (1, 0, 0), B = (2, 0)'."""
    setup = make_setup(make_clients((1,)), shapes={"m": (2, 3)})
    up = Up({"m": torch.tensor([[2.0, 0.0, 0.0]])}, {"m": torch.tensor([[1.0], [0.0]])})
    state, _ = METHOD.aggregate(METHOD.init(setup), iter([Reply(setup.clients[0], up)]), 1)
    down = METHOD.send(state, setup.clients[0], 1)
    torch.testing.assert_close(down.A["m"], torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(down.B["m"], torch.tensor([[2.0], [0.0]]))
    model = METHOD.deploy(state)
    np.testing.assert_allclose(dense(model, setup)["m.weight"], [[8.0, 0.0, 0.0], [0.0, 0.0, 0.0]], atol=1e-6)


def test_nothing_is_lost_while_the_ranks_of_all_clients_together_fit():
    setup = make_setup([Client(0, 1, 10), Client(1, 2, 30), Client(2, 5, 1)])
    run = federate(METHOD, setup, 1, lambda t: setup.clients[:2])
    want = {m: np.zeros(shape) for m, shape in SHAPES.items()}
    for order, reply in run.rounds[1]:
        c = order.client
        for m in SHAPES:
            factors = Factors(reply.up.A, reply.up.B, 4.0 / c.rank)
            want[m] += c.num_examples / 40 * dense_slot(factors, m)
    got = METHOD.send(run.states[1], setup.clients[2], 2)
    for m in SHAPES:
        np.testing.assert_allclose(dense_slot(got, m), want[m], rtol=0, atol=1e-12)


def test_ranks_that_the_mean_does_not_fill_are_zero_in_B_orthonormal_in_A_and_learn():
    setup = make_setup([Client(0, 1, 10), Client(1, 4, 30)])
    trainer = Trainer(setup)
    run = federate(METHOD, setup, 2, lambda t: setup.clients[t - 1 : t], trainer)  # first the small one alone, then the large one
    down = run.rounds[2][0][0].down
    for m in SHAPES:
        assert torch.count_nonzero(down.B[m][:, 1:].abs() > 1e-12) == 0
        torch.testing.assert_close(down.A[m] @ down.A[m].T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        assert all((run.rounds[2][0][1].up.B[m][:, i].norm() > 1e-3) for i in range(4))


def test_round_one_starts_from_the_common_adapter():
    setup = make_setup(make_clients((1, 4)))
    for client in setup.clients:
        down, fresh = METHOD.send(METHOD.init(setup), client, 1), setup.fresh(client.rank)
        for m in SHAPES:
            assert torch.equal(down.A[m], fresh.A[m]) and not down.B[m].any()
        assert down.scale == fresh.scale


def test_zero_local_steps_with_mixed_ranks_average_the_truncations():
    setup = make_setup(make_clients((1, 2, 4, 2)))
    run = federate(METHOD, setup, 3)
    before = dense(METHOD.deploy(run.states[-1]), setup)
    want = {name: np.zeros_like(x) for name, x in before.items()}
    for client in setup.clients:
        for name in (f"{m}.weight" for m in SHAPES):
            U, S, Vt = np.linalg.svd(before[name], full_matrices=False)
            want[name] += client.num_examples / 100 * (U[:, : client.rank] * S[: client.rank]) @ Vt[: client.rank]
    idle = federate(METHOD, setup, 4, trainer=Trainer(setup, steps_per_epoch=0), resume=(3, run.states[-1], run.held[-1]))
    assert distance(dense(METHOD.deploy(idle.states[-1]), setup), want) < 1e-12


def test_a_rank_above_the_modules_size_is_padded_with_zeros():
    setup = make_setup(make_clients((10,)), shapes={"wide": (4, 30), "tall": (30, 4)})
    run = federate(METHOD, setup, 2)
    state = run.states[-1]
    assert state.shared.A["tall"].shape == (10, 4) and state.shared.B["tall"].shape == (30, 10)
    assert not state.shared.A["tall"][4:].any()
    gram = state.shared.A["wide"] @ state.shared.A["wide"].T
    torch.testing.assert_close(gram, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
