import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra.lowrank import complete_rows, factored_svd, pad_rank, product_norm

# (d_out, d_in, R, rank of the product)
CASES = {
    "tall": (20, 8, 3, 3),
    "wide": (8, 20, 3, 3),
    "rank one": (12, 8, 1, 1),
    "R above the smaller side": (12, 8, 10, 8),
    "R above both": (12, 8, 30, 8),
    "R equal to the smaller side": (12, 8, 8, 8),
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
