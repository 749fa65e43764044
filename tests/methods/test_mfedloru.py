"""mFedLoRU (2409.12371): nested factors, against numpy."""

import numpy as np
import pytest
import torch
from toy import SHAPES, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.mfedloru import nest

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


def test_the_server_recovers_the_outer_factors_and_averages_them():
    setup = make_setup(make_clients((1, 2, 4, 3)))
    run = federate(make("mfedloru", {"period": 9}), setup, 2)
    before, now = run.states[1].shared, run.states[2].shared
    for m in SHAPES:
        As, Bs = [], []
        for order, reply in run.rounds[2]:
            sent, up, rank = order.down.inner, reply.up, order.client.rank
            Q, L = (sent.A[m] + up.A[m]).numpy(), (sent.B[m] + up.B[m]).numpy()
            P = np.eye(4) if rank == 4 else before.A[m].numpy() @ sent.A[m].numpy().T  # the sent Q has orthonormal rows
            As.append(P @ Q)
            Bs.append(L @ np.linalg.solve(P.T @ P, P.T))
            np.testing.assert_allclose(Bs[-1] @ As[-1], L @ Q, atol=1e-10)
        np.testing.assert_allclose(now.A[m], np.average(As, axis=0, weights=[1, 4, 2, 3]), atol=1e-10)
        np.testing.assert_allclose(now.B[m], np.average(Bs, axis=0, weights=[1, 4, 2, 3]), atol=1e-10)


def test_with_full_inner_rank_it_is_fedloru():
    setup = make_setup(make_clients((3, 3, 3, 3)))
    one = federate(make("mfedloru", {"period": 2}), setup, 5)
    two = federate(make("fedloru", {"period": 2}), setup, 5)
    for x, y in zip(one.states, two.states, strict=True):
        assert x.merged.version == y.merged.version
        for m in SHAPES:
            torch.testing.assert_close(x.shared.A[m], y.shared.A[m], rtol=0, atol=1e-12)
            torch.testing.assert_close(x.shared.B[m], y.shared.B[m], rtol=0, atol=1e-12)


def test_the_scale_is_that_of_the_largest_rank_for_everybody():
    setup = make_setup(make_clients((1, 2, 4, 2)), lora_alpha=16.0)
    method = make("mfedloru", {})
    state = method.init(setup)
    assert {method.send(state, client).inner.scale for client in setup.clients} == {4.0}
    assert same(method.send(state, setup.clients[2]).inner, state.shared)
