import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra.tensors import Flat, each, flat, minus, padded_mean, plus, weighted_mean


def test_each_plus_minus_by_hand():
    x, y = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}, {"b": torch.tensor([10.0]), "a": torch.tensor([5.0, 7.0])}
    assert {m: t.tolist() for m, t in plus(x, y).items()} == {"a": [6.0, 9.0], "b": [13.0]}
    assert {m: t.tolist() for m, t in minus(x, y).items()} == {"a": [-4.0, -5.0], "b": [-7.0]}
    assert list(each(torch.neg, y)) == ["b", "a"]


def test_flat_tensors_are_the_same_tensors():
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(()), "none": torch.randn(0, 4), "c": torch.randn(5).expand(2, 5)}
    one = flat(tensors)
    assert one.entries.shape == (6 + 1 + 0 + 10,) and flat(one) is one
    assert list(one) == list(tensors) and len(one) == 4 and "a" in one and "d" not in one
    assert all(torch.equal(one[m], t) and one[m].shape == t.shape for m, t in tensors.items())
    assert not flat({}) and list(flat({})) == []
    with pytest.raises(KeyError):
        one["d"]


@pytest.mark.parametrize("flatten", [(True, True), (True, False), (False, True)])
def test_flat_arithmetic_is_that_of_the_tensors(flatten):
    """Whichever side is flat, and whatever the order of the other."""
    x = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    y = {"b": torch.randn(4), "a": torch.randn(2, 3)}
    one, two = (flat(z) if yes else z for z, yes in zip((x, y), flatten, strict=True))
    for f, op in ((plus, torch.add), (minus, torch.sub)):
        got = f(one, two)
        assert isinstance(got, Flat) == isinstance(one, Flat) and list(got) == ["a", "b"]
        assert all(torch.equal(got[m], op(x[m], y[m])) for m in x)
    with pytest.raises(KeyError):
        plus(one, {"a": x["a"]})


def test_flat_tensors_of_other_shapes_do_not_mix():
    x = flat({"a": torch.ones(2, 3), "b": torch.ones(4)})
    for f in (plus, minus):
        for y in ({"a": torch.ones(3, 2), "b": torch.ones(4)}, {"a": torch.ones(4), "b": torch.ones(2, 3)}):
            with pytest.raises(ValueError, match="shapes"):
                f(x, y)


def test_terms_of_a_mean_may_name_their_modules_in_any_order():
    x, y = {"a": torch.tensor([1.0]), "b": torch.tensor([5.0])}, {"b": torch.tensor([7.0]), "a": torch.tensor([3.0])}
    for second in (y, flat(y)):
        (mean,) = weighted_mean([(1, (x,)), (1, (second,))])
        assert {m: t.item() for m, t in mean.items()} == {"a": 2.0, "b": 6.0}
    for turn in (dict, flat):
        with pytest.raises(ValueError, match="shapes"):
            weighted_mean([(1, ({"a": torch.ones(2, 3)},)), (1, (turn({"a": torch.ones(3, 2)}),))])


def test_a_mean_has_the_precision_of_its_terms():
    for dtypes, want in (((torch.bfloat16,), torch.bfloat16), ((torch.bfloat16, torch.float32), torch.float32)):
        x = {str(d): torch.ones(2, dtype=d) for d in dtypes}
        for term in (x, flat(x)):
            (mean,) = weighted_mean([(2.0, (term,)), (1.0, (x,))])
            assert {t.dtype for t in mean.values()} == {want} and all(t.tolist() == [1.0, 1.0] for t in mean.values())
    assert weighted_mean([(1.0, ({},))]) and not weighted_mean([(1.0, ({},))])[0]


def test_weighted_mean_by_hand():
    """(1*2 + 3*6) / 4 = 5 and (1*0 + 3*4) / 4 = 3."""
    terms = [
        (1, ({"m": torch.tensor([2.0])}, {"n": torch.tensor([0.0])})),
        (3, ({"m": torch.tensor([6.0])}, {"n": torch.tensor([4.0])})),
    ]
    first, second = weighted_mean(iter(terms))
    assert first["m"].tolist() == [5.0] and second["n"].tolist() == [3.0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.integers(0, 1000))
def test_equal_terms_narrower_than_float64_give_themselves_back_exactly(weights, seed):
    x = torch.tensor(np.random.default_rng(seed).normal(size=20) * 10.0 ** np.random.default_rng(seed).integers(-8, 8, 20))
    for dtype in (torch.float32, torch.bfloat16):
        low = x.to(dtype)
        (mean,) = weighted_mean((w, ({"m": low},)) for w in weights)
        assert mean["m"].dtype == dtype and torch.equal(mean["m"], low)
    (mean,) = weighted_mean((w, ({"m": x},)) for w in weights)
    torch.testing.assert_close(mean["m"], x, rtol=1e-14, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=8), st.integers(0, 1000))
def test_weighted_mean_is_numpys_average(weights, seed):
    xs = np.random.default_rng(seed).normal(size=(len(weights), 3, 2))
    (mean,) = weighted_mean((w, ({"m": torch.tensor(x)},)) for w, x in zip(weights, xs, strict=True))
    np.testing.assert_allclose(mean["m"].numpy(), np.average(xs, axis=0, weights=weights), rtol=1e-10, atol=1e-12)


def test_many_small_float32_terms_do_not_lose_each_other():
    """Added up in float32, the sum of 2^25 and ones would stay at 2^25."""
    terms = [torch.tensor([2.0**25])] + [torch.tensor([1.0])] * 64
    (mean,) = weighted_mean((1, ({"m": t},)) for t in terms)
    assert mean["m"].item() == np.float32((2.0**25 + 64) / 65)


def test_terms_are_not_changed_and_are_taken_one_at_a_time():
    alive = []

    def terms():
        for i in range(3):
            alive.append(i)
            yield 1.0, ({"m": x},)

    x = torch.ones(2)
    weighted_mean(terms())
    assert alive == [0, 1, 2] and x.tolist() == [1.0, 1.0]


def test_shorter_terms_count_as_zero_past_their_ends():
    """By hand: (1 * [1, 2] + 3 * [5]) / 4 = [4, 1/2], of three places."""
    terms = [(1.0, ({"m": torch.tensor([1.0, 2.0])},)), (3.0, ({"m": torch.tensor([5.0])},))]
    (mean,) = padded_mean(terms, ({"m": torch.zeros(3)},))
    assert mean["m"].tolist() == [4.0, 0.5, 0.0] and mean["m"].dtype == torch.float32
    rows = [(1.0, ({"m": torch.ones(2, 1)},)), (1.0, ({"m": torch.ones(1, 3)},))]
    assert padded_mean(rows, ({"m": torch.ones(2, 3)},))[0]["m"].tolist() == [[1.0, 0.5, 0.5], [0.5, 0.0, 0.0]]


def test_terms_must_have_as_many_mappings():
    x = {"m": torch.ones(1)}
    with pytest.raises(ValueError):
        weighted_mean([(1.0, (x,)), (1.0, (x, x))])
