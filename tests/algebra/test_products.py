"""Sums of products of thin matrices."""

import numpy as np
import pytest
import torch

from fedlora.algebra.products import ProductMean, mean_of_products, norm, times, total, whole

SHAPES = {"q": (12, 8), "up": (20, 12)}


def uploads(ranks, seed: int = 0, dtype: torch.dtype = torch.float64):
    """(w_k, s_k, B_k, A_k) of clients of these ranks."""
    rng = np.random.default_rng(seed)
    return [
        (
            float(rng.integers(1, 100)),
            4.0 / max(r, 1),
            {m: torch.tensor(rng.normal(size=(o, r)), dtype=dtype) for m, (o, _) in SHAPES.items()},
            {m: torch.tensor(rng.normal(size=(r, i)), dtype=dtype) for m, (_, i) in SHAPES.items()},
        )
        for r in ranks
    ]


def oracle(terms, m: str) -> np.ndarray:
    total = sum(w for w, *_ in terms)
    return sum(w / total * s * B[m].double().numpy() @ A[m].double().numpy() for w, s, B, A in terms)


# ranks -> whether q (12, 8) and up (20, 12) end as the matrix: once more ranks than the smaller side came before another term
RANKS = {
    (3,): (False, False),
    (2, 1, 5): (False, False),
    (8, 1): (False, False),
    (9, 1): (True, False),
    (5, 4, 4, 1): (True, True),
    (0, 1, 0): (False, False),
    (4,) * 50: (True, True),
    (30, 2): (True, True),
}


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_the_mean_of_products_whichever_form_it_takes(ranks, dtype, atol):
    terms = uploads(ranks, dtype=dtype)
    means = mean_of_products(iter(terms))
    assert tuple(isinstance(means[m], torch.Tensor) for m in SHAPES) == RANKS[ranks]
    X = torch.ones(8, 3, dtype=dtype)
    for m in SHAPES:
        assert whole(means[m]).dtype == dtype
        np.testing.assert_allclose(whole(means[m]).numpy(), oracle(terms, m), rtol=0, atol=atol)
        np.testing.assert_allclose(norm(means[m]).item(), np.linalg.norm(oracle(terms, m)), rtol=10 * atol)
    np.testing.assert_allclose(times(means["q"], X).numpy(), oracle(terms, "q") @ X.numpy(), rtol=0, atol=10 * atol)


def test_inputs_are_left_as_they_are():
    terms = uploads((9, 9, 9))
    copies = [({m: x.clone() for m, x in B.items()}, {m: x.clone() for m, x in A.items()}) for _, _, B, A in terms]
    mean_of_products(terms)
    for (_, _, B, A), (b, a) in zip(terms, copies, strict=True):
        assert all(torch.equal(B[m], b[m]) and torch.equal(A[m], a[m]) for m in SHAPES)


def test_what_waits_does_not_grow_with_the_number_of_terms():
    mean, most = ProductMean(), 0
    for w, s, B, A in uploads((3,) * 200):
        mean.add(w, B["q"], A["q"], s)
        most = max(most, sum(len(a) for _, _, a in mean.waiting))
    assert most <= 8 + 3 and mean.folded is not None


def test_a_mean_of_one_is_that_one():
    ((_, _, B, A),) = uploads((2,))
    left, right = mean_of_products([(7.0, 1.0, B, A)])["q"]
    assert torch.equal(left, B["q"]) and torch.equal(right, A["q"])


def test_a_module_that_some_terms_lack_is_the_mean_over_the_others():
    terms = uploads((2, 3, 4))
    (w, s, B, A), *rest = terms
    terms = [(w, s, {"q": B["q"]}, {"q": A["q"]}), *rest]
    means = mean_of_products(terms)
    np.testing.assert_allclose(whole(means["up"]).numpy(), oracle(rest, "up"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(whole(means["q"]).numpy(), oracle(terms, "q"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("forms", ["p", "m", "pp", "mm", "pm", "mpmp"])
def test_the_total_of_products_and_matrices(forms):
    """p is a product of rank 2, m a matrix. What goes in is left as it is."""
    rng = np.random.default_rng(3)
    pairs = [(rng.normal(size=(12, 2)), rng.normal(size=(2, 8))) for _ in forms]
    parts = [
        (torch.tensor(B), torch.tensor(A)) if f == "p" else torch.tensor(B @ A) for f, (B, A) in zip(forms, pairs, strict=True)
    ]
    got = [total(parts), total(parts)]
    assert all(isinstance(M, torch.Tensor) is ("m" in forms) for M in got)
    for M in got:
        np.testing.assert_allclose(whole(M).numpy(), sum(B @ A for B, A in pairs), rtol=0, atol=1e-12)
