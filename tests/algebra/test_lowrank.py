import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra.lowrank import (
    complete_rows,
    energy_rank,
    factored_pays,
    factored_svd,
    leading,
    pad_rank,
    principal,
    product_norm,
    rounding,
)

# (d_out, d_in, R, rank of the product)
CASES = {
    "tall": (20, 8, 3, 3),
    "wide": (8, 20, 3, 3),
    "rank one": (12, 8, 1, 1),
    "R above the smaller side": (12, 8, 10, 8),
    "R above both": (12, 8, 30, 8),
    "R equal to the smaller side": (12, 8, 8, 8),
    "R a little below both": (12, 12, 11, 11),
    "rank-deficient": (20, 12, 6, 2),
    "rank-deficient and dense": (20, 12, 14, 2),
    "zero B": (20, 12, 4, 0),
    "one row": (1, 9, 3, 1),
}


def pair(d_out: int, d_in: int, R: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """B (d_out, R) and A (R, d_in) in float64 whose product has this rank."""
    rng = np.random.default_rng(seed)
    B = rng.normal(size=(d_out, min(rank, R))) @ rng.normal(size=(min(rank, R), R)) if rank < R else rng.normal(size=(d_out, R))
    return torch.tensor(B), torch.tensor(rng.normal(size=(R, d_in)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_factored_svd_is_the_dense_svd(case):
    d_out, d_in, R, _ = case
    B, A = pair(*case)
    U, S, Vt = (x.numpy() for x in factored_svd(B, A))
    q = min(R, d_out, d_in)
    assert (U.shape, S.shape, Vt.shape) == ((d_out, q), (q,), (q, d_in))
    product = B.numpy() @ A.numpy()
    np.testing.assert_allclose(S, np.linalg.svd(product, compute_uv=False)[:q], rtol=0, atol=1e-12 * max(1.0, S.max()))
    np.testing.assert_allclose((U * S) @ Vt, product, rtol=0, atol=1e-12 * max(1.0, S.max()))
    np.testing.assert_allclose(U.T @ U, np.eye(q), rtol=0, atol=1e-12)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(q), rtol=0, atol=1e-12)
    assert (np.diff(S) <= 0).all() and (S >= 0).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_signs_are_fixed_and_rows_contiguous(case):
    B, A = pair(*case)
    U, _, Vt = factored_svd(B, A)
    largest = U.numpy()[np.abs(U.numpy()).argmax(axis=0), np.arange(U.shape[1])]
    assert (largest > 0).all()
    assert U.is_contiguous() and Vt.is_contiguous()
    if U.shape[1] == case[3]:  # no vector is arbitrary
        U2, _, Vt2 = factored_svd(-B, -A)
        torch.testing.assert_close(U2, U, rtol=0, atol=1e-10)
        torch.testing.assert_close(Vt2, Vt, rtol=0, atol=1e-10)


def test_factored_svd_is_computed_in_float64_and_returned_in_its_inputs_dtype():
    B, A = pair(20, 12, 3, 3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        B_low, A_low = B.to(dtype), A.to(dtype)
        got = factored_svd(B_low, A_low)
        assert {x.dtype for x in got} == {dtype}
        exact = np.linalg.svd(B_low.double().numpy() @ A_low.double().numpy(), compute_uv=False)[:3]
        np.testing.assert_allclose(got[1].double().numpy(), exact, rtol=tolerance)


# ---- the leading singular vectors ---------------------------------------------------------------------------------------------

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}  # and what may be lost, relative to the largest singular value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_leading_is_the_best_approximation_however_it_is_given(case, rank, dtype):
    d_out, d_in, R, _ = case
    B, A = (x.to(dtype) for x in pair(*case))
    M = B.double().numpy() @ A.double().numpy()
    U, S, Vt = np.linalg.svd(M, full_matrices=False)
    atol = DTYPES[dtype] * max(1.0, S[0])
    for M_or_pair, q in (((B, A), min(rank, R, d_out, d_in)), (torch.tensor(M, dtype=dtype), min(rank, d_out, d_in))):
        b, a = leading(M_or_pair, rank)
        assert b.shape == (d_out, q) and a.shape == (q, d_in) and b.dtype == a.dtype == dtype
        assert b.is_contiguous() and a.is_contiguous()
        b, a = b.double().numpy(), a.double().numpy()
        np.testing.assert_allclose(b @ a, (U[:, :q] * S[:q]) @ Vt[:q], rtol=0, atol=atol)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), S[:q], rtol=0, atol=atol)
        np.testing.assert_allclose(a @ a.T, np.eye(q), rtol=0, atol=10 * DTYPES[dtype])
        largest = b[np.abs(b).argmax(axis=0), np.arange(q)]
        assert (largest >= 0).all()


@pytest.mark.parametrize("d_out, d_in, R", [(300, 200, 60), (200, 300, 60), (150, 160, 149)], ids=["tall", "wide", "product"])
def test_singular_values_of_float32_factors_keep_their_digits(d_out, d_in, R):
    """Over four orders of magnitude, where an SVD in float32 has three digits for the smallest."""
    assert factored_pays(d_out, d_in, R) == (R == 60)
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(d, R)))[0] for d in (d_out, d_in))
    B, A = torch.tensor(left * np.logspace(0, -4, R), dtype=torch.float32), torch.tensor(right.T, dtype=torch.float32)
    product = B.double().numpy() @ A.double().numpy()
    b, a = (x.double().numpy() for x in leading((B, A), R))
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.svd(product, compute_uv=False)[:R], rtol=4e-7)
    np.testing.assert_allclose(b @ a, product, rtol=0, atol=1e-6 * np.abs(product).max())


def test_float64_factors_keep_singular_values_that_a_square_would_lose():
    rng, S = np.random.default_rng(4), np.array([1.0, 1e-9, 1e-11])
    U, V = (np.linalg.qr(rng.normal(size=(d, 3)))[0] for d in (20, 12))
    b, _ = leading(torch.tensor((U * S) @ V.T), 3)
    np.testing.assert_allclose(b.norm(dim=0).numpy(), S, rtol=1e-4)


def test_leading_does_not_change_what_it_is_given():
    for dtype in DTYPES:
        B, A = (x.to(dtype) for x in pair(20, 12, 4, 4))
        before = B.clone(), A.clone()
        leading((B, A), 3)
        leading(B, 3)
        assert torch.equal(B, before[0]) and torch.equal(A, before[1])


def test_factors_pay_while_they_are_narrow():
    """By hand, in units of d^3: 3 x^2 + 4 x^3 < x / 2 + 3 for square matrices and R = x d; both are 3.375 at x = 3/4."""
    for d in (8, 768, 4096):
        assert factored_pays(d, d, 1) and factored_pays(d, d, d * 3 // 4 - 1) and not factored_pays(d, d, d * 3 // 4)
        assert not factored_pays(d, d, d)
    assert factored_pays(3072, 768, 500) and factored_pays(768, 3072, 650) and not factored_pays(3072, 768, 768)


sizes = st.integers(1, 12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes, sizes, sizes, st.integers(0, 1000))
def test_product_norm_and_svd_agree_with_the_dense_product(d_out, d_in, R, seed):
    B, A = pair(d_out, d_in, R, R, seed)
    dense = np.linalg.norm(B.numpy() @ A.numpy())
    np.testing.assert_allclose(product_norm(B, A).item(), dense, rtol=1e-9, atol=1e-7)  # a norm near zero loses half the digits
    np.testing.assert_allclose(factored_svd(B, A)[1].square().sum().sqrt().item(), dense, rtol=1e-9)


def test_product_norm_by_hand():
    B, A = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert product_norm(B, A) == 5.0  # the product is diag(3, 4)
    assert product_norm(torch.zeros(3, 2), A) == 0.0
    assert product_norm(torch.zeros(3, 0), torch.zeros(0, 2)) == 0.0
    assert product_norm(B, A).dtype == torch.float32


@pytest.mark.parametrize("q, rows, d", [(1, 3, 8), (3, 8, 8), (0, 4, 6), (7, 8, 8), (2, 3, 3)])
def test_complete_rows_is_orthonormal_and_keeps_what_it_got(q, rows, d):
    V = torch.tensor(np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0][:q])
    out = complete_rows(V, rows)
    assert torch.equal(out[:q], V)
    np.testing.assert_allclose((out @ out.T).numpy(), np.eye(rows), rtol=0, atol=1e-12)
    assert torch.equal(out, complete_rows(V, rows))


def test_complete_rows_takes_the_coordinates_that_are_covered_least():
    out = complete_rows(torch.tensor([[0.0, 0.0, 1.0, 0.0]]), 2)
    assert out[1].abs().tolist() == [1.0, 0.0, 0.0, 0.0]
    out = complete_rows(torch.tensor([[0.8, 0.0, 0.6, 0.0]]), 3)
    assert out[1].abs().tolist() == [0.0, 1.0, 0.0, 0.0] and out[2].abs().tolist() == [0.0, 0.0, 0.0, 1.0]


def test_complete_rows_where_the_coordinates_are_covered_evenly():
    """Both coordinate directions that it would take first have the same part outside V."""
    V = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]], dtype=torch.float64) / 2**0.5
    out = complete_rows(V, 4).numpy()
    np.testing.assert_allclose(out @ out.T, np.eye(4), rtol=0, atol=1e-12)


def test_complete_rows_cuts_and_has_zeros_where_no_direction_is_left():
    V = torch.eye(3, 5)
    assert torch.equal(complete_rows(V, 2), V[:2]) and torch.equal(complete_rows(V, 3), V)
    out = complete_rows(V, 7)
    assert out.shape == (7, 5) and not out[5:].any()
    torch.testing.assert_close(out[:5] @ out[:5].T, torch.eye(5))


def test_pad_rank_keeps_the_product_and_what_was_there():
    B, A = pair(12, 8, 3, 3)
    B5, A5 = pad_rank(B, A, 5)
    assert B5.shape == (12, 5) and A5.shape == (5, 8)
    assert torch.equal(B5[:, :3], B) and torch.equal(A5[:3], A) and not B5[:, 3:].any() and not A5[3:].any()
    assert torch.equal(pad_rank(B, A, 3)[0], B)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_share_one_the_energy_rank_is_numpys_rank(dtype):
    """Of products of known rank, rounded to a dtype: numpy's matrix_rank has the same limit, max(d) eps of the largest."""
    rng = np.random.default_rng(0)
    for d_out, d_in, rank in ((12, 8, 3), (20, 12, 12), (64, 256, 5), (30, 30, 1)):
        W = (rng.normal(size=(d_out, rank)) @ rng.normal(size=(rank, d_in))).astype(str(dtype).removeprefix("torch."))
        S = torch.linalg.svdvals(torch.tensor(W).double())
        assert energy_rank(S, 1.0, rounding(d_out, d_in, dtype)) == np.linalg.matrix_rank(W) == rank
        assert energy_rank(S, 1.0) == len(S)
    assert energy_rank(torch.tensor([4.0, 2.0, 1.0]), 1.0, 0.5) == 1 and energy_rank(torch.zeros(3), 1.0, 0.5) == 0
