import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fedlora.algebra.products import whole
from fedlora.algebra.residual import cosine_correction, means_and_residuals, residual, ridge_correction


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


def test_the_residual_of_float32_is_rounded_only_at_its_end():
    """Factors that differ by a ten-thousandth: in float32 the differences from a rounded mean would have four digits."""
    w, B, A, _, _ = clients(4, 2)
    B, A = (x.mean(axis=0) + 1e-4 * x for x in (B, A))
    low_B, low_A = ([torch.tensor(x, dtype=torch.float32) for x in y] for y in (B, A))
    left, right = residual(list(w), low_B, low_A)
    exact = residual(list(w), [x.double() for x in low_B], [x.double() for x in low_A])
    want = (exact[0] @ exact[1]).numpy()
    assert left.dtype == right.dtype == torch.float32
    got = left.double().numpy() @ right.double().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("K, r, width", [(1, 3, 0), (4, 3, 9), (5, 3, 12), (6, 3, None), (40, 3, None)])
def test_means_and_residuals_in_one_pass(K, r, width):
    """As factors while K - 1 clients have no more ranks than the module's smaller side, 12, and then as the matrix."""
    w, B, A, tB, tA = clients(K, r)
    mean_A, mean_B, lacking = means_and_residuals((x, ({"m": a}, {"m": b})) for x, a, b in zip(w, tA, tB, strict=True))
    p = w / w.sum()
    np.testing.assert_allclose(mean_A["m"].numpy(), np.einsum("k,kri->ri", p, A), rtol=0, atol=1e-13)
    np.testing.assert_allclose(mean_B["m"].numpy(), np.einsum("k,kor->or", p, B), rtol=0, atol=1e-13)
    want = np.einsum("k,kor,kri->oi", p, B, A) - mean_B["m"].numpy() @ mean_A["m"].numpy()
    np.testing.assert_allclose(whole(lacking["m"]).numpy(), want, rtol=0, atol=1e-12)
    assert (None if isinstance(lacking["m"], torch.Tensor) else len(lacking["m"][1])) == width


@pytest.mark.parametrize("penalty", [1e-6, 0.01, 3.0])
def test_ridge_correction_is_the_minimum(penalty):
    """By a least-squares problem with the penalty as further rows: [A'; sqrt(penalty) I] X' = [R'; 0]."""
    w, _, _, tB, tA = clients(4, 3)
    left, right = residual(list(w), tB, tA)
    A = tA[0].numpy()
    M = left.numpy() @ right.numpy()
    rows = np.concatenate([A.T, penalty**0.5 * np.eye(3)])
    target = np.concatenate([M.T, np.zeros((3, 20))])
    want = np.linalg.lstsq(rows, target, rcond=None)[0].T
    for given in ((left, right), torch.tensor(M)):
        np.testing.assert_allclose(ridge_correction(tA[0], given, penalty).numpy(), want, rtol=0, atol=1e-9)


def objective(X, B, A, M, penalty: float) -> float:
    """1 - cos(M, (B + X) A) + penalty ||X||, every matrix formed."""
    Y = (B + X) @ A
    return 1 - (M * Y).sum() / np.linalg.norm(M) / np.linalg.norm(Y) + penalty * np.linalg.norm(X)


def slope(X, *args) -> np.ndarray:
    """The gradient at X, by differences."""
    out = np.zeros_like(X)
    for at in np.ndindex(X.shape):
        step = np.zeros_like(X)
        step[at] = 1e-6
        out[at] = (objective(X + step, *args) - objective(X - step, *args)) / 2e-6
    return out


def problem(seed: int, K: int = 3, r: int = 2, d_out: int = 6, d_in: int = 5):
    """(B, A, residual) in torch and (B, A, M) in numpy."""
    w, _, _, tB, tA = clients(K, r, d_out, d_in, seed)
    left, right = residual(list(w), tB, tA)
    B, A = tB[0] / 3, tA[0]
    return (B, A, (left, right)), (B.numpy(), A.numpy(), B.numpy() @ A.numpy() + (left @ right).numpy())


@pytest.mark.parametrize("penalty", [1e-3, 0.01, 0.03])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_cosine_correction_is_no_worse_than_a_general_minimiser_from_many_starts(seed, penalty):
    (B, A, lacking), dense = problem(seed)
    X = cosine_correction(B, A, lacking, penalty, 3000).numpy()
    rng = np.random.default_rng(seed)
    starts = [size * rng.normal(size=X.size) for size in (0.01, 0.1, 0.5) for _ in range(3)]
    found = [minimize(lambda x: objective(x.reshape(X.shape), *dense, penalty), x, method="BFGS", tol=1e-9) for x in starts]
    best = min(found, key=lambda end: end.fun)
    assert objective(X, *dense, penalty) < best.fun + 1e-9
    assert objective(X, *dense, penalty) < objective(0 * X, *dense, penalty) - 5e-4
    np.testing.assert_allclose(X, best.x.reshape(X.shape), rtol=0, atol=1e-2)  # BFGS knows its own end no better at 1e-3
    # Where X is not zero all is smooth, and the gradient with its penalty is zero.
    assert np.abs(slope(X, *dense, penalty)).max() < 1e-7
    np.testing.assert_allclose(cosine_correction(B, A, lacking[0] @ lacking[1], penalty, 3000).numpy(), X, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_cosine_correction_is_zero_up_to_a_penalty_and_not_below(seed):
    """The kink at X = 0: zero is best where the gradient of 1 - cos there is no longer than the penalty."""
    (B, A, lacking), dense = problem(seed)
    length = np.linalg.norm(slope(0 * dense[0], *dense, 0.0))
    assert not cosine_correction(B, A, lacking, 1.001 * length, 500).any()
    X = cosine_correction(B, A, lacking, 0.999 * length, 500)
    assert 0 < X.norm() < 0.1 * B.norm()


def test_every_iteration_of_the_cosine_correction_helps():
    (B, A, lacking), dense = problem(0)
    every = [objective(cosine_correction(B, A, lacking, 0.01, n).numpy(), *dense, 0.01) for n in range(40)]
    assert (np.diff(every) < 1e-13).all() and every[5] < every[0] - 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corrections_of_vast_and_of_tiny_factors(dtype):
    """Neither depends on the unit: with s B, s A and the penalty in its unit, X is s times as long. float32 ends at 1e38."""
    (B, A, (left, right)), _ = problem(1)
    for s in (1e18, 1e-18):
        scaled = [(s * x).to(dtype) for x in (B, A, left, right)]
        for correct, unit in (
            (lambda b, a, m, w: cosine_correction(b, a, m, w, 500), 1 / s),
            (lambda b, a, m, w: ridge_correction(a, m, w), s**2),
        ):
            X = correct(scaled[0], scaled[1], (scaled[2], scaled[3]), 0.01 * unit) / s
            expected = correct(B, A, (left, right), 0.01)
            torch.testing.assert_close(X, expected, rtol=1e-4, atol=1e-5)


def test_cosine_correction_where_there_is_no_angle():
    zero_B, A = torch.zeros(6, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    none = torch.zeros(6, 0, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64)
    assert not cosine_correction(zero_B, A, none, 0.01, 10).any()
    assert not cosine_correction(zero_B, A, (torch.ones(6, 1).double(), torch.ones(1, 5).double()), 0.01, 10).any()
