"""Clustering a few large models: everything is computed from their inner products, so a model is read once.

With n models of P numbers each a Gram matrix costs O(n^2 P), and clustering then works in n dimensions however large P is.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = Mapping[str, Tensor]
Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def coordinates(points: Sequence[Tensors]) -> Floats:
    """(n, n): points of n dimensions with the distances that the models, flattened, have from each other."""
    gram = np.zeros((len(points), len(points)))
    for m in points[0]:
        rows = _rows(points, m)
        rows -= rows.mean(dim=0)  # what all share, such as a common start, would drown what sets them apart
        gram += (rows @ rows.T).numpy()
    values, vectors = np.linalg.eigh(gram)
    places: Floats = vectors * np.sqrt(np.maximum(values, 0.0))
    return places


def directions(places: Floats, origin: Floats) -> Floats:
    """(n, d): the unit vectors that lead from the origin (d,) to each place (n, d); zero where a place is the origin."""
    ways = places - origin
    lengths: Floats = np.linalg.norm(ways, axis=1, keepdims=True)
    units: Floats = ways / np.where(lengths > 0, lengths, 1.0)
    return units


def cosine_distances(points: Sequence[Tensors]) -> Floats:
    """(n, n): the mean over modules of 1 - cos(x_i, x_j). Of two zero tensors the distance is 0, of a zero and another 1."""
    total = np.zeros((len(points), len(points)))
    for m in points[0]:
        rows = _rows(points, m)
        norms = rows.norm(dim=1, keepdim=True)
        rows = rows / norms.where(norms > 0, 1.0)
        zero = (norms[:, 0] == 0).numpy()
        total += 1.0 - np.where(zero[:, None] & zero[None, :], 1.0, (rows @ rows.T).numpy())
    distances = np.maximum((total + total.T) / (2 * len(points[0])), 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def kmeans(places: Floats, count: int, seed: int, tries: int = 10) -> Labels:
    """The cluster of each point: the best of `tries` runs of K-means. With no more different points than clusters, each is its
    own. The order of the points decides nothing but the names of the clusters, as far as the best run is the best there is."""
    if count == 1:
        return np.zeros(len(places), dtype=np.int64)
    scale = float(np.abs(places).max()) or 1.0
    _, alike = np.unique(np.round(places / scale, 6), axis=0, return_inverse=True)
    if alike.max() < count:
        return renamed(alike)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer clusters than asked for: the others stay empty
        return renamed(KMeans(count, n_init=tries, random_state=seed % 2**32).fit(places).labels_)


def average_linkage(distances: Floats, count: int) -> Labels:
    """Agglomerative clustering: the two clusters with the least mean distance merge until `count` are left."""
    if count >= len(distances):
        return np.arange(len(distances), dtype=np.int64)
    from sklearn.cluster import AgglomerativeClustering

    return renamed(AgglomerativeClustering(count, metric="precomputed", linkage="average").fit(distances).labels_)


def silhouettes(distances: Floats, most: int) -> dict[int, float]:
    """Number of clusters -> mean silhouette of the average linkage, from 2 to `most`; below n, where it is defined."""
    from sklearn.metrics import silhouette_score

    counts = range(2, min(most, len(distances) - 1) + 1)
    return {m: float(silhouette_score(distances, average_linkage(distances, m), metric="precomputed")) for m in counts}


def renamed(labels: Iterable[int]) -> Labels:
    """The same clusters, numbered in the order in which they first occur."""
    names: dict[int, int] = {}
    return np.array([names.setdefault(int(label), len(names)) for label in labels], dtype=np.int64)


def purity(labels: Sequence[int], truth: Sequence[object]) -> float:
    """The share of points whose true class is the most frequent one of their cluster; 1 where clusters are pure."""
    best = 0
    for cluster in set(labels):
        inside = [t for label, t in zip(labels, truth, strict=True) if label == cluster]
        best += max(inside.count(t) for t in set(inside))
    return best / len(labels)


def adjusted_rand(labels: Sequence[int], truth: Sequence[object]) -> float:
    """The adjusted Rand index of two clusterings: 1 where they are the same, about 0 by chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(_numbered(truth), list(labels)))


def _numbered(truth: Sequence[object]) -> list[int]:
    first = list(dict.fromkeys(truth))
    return [first.index(t) for t in truth]


def _rows(points: Sequence[Tensors], m: str) -> Tensor:
    return torch.stack([point[m].detach().flatten().to(torch.float64) for point in points])
