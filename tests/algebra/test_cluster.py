"""Clustering by inner products, against explicit distances and against scipy's own trees."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from fedlora.algebra import cluster

SHAPES = {"q": (12, 2), "up": (20, 2)}


def points(count: int, seed: int = 0, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{m: scale * torch.randn(s, generator=g, dtype=torch.float64) for m, s in SHAPES.items()} for _ in range(count)]


def groups(sizes: tuple[int, ...], spread: float = 0.05) -> list[dict[str, torch.Tensor]]:
    centres, noise = points(len(sizes), 1), points(sum(sizes), 2, spread)
    owner = [j for j, n in enumerate(sizes) for _ in range(n)]
    return [{m: centres[j][m] + x[m] for m in SHAPES} for j, x in zip(owner, noise, strict=True)]


def flat(x) -> np.ndarray:
    return np.concatenate([t.numpy().ravel() for t in x.values()])


def explicit_cosine(x, y) -> float:
    parts = [(x[m].numpy().ravel(), y[m].numpy().ravel()) for m in SHAPES]
    return float(np.mean([1 - a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in parts]))


def together(labels) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(np.asarray(labels) == j).tolist()) for j in set(np.asarray(labels).tolist())}


def test_coordinates_keep_every_distance_whatever_all_share() -> None:
    xs = points(5)
    for offset in (0.0, 1e6):
        places = cluster.coordinates([{m: t + offset for m, t in x.items()} for x in xs])
        assert places.shape == (5, 5)
        for i in range(5):
            for j in range(5):
                expected = np.linalg.norm(flat(xs[i]) - flat(xs[j]))
                assert np.linalg.norm(places[i] - places[j]) == pytest.approx(expected, abs=1e-6)


def test_directions_are_unit_vectors_with_the_cosines_seen_from_the_origin() -> None:
    *xs, origin = points(5)
    *places, at = cluster.coordinates([*xs, origin])
    units = cluster.directions(np.stack([*places, at]), at)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), [1, 1, 1, 1, 0], atol=1e-12)
    for i in range(4):
        for j in range(4):
            a, b = flat(xs[i]) - flat(origin), flat(xs[j]) - flat(origin)
            assert units[i] @ units[j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-9)


def test_cosine_distances_are_symmetric_zero_on_themselves_and_blind_to_scale() -> None:
    xs = points(5)
    d = cluster.cosine_distances(xs)
    assert np.array_equal(d, d.T) and not d.diagonal().any()
    for i in range(5):
        for j in range(5):
            assert d[i, j] == pytest.approx(explicit_cosine(xs[i], xs[j]) if i != j else 0.0, abs=1e-12)
    stretched = [{"q": 3.0 * (i + 1) * x["q"], "up": 0.1 * x["up"]} for i, x in enumerate(xs)]
    np.testing.assert_allclose(cluster.cosine_distances(stretched), d, atol=1e-12)


def test_cosine_distance_of_zeros() -> None:
    one, zero = points(1)[0], {m: torch.zeros(s, dtype=torch.float64) for m, s in SHAPES.items()}
    np.testing.assert_allclose(cluster.cosine_distances([zero, one, zero]), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_kmeans_finds_separated_groups_in_any_order() -> None:
    xs = groups((3, 5, 2))
    truth = [0] * 3 + [1] * 5 + [2] * 2
    for order in (range(10), [9, 0, 4, 7, 2, 1, 8, 3, 6, 5]):
        labels = cluster.kmeans(cluster.coordinates([xs[i] for i in order]), 3, seed=1)
        assert cluster.adjusted_rand(labels.tolist(), [truth[i] for i in order]) == 1.0
        assert cluster.purity(labels.tolist(), [truth[i] for i in order]) == 1.0


def test_kmeans_with_no_more_points_than_clusters_gives_each_its_own() -> None:
    xs = points(3)
    assert cluster.kmeans(cluster.coordinates(xs), 3, 0).tolist() == [0, 1, 2]
    assert cluster.kmeans(cluster.coordinates(xs), 7, 0).tolist() == [0, 1, 2]
    assert cluster.kmeans(cluster.coordinates([xs[0], xs[1], xs[0]]), 2, 0).tolist() == [0, 1, 0]  # what is alike is one point
    assert cluster.kmeans(cluster.coordinates([xs[0]]), 2, 0).tolist() == [0]
    assert cluster.kmeans(cluster.coordinates(xs), 1, 0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9])
def test_average_linkage_equals_scipys(count: int) -> None:
    d = cluster.cosine_distances(points(6, seed=3))
    tree = linkage(squareform(d), method="average")
    assert together(cluster.average_linkage(d, count)) == together(fcluster(tree, min(count, 6), criterion="maxclust"))


def test_silhouettes_by_their_definition() -> None:
    d = cluster.cosine_distances(groups((3, 4), 0.4))
    found = cluster.silhouettes(d, 8)
    assert list(found) == [2, 3, 4, 5, 6]
    assert max(found, key=found.__getitem__) == 2
    for count, score in found.items():
        labels, parts = cluster.average_linkage(d, count), []
        for i in range(7):
            own = [j for j in range(7) if labels[j] == labels[i] and j != i]
            a = d[i, own].mean() if own else 0.0
            b = min(d[i, labels == c].mean() for c in set(labels.tolist()) - {labels[i]})
            parts.append((b - a) / max(a, b) if own else 0.0)
        assert score == pytest.approx(np.mean(parts))
    assert list(cluster.silhouettes(d, 3)) == [2, 3]
    assert cluster.silhouettes(d[:2, :2], 8) == {}


def test_purity_and_rand_by_hand() -> None:
    assert cluster.purity([0, 0, 0, 1, 1], ["a", "a", "b", "b", "b"]) == pytest.approx(4 / 5)
    assert cluster.purity([0, 0, 0, 0], ["a", "b", "a", "b"]) == pytest.approx(1 / 2)
    assert cluster.adjusted_rand([1, 1, 0, 0], ["a", "a", "b", "b"]) == 1.0
    assert cluster.adjusted_rand([0, 0, 0, 0], ["a", "b", "a", "b"]) == 0.0


def test_renamed_numbers_clusters_as_they_occur() -> None:
    assert cluster.renamed([5, 2, 5, 0]).tolist() == [0, 1, 0, 2]
