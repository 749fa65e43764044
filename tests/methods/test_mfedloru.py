"""mFedLoRU (2409.12371): nested factors, against numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.mfedloru import Up, nest
from fedlora.types import Reply

rng = np.random.default_rng(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.tensor(rng.normal(size=shape))


@pytest.mark.parametrize("d_out, d_in, r, rank", [(12, 8, 4, 2), (8, 20, 5, 1), (20, 12, 6, 5), (3, 12, 6, 4)])
def test_the_nested_product_is_the_best_approximation_and_lies_in_both_factors(d_out, d_in, r, rank):
    B, A = draw(d_out, r), draw(r, d_in)
    L, Q, P = (x.numpy() for x in nest(B, A, rank))
    U, S, Vt = np.linalg.svd(B.numpy() @ A.numpy(), full_matrices=False)
    np.testing.assert_allclose(L @ Q, (U[:, :rank] * S[:rank]) @ Vt[:rank], atol=1e-10)
    inverse = np.linalg.inv(P.T @ P) @ P.T  # of full column rank, by the normal equations
    np.testing.assert_allclose((L @ inverse) @ (P @ Q), L @ Q, atol=1e-10)
    assert (L.shape, Q.shape, P.shape) == ((d_out, rank), (rank, d_in), (r, rank))


def test_while_B_is_zero_every_inner_rank_can_learn():
    A = draw(4, 8)
    L, Q, P = nest(torch.zeros(12, 4, dtype=torch.float64), A, 2)
    assert not L.any()
    np.testing.assert_allclose(Q @ Q.T, np.eye(2), atol=1e-12)
    assert np.linalg.cond(P.numpy()) < 1e3
    rows = A.numpy()[:2]
    np.testing.assert_allclose(rows @ Q.numpy().T @ Q.numpy(), rows, atol=1e-12)  # Q spans the first two rows of A


def test_a_product_of_fewer_ranks_leaves_no_dead_rank():
    B, A = draw(12, 1) @ draw(1, 4), draw(4, 8)
    L, Q, P = nest(B, A, 3)
    np.testing.assert_allclose(L @ Q, B @ A, atol=1e-10)
    assert np.linalg.matrix_rank(P.numpy()) == 3


def test_a_rank_above_the_modules_is_filled_with_zeros():
    L, Q, P = nest(draw(12, 10), draw(10, 4), 6)
    assert (L.shape, Q.shape, P.shape) == ((12, 6), (6, 4), (10, 6))
    assert not L[:, 4:].any() and not Q[4:].any() and not P[:, 4:].any()


def outer(A: torch.Tensor, Q: torch.Tensor, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """P and P^+ of a client, from the shared A and the Q that it was sent, whose rows are orthonormal: P = A Q'. What of P is
    rounding in the dtype of A counts as zero."""
    P = np.eye(len(A)) if rank == len(A) else A.double().numpy() @ Q.double().numpy().T
    U, S, Vt = np.linalg.svd(P, full_matrices=False)
    rounding = 8 * np.finfo(A.numpy().dtype).eps
    real = S / S[0] > rounding
    return P, (Vt[real].T / S[real]) @ U[:, real].T


@pytest.mark.parametrize("t", [1, 2, 3])
def test_the_server_adds_the_mean_change_of_the_outer_factors(t):
    """Also in the first round, where B is zero."""
    setup = make_setup(make_clients((1, 2, 4, 3)))
    run = federate(make("mfedloru", {"period": 9}), setup, t)
    before, now = run.states[t - 1].shared, run.states[t].shared
    for m in SHAPES:
        dA, dB = [], []
        for order, reply in run.rounds[t]:
            P, back = outer(before.A[m], order.down.inner.A[m], order.client.rank)
            dA.append(P @ reply.up.A[m].numpy())
            dB.append(reply.up.B[m].numpy() @ back)
            np.testing.assert_allclose((before.B[m].numpy() @ P), order.down.inner.B[m], atol=1e-10)
        np.testing.assert_allclose(now.A[m], before.A[m].numpy() + np.average(dA, axis=0, weights=[1, 4, 2, 3]), atol=1e-10)
        np.testing.assert_allclose(now.B[m], before.B[m].numpy() + np.average(dB, axis=0, weights=[1, 4, 2, 3]), atol=1e-10)


@pytest.mark.parametrize("ranks", [(1, 4), (1, 1), (1, 2, 4, 3)], ids=str)
def test_directions_that_small_clients_cannot_hold_stay_though_nobody_trains(ranks):
    """Ten rounds without a step, over two merges: every singular value of the deployed change is as it was."""
    setup = make_setup(make_clients((4, *ranks)))
    method, small = make("mfedloru", {"period": 5}), setup.clients[1:]
    run = federate(method, setup, 3, lambda t: setup.clients[:1])  # who holds all four
    before = dense(method.deploy(run.states[-1]), setup)
    idle = Trainer(setup, steps_per_epoch=0)
    run = federate(method, setup, 13, lambda t: small, idle, resume=(3, run.states[-1], run.held[-1]))
    assert run.states[-1].merged.version == 2
    for state in run.states:
        after = dense(method.deploy(state), setup)
        for m in SHAPES:
            values = np.linalg.svd(before[f"{m}.weight"], compute_uv=False)
            assert values[3] > 1e-3
            np.testing.assert_allclose(after[f"{m}.weight"], before[f"{m}.weight"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(np.linalg.svd(after[f"{m}.weight"], compute_uv=False), values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("of_B", [0, 1, 4])
@pytest.mark.parametrize("of_A", [1, 2])
def test_a_shared_pair_that_lacks_ranks_takes_up_what_it_can(dtype, of_B, of_A):
    """A of one or two ranks, but for rounding, and B of none, one or four. A client of rank 3 trains a direction that A lacks."""
    setup = make_setup(make_clients((3, 4)), dtype=dtype)
    method = make("mfedloru", {"period": 9})
    A = {m: (draw(4, of_A) @ draw(of_A, d_in)).to(dtype) for m, (_, d_in) in SHAPES.items()}
    B = {m: (draw(d_out, of_B) @ draw(of_B, 4)).to(dtype) for m, (d_out, _) in SHAPES.items()}
    state = method.init(setup)
    state = replace(state, shared=replace(state.shared, A=A, B=B))
    client, error = setup.clients[0], 100 * torch.finfo(dtype).eps
    sent = method.send(state, client, 1).inner
    up = Up({m: draw(3, x.shape[1]).to(dtype) for m, x in A.items()}, {m: draw(len(x), 3).to(dtype) for m, x in B.items()})
    now = method.aggregate(state, iter([Reply(client, up)]), 1)[0].shared
    for m in SHAPES:
        P, back = outer(A[m], sent.A[m], 3)
        assert np.linalg.matrix_rank(back) == of_A
        np.testing.assert_allclose(now.A[m] - A[m], P @ up.A[m].double().numpy(), atol=50 * error)
        np.testing.assert_allclose(now.B[m] - B[m], up.B[m].double().numpy() @ back, atol=50 * error)


def test_with_full_inner_rank_it_is_fedloru():
    setup = make_setup(make_clients((3, 3, 3, 3)))
    one = federate(make("mfedloru", {"period": 2}), setup, 5)
    two = federate(make("fedloru", {"period": 2}), setup, 5)
    assert all(same((x.shared, x.merged), (y.shared, y.merged)) for x, y in zip(one.states, two.states, strict=True))


def test_the_scale_is_that_of_the_largest_rank_for_everybody():
    setup = make_setup(make_clients((1, 2, 4, 2)), lora_alpha=16.0)
    method = make("mfedloru", {})
    state = method.init(setup)
    assert {method.send(state, client, 1).inner.scale for client in setup.clients} == {4.0}
    assert same(method.send(state, setup.clients[2], 1).inner, state.shared)
