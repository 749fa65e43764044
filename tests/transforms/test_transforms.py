"""Each transform on its own: what arrives, within which bounds, and in how many bytes. Oracles in numpy."""

import numpy as np
import pytest
import torch

from fedlora import transforms, wire
from fedlora.errors import BadInput
from fedlora.transforms import make
from fedlora.transforms.quantise import Format

SHAPES = {"A q": (3, 40), "B q": (24, 3), "A up": (3, 24), "B up": (50, 3), "v": (17,)}


def draw(seed: int = 0, shapes=SHAPES, dtype=torch.float64) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.tensor(rng.normal(size=shape) * (1 + i), dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def flat(changes) -> np.ndarray:
    return np.concatenate([x.double().numpy().ravel() for x in changes.values()])


def passed(transform, changes, seed: int = 0):
    return transform.decode(*transform.encode(changes, rng(seed)))


ALL = [
    make("clip", {"max_norm": 1.0}),
    make("gaussian", {"scale": 0.1}),
    make("laplace", {"scale": 0.1}),
    make("topk", {"density": 0.2}),
    make("topk", {"density": 0.01}),
    *(make("quantise", {"to": to.value, "stochastic": s}) for to in Format for s in (True, False)),
]


def test_every_transform_is_tested():
    assert {type(t).__name__.lower() for t in ALL} == set(transforms.names())


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_shapes_come_back_and_the_same_draws_give_the_same_bits(transform):
    for shapes in (SHAPES, {"none": (0, 4), "one": (1, 1)}, {"odd": (3, 3), "wide": (5, 2, 3), "number": ()}):
        changes = draw(1, shapes, torch.float32)
        one, two = passed(transform, changes, 5), passed(transform, changes, 5)
        assert {n: tuple(x.shape) for n, x in one.items()} == shapes
        assert all(torch.equal(one[n], two[n]) and one[n].dtype == torch.float32 for n in shapes)


@pytest.mark.parametrize("transform", ALL, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_arrives_as_no_number(transform, bad):
    changes = draw(1, dtype=torch.float32)
    changes["B q"][4, 1] = bad
    assert not all(bool(x.isfinite().all()) for x in passed(transform, changes).values())


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_no_transform_changes_what_it_is_given(transform):
    changes = draw(2)
    before = {n: x.clone() for n, x in changes.items()}
    passed(transform, changes)
    assert all(torch.equal(changes[n], before[n]) for n in changes)


# ---- clip and noise -----------------------------------------------------------------------------------------------------------


def test_clip_scales_all_changes_together_to_the_norm_and_leaves_smaller_ones():
    changes = draw()
    norm = np.linalg.norm(flat(changes))
    np.testing.assert_allclose(flat(passed(make("clip", {"max_norm": 0.5 * norm}), changes)), 0.5 * flat(changes), rtol=1e-12)
    assert np.array_equal(flat(passed(make("clip", {"max_norm": 1.01 * norm}), changes)), flat(changes))


@pytest.mark.parametrize("name, variance", [("gaussian", 0.25), ("laplace", 0.5)])
def test_noise_has_mean_zero_its_variance_and_its_tails(name, variance):
    transform, zero = make(name, {"scale": 0.5}), {"x": torch.zeros(200, 300, dtype=torch.float64)}
    noise = flat(passed(transform, zero))
    assert abs(noise.mean()) < 5 * np.sqrt(variance / 60000)
    assert abs(noise.var() / variance - 1) < 0.05
    kurtosis = (noise**4).mean() / noise.var() ** 2  # 3 and 6
    assert abs(kurtosis - (3 if name == "gaussian" else 6)) < 0.7
    assert not np.array_equal(noise, flat(passed(transform, zero, seed=1)))
    changes = draw()
    np.testing.assert_allclose(
        flat(passed(transform, changes)) - flat(changes),
        flat(passed(transform, {n: 0 * x for n, x in changes.items()})),
        atol=1e-14,
    )


# ---- topk ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density, kept", [(1.0, 431), (0.2, 86), (0.01, 4), (0.0001, 1)])
def test_topk_keeps_the_largest_of_all_tensors_together(density, kept):
    changes = draw()
    x = flat(changes)
    assert len(x) == 431
    limit = np.sort(np.abs(x))[-kept]
    np.testing.assert_array_equal(flat(passed(make("topk", {"density": density}), changes)), np.where(np.abs(x) >= limit, x, 0.0))
    numbers, _ = make("topk", {"density": density}).encode(changes, rng())
    assert sum(v.numel() for v in numbers.values()) == kept


def test_topk_breaks_ties_by_order_and_never_sends_zeros():
    tied = {"a": torch.tensor([[1.0, -2.0], [2.0, 0.0]]), "b": torch.tensor([2.0, 1.0])}
    assert flat(passed(make("topk", {"density": 0.34}), tied)).tolist() == [0, -2, 2, 0, 0, 0]  # two of three
    numbers, _ = make("topk", {"density": 1.0}).encode(tied, rng())
    assert [len(v) for v in numbers.values()] == [3, 2]


def test_topk_says_where_by_bits_or_by_positions_whichever_is_less():
    changes = {"x": draw(0, {"x": (64, 100)}, torch.float32)["x"]}
    for density, expected in ((0.5, 6400 / 8), (0.05, 6400 / 8), (0.01, 64 * 4)):
        _, places = make("topk", {"density": density}).encode(changes, rng())
        assert wire.measure(places).indices == expected


# ---- quantise -----------------------------------------------------------------------------------------------------------------


def rows(x: np.ndarray) -> np.ndarray:
    """One row for each index of the shorter axis."""
    return x.reshape(1, -1) if x.ndim == 1 else x if x.shape[1] >= x.shape[0] else x.T


@pytest.mark.parametrize("to, levels", [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("stochastic, bound", [(True, 1.0), (False, 0.5)])
def test_rounding_errs_by_a_step_of_its_row_or_half_of_it(to, levels, stochastic, bound):
    changes = draw()
    got = passed(make("quantise", {"to": to, "stochastic": stochastic}), changes)
    worst = 0.0
    for name, x in changes.items():
        x, y = rows(x.numpy()), rows(got[name].numpy())
        step = np.abs(x).max(axis=1, keepdims=True) / levels
        worst = max(worst, float((np.abs(y - x) / step).max()))
        codes = y / step
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-9)
        np.testing.assert_allclose(np.abs(codes).max(axis=1), levels, atol=1e-9)  # every code is used
    assert 0.8 * bound < worst <= bound + 1e-9


def test_stochastic_rounding_is_unbiased_and_the_nearest_is_not():
    changes = {"x": torch.tensor([[7.0, 0.3, -2.75, 0.0]], dtype=torch.float64).repeat(1, 1000)}
    for stochastic in (True, False):
        y = passed(make("quantise", {"to": "int4", "stochastic": stochastic}), changes)["x"].numpy().reshape(1000, 4)
        if stochastic:  # steps of 1, so a Bernoulli of 0.3 and of 0.25
            np.testing.assert_allclose(y.mean(axis=0), [7.0, 0.3, -2.75, 0.0], atol=5 * 0.46 / np.sqrt(1000))
            assert set(np.unique(y[:, 1])) == {0.0, 1.0} and set(np.unique(y[:, 2])) == {-3.0, -2.0}
        else:
            assert (y == [7.0, 0.0, -3.0, 0.0]).all()


def test_bf16_has_eight_bits_of_significand():
    changes = draw()
    x, y = flat(changes), flat(passed(make("quantise", {"to": "bf16"}), changes))
    assert 2**-10 < np.abs(y / x - 1).max() <= 2**-8


def test_a_row_of_zeros_stays_zero():
    for to in Format:
        got = passed(make("quantise", {"to": to.value}), {"x": torch.zeros(3, 5)})["x"]
        assert torch.equal(got, torch.zeros(3, 5))


@pytest.mark.parametrize("to, bytes_each", [("bf16", 2), ("int8", 1), ("int4", 0.5)])
def test_quantised_factors_take_the_bytes_of_their_codes_and_a_scale_a_rank(to, bytes_each):
    changes = draw(0, {"A": (4, 300), "B": (501, 4), "odd": (3, 3)}, torch.float32)
    numbers, scales = make("quantise", {"to": to}).encode(changes, rng())
    size = wire.measure((numbers, scales))
    expected = (1200 + 2004) * bytes_each + np.ceil(9 * bytes_each)
    assert size.values + size.indices == expected + (0 if to == "bf16" else 4 * (4 + 4 + 3))
    assert size.total == len(wire.encode((numbers, scales)))


# ---- settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, says",
    [
        ("clp", {}, "unknown transform 'clp'; did you mean clip"),
        ("clip", {}, "clip.max_norm is missing"),
        ("clip", {"max_norm": 0.0}, "clip.* (positive|finite)"),
        ("clip", {"max_norm": float("nan")}, "clip.* (positive|finite)"),
        ("clip", {"maxnorm": 1.0}, "did you mean clip.max_norm"),
        ("gaussian", {"scale": -1.0}, "gaussian.* (positive|finite)"),
        ("laplace", {"scale": float("inf")}, "laplace.* (positive|finite)"),
        ("topk", {"density": 0.0}, "topk.* density"),
        ("topk", {"density": 1.5}, "topk.* density"),
        ("quantise", {"to": "int2"}, r"quantise.to = 'int2'.*'bf16', 'int8' or 'int4'"),
    ],
)
def test_impossible_settings_are_refused_by_name(name, settings, says):
    with pytest.raises(BadInput, match=says) as caught:
        make(name, settings)
    assert "\n" not in str(caught.value)
