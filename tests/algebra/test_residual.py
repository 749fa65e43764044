import numpy as np
import pytest
import torch

from fedlora.algebra.lowrank import compress, energy_rank, principal
from fedlora.algebra.residual import cosine_correction, residual, ridge_correction


def clients(K: int, r: int, d_out: int = 20, d_in: int = 12, seed: int = 0):
    rng = np.random.default_rng(seed)
    B, A = rng.normal(size=(K, d_out, r)), rng.normal(size=(K, r, d_in))
    w = rng.uniform(1, 5, K)
    return w, B, A, [torch.tensor(x) for x in B], [torch.tensor(x) for x in A]


@pytest.mark.parametrize("K, r", [(1, 3), (2, 1), (2, 3), (5, 2), (9, 4)])
def test_the_residual_is_the_mean_of_products_less_the_product_of_means(K, r):
    w, B, A, tB, tA = clients(K, r)
    left, right = residual(list(w), tB, tA)
    assert left.shape == (20, (K - 1) * r) and right.shape == ((K - 1) * r, 12)
    p = w / w.sum()
    want = np.einsum("k,kor,kri->oi", p, B, A) - np.einsum("k,kor->or", p, B) @ np.einsum("k,kri->ri", p, A)
    np.testing.assert_allclose(left.numpy() @ right.numpy(), want, rtol=0, atol=1e-12)
    assert np.linalg.matrix_rank(want, tol=1e-9) == min((K - 1) * r, 12)


def test_the_residual_of_changes_is_that_of_values():
    w, _, _, B, A = clients(4, 2)
    one, two = residual(list(w), B, A), residual(list(w), [x + 7.0 for x in B], [x - 3.0 for x in A])
    torch.testing.assert_close(one[0] @ one[1], two[0] @ two[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("penalty", [1e-6, 0.01, 3.0])
def test_ridge_correction_is_the_minimum(penalty):
    """By a least-squares problem with the penalty as further rows: [A'; sqrt(penalty) I] X' = [R'; 0]."""
    w, _, _, tB, tA = clients(4, 3)
    left, right = residual(list(w), tB, tA)
    A = tA[0].numpy()
    rows = np.concatenate([A.T, penalty**0.5 * np.eye(3)])
    target = np.concatenate([(left @ right).numpy().T, np.zeros((3, 20))])
    want = np.linalg.lstsq(rows, target, rcond=None)[0].T
    np.testing.assert_allclose(ridge_correction(tA[0], left, right, penalty).numpy(), want, rtol=0, atol=1e-9)


def distance_and_penalty(X, B, A, M, penalty: float) -> float:
    Y = (B + X) @ A
    return 1 - (M * Y).sum() / np.linalg.norm(M) / np.linalg.norm(Y) + penalty * (X**2).sum()


def slope(X, *args) -> float:
    """The largest partial derivative at X, by differences."""
    slopes = []
    for at in np.ndindex(X.shape):
        step = np.zeros_like(X)
        step[at] = 1e-5
        slopes.append((distance_and_penalty(X + step, *args) - distance_and_penalty(X - step, *args)) / 2e-5)
    return float(np.abs(slopes).max())


@pytest.mark.parametrize("penalty, steps", [(1e-3, 2000), (0.01, 500), (0.3, 100)])
def test_cosine_correction_goes_to_where_the_objective_is_stationary(penalty, steps):
    """The smaller the penalty, the slower the length settles, of which the cosine sees nothing."""
    w, _, _, tB, tA = clients(3, 2, 6, 5)
    left, right = residual(list(w), tB, tA)
    B, A = tB[0] / 3, tA[0]
    args = B.numpy(), A.numpy(), B.numpy() @ A.numpy() + (left @ right).numpy(), penalty
    X = cosine_correction(B, A, left, right, penalty, steps).numpy()
    assert slope(X, *args) < 1e-4 < 1e-1 < slope(0 * X, *args)
    assert distance_and_penalty(X, *args) < distance_and_penalty(0 * X, *args) - 1e-2
    every = [distance_and_penalty(cosine_correction(B, A, left, right, penalty, n).numpy(), *args) for n in range(1, 30)]
    assert (np.diff(every) < 1e-12).all()  # every iteration helps


def test_cosine_correction_where_there_is_no_angle():
    zero_B, A = torch.zeros(6, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    none = torch.zeros(6, 0, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64)
    assert not cosine_correction(zero_B, A, *none, 0.01, 10).any()


# ---- the new functions of lowrank ----------------------------------------------------------------------------------------------


def product(d_out: int, d_in: int, R: int):
    rng = np.random.default_rng(1)
    return torch.tensor(rng.normal(size=(d_out, R))), torch.tensor(rng.normal(size=(R, d_in)))


@pytest.mark.parametrize("R", [0, 1, 8, 9, 40])
def test_compress_loses_nothing_and_is_never_wider_than_the_smaller_side(R):
    B, A = product(12, 8, R)
    b, a = compress(B, A)
    assert b.shape == (12, min(R, 8)) and a.shape == (min(R, 8), 8) and b.is_contiguous()
    np.testing.assert_allclose(b.numpy() @ a.numpy(), B.numpy() @ A.numpy(), rtol=0, atol=1e-12)
    if R <= 8:
        assert b is B and a is A


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_compress_to_a_rank_leaves_the_tail_of_the_singular_values(rank):
    B, A = product(12, 8, 10)
    b, a = compress(B, A, rank)
    M = B.numpy() @ A.numpy()
    assert b.shape[1] == rank
    tail = np.linalg.svd(M, compute_uv=False)[rank:]
    np.testing.assert_allclose(np.linalg.norm(M - b.numpy() @ a.numpy()), np.linalg.norm(tail), rtol=1e-10)
    assert compress(B[:, :3], A[:3], 3)[0].data_ptr() == B.data_ptr()  # wide enough already


@pytest.mark.parametrize(
    "d_out, d_in, rank", [(12, 8, 3), (8, 12, 3), (12, 8, 2), (8, 12, 1), (12, 8, 8), (12, 8, 11), (8, 12, 10)]
)
def test_principal_is_the_best_approximation_shared_evenly(d_out, d_in, rank):
    W = torch.tensor(np.random.default_rng(2).normal(size=(d_out, d_in)))
    B, A = principal(W, rank)
    assert B.shape == (d_out, rank) and A.shape == (rank, d_in) and B.is_contiguous() and A.is_contiguous()
    U, S, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose(B.numpy() @ A.numpy(), (U[:, :rank] * S[:rank]) @ Vt[:rank], rtol=0, atol=1e-12)
    q = min(rank, 8)
    np.testing.assert_allclose((B.T @ B).numpy()[:q, :q], np.diag(S[:q]), rtol=0, atol=1e-12)
    np.testing.assert_allclose((A @ A.T).numpy()[:q, :q], np.diag(S[:q]), rtol=0, atol=1e-12)
    assert not B[:, q:].any() and (rank <= q or A[q : min(rank, d_in)].any(dim=1).all())


@pytest.mark.parametrize(
    "S, share, p",
    [
        ([3.0, 2.0, 1.0], 9 / 14 - 1e-9, 1),  # squares 9, 4, 1 of 14
        ([3.0, 2.0, 1.0], 9 / 14 + 1e-9, 2),
        ([3.0, 2.0, 1.0], 13 / 14 + 1e-9, 3),
        ([3.0, 2.0, 1.0], 1e-9, 1),
        ([3.0, 2.0, 0.0], 1.0, 2),
        ([1.0, 1e-9, 1e-12], 1.0, 3),  # far below the rounding of the sum, and still kept
        ([0.0, 0.0], 1.0, 0),
        ([2.0, 2.0, 2.0, 2.0], 0.5, 2),
    ],
)
def test_energy_rank(S, share, p):
    assert energy_rank(torch.tensor(S, dtype=torch.float64), share) == p
