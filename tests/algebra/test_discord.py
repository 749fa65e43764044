"""Against dense products in numpy."""

import numpy as np
import pytest
import torch

from fedlora.algebra.discord import discord, gram, update_gram


def factors(K: int, r: int, seed: int, d_out: int = 20, d_in: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(K, d_out, r)), rng.normal(size=(K, r, d_in))


def inner(products: np.ndarray) -> np.ndarray:
    flat = products.reshape(len(products), -1)
    return flat @ flat.T


def close(got: torch.Tensor, want: np.ndarray) -> None:
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-10)


def tensors(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(x) for x in arrays)


@pytest.mark.parametrize("many_B, many_A", [(4, 4), (4, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("r", [1, 3])
def test_inner_products_of_products(many_B, many_A, r):
    B, A = factors(4, r, seed=1)
    B, A = B[:many_B], A[:many_A]
    close(gram(*tensors(B, A)), inner(B @ A))


@pytest.mark.parametrize("starts", [1, 5])
@pytest.mark.parametrize("moved", ["A and B", "B", "A", "nothing"])
def test_inner_products_of_updates(starts, moved):
    B0, A0 = factors(starts, 3, seed=2)
    B, A = factors(5, 3, seed=3)
    B, A = B if "B" in moved else B0, A if "A" in moved else A0
    want = inner((B @ A) - (B0 @ A0))
    got = update_gram(*tensors(B0, A0, B, A))
    close(got.expand(len(want), len(want)), want)
    assert moved != "nothing" or not got.any()


def test_a_small_update_of_large_factors_keeps_its_digits():
    """An update a millionth as long as the product, factors in float32."""
    B0, A0 = (x.astype(np.float32) for x in factors(1, 4, seed=4))
    dB, dA = factors(3, 4, seed=5)
    B, A = (B0 + 1e-6 * dB).astype(np.float32), (A0 + 1e-6 * dA).astype(np.float32)
    exact = [x.astype(np.longdouble) for x in (B0, A0, B, A)]
    want = inner(exact[2] @ exact[3] - exact[0] @ exact[1]).astype(float)
    got = update_gram(*tensors(B0, A0, B, A)).numpy()
    assert np.abs(got - want).max() < 1e-3 * want.max()


@pytest.mark.parametrize("K, r", [(2, 1), (3, 2), (9, 4)])
def test_discord_is_what_the_product_of_means_misses(K, r):
    B, A = factors(K, r, seed=6)
    w = np.random.default_rng(7).uniform(1, 9, K)
    p = w / w.sum()
    missed = np.einsum("k,koi->oi", p, B @ A) - np.einsum("k,kor->or", p, B) @ np.einsum("k,kri->ri", p, A)
    assert discord(list(w), *tensors(B, A)) == pytest.approx(np.linalg.norm(missed), rel=1e-10)


def test_a_factor_that_is_common_leaves_no_discord_at_all():
    B, A = tensors(*factors(4, 2, seed=8))
    weights = [1.0, 2.0, 3.0, 4.0]
    assert discord(weights, B, A[:1]) == discord(weights, B[:1], A) == 0.0 < discord(weights, B, A)
