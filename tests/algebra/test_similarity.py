"""CKA against its definition on drawn responses, transport against linear programming."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from fedlora.algebra.similarity import cka, closeness, dataset_distance, mixture_distances


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def transport(a, b, cost) -> float:
    """The best coupling's cost, by a general linear program."""
    n, m = cost.shape
    rows = [np.kron(np.eye(n)[i], np.ones(m)) for i in range(n)] + [np.kron(np.ones(n), np.eye(m)[j]) for j in range(m)]
    return linprog(cost.ravel(), A_eq=np.array(rows), b_eq=np.concatenate([a, b]), method="highs").fun


def mixtures(seed: int, classes: int, parts: int, d: int = 4) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(parts), classes)
    weights[0] = [1.0] + [0.0] * (parts - 1)  # a class with one part
    return {
        "shares": torch.from_numpy(rng.dirichlet(np.ones(classes))),
        "weights": torch.from_numpy(weights),
        "means": torch.from_numpy(rng.normal(size=(classes, parts, d))),
        "variances": torch.from_numpy(rng.uniform(0, 2, size=(classes, parts, d))),
    }


def explicit(one, other) -> tuple[np.ndarray, float]:
    """Class by class and part by part: (cost of classes, distance)."""
    cost = np.zeros((len(one["shares"]), len(other["shares"])))
    for i in range(cost.shape[0]):
        for j in range(cost.shape[1]):
            ground = [
                [
                    sum((x - y) ** 2 for x, y in zip(one["means"][i, s].numpy(), other["means"][j, t].numpy(), strict=True))
                    + np.sum((np.sqrt(one["variances"][i, s].numpy()) - np.sqrt(other["variances"][j, t].numpy())) ** 2)
                    for t in range(other["weights"].shape[1])
                ]
                for s in range(one["weights"].shape[1])
            ]
            cost[i, j] = transport(one["weights"][i].numpy(), other["weights"][j].numpy(), np.array(ground))
    return cost, transport(one["shares"].numpy(), other["shares"].numpy(), cost)


def test_cka_is_that_of_responses_to_white_noise():
    C = [{"q": draw(i, 3, 3), "up": draw(10 + i, 3, 3)} for i in range(3)]
    got = cka(C, C)
    Z = np.random.default_rng(7).normal(size=(60_000, 3))
    for i in range(3):
        for j in range(3):
            each = []
            for m in ("q", "up"):
                X, Y = Z @ C[i][m].numpy().T, Z @ C[j][m].numpy().T
                each.append(np.linalg.norm(X.T @ Y) ** 2 / np.linalg.norm(X.T @ X) / np.linalg.norm(Y.T @ Y))
            assert got[i, j] == pytest.approx(np.mean(each), abs=0.02)
    assert got.diagonal().numpy() == pytest.approx([1, 1, 1])
    assert torch.equal(got, got.T) and got.min() > 0 and got.max() < 1 + 1e-12 and got.min() < 0.99


def test_cka_ignores_rotations_of_the_response_and_scale():
    C, D = {"q": draw(1, 3, 3)}, {"q": draw(2, 3, 3)}
    Q = torch.linalg.qr(draw(3, 3, 3))[0]
    assert cka([C], [{"q": 5 * Q @ D["q"]}]) == pytest.approx(float(cka([C], [D])))
    assert cka([C], [{"q": D["q"] @ Q}]) != pytest.approx(float(cka([C], [D])))
    assert cka([C], [{"q": 0 * D["q"]}]) == 0.0


@pytest.mark.parametrize("parts", [(1, 1), (2, 3), (3, 3)])
def test_distances_equal_a_linear_program(parts):
    one, other = mixtures(1, 3, parts[0]), mixtures(2, 5, parts[1])
    cost, whole = explicit(one, other)
    np.testing.assert_allclose(mixture_distances(one, other), cost, atol=1e-9)
    assert dataset_distance(one, other) == pytest.approx(whole)
    assert dataset_distance(other, one) == pytest.approx(whole)
    assert dataset_distance(one, one) == pytest.approx(0.0, abs=1e-12)
    assert whole > 0.5


def test_a_data_set_without_classes_or_with_other_features_has_no_distance():
    none = {name: x[:0] for name, x in mixtures(1, 3, 3).items()}
    assert np.isnan(dataset_distance(none, mixtures(2, 3, 3))) and np.isnan(dataset_distance(mixtures(2, 3, 3), none))
    assert np.isnan(dataset_distance(mixtures(1, 2, 3), mixtures(2, 2, 3, d=5)))


def test_closeness_by_hand():
    d = np.array([[0.0, 2.0, np.nan], [2.0, 0.0, 4.0], [np.nan, 4.0, 0.0]])
    np.testing.assert_array_equal(closeness(d), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(closeness(np.zeros((2, 2))), np.ones((2, 2)))
    np.testing.assert_array_equal(closeness(np.array([[0, np.nan], [np.nan, 0]])), np.ones((2, 2)))
