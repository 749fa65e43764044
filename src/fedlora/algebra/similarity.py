"""How alike clients are: by the maps that they have learned, and by mixtures of Gaussians fitted to their data.

    CKA(C_i, C_j) = ||C_i C_j'||_F^2 / (||C_i C_i'||_F ||C_j C_j'||_F)

is linear CKA of the responses C_i z, C_j z to white noise z, in closed form. It is the cosine of the Gram matrices C_i'C_i and
C_j'C_j, so n clients cost O(n r^3 + n^2 r^2).

    d(a, b) = min over couplings of the parts' weights of sum_st P_st W_2^2(N_as, N_bt)
    W_2^2(N_a, N_b) = ||mean_a - mean_b||^2 + ||deviation_a - deviation_b||^2         (diagonal covariances)

is the optimal transport distance of two mixtures over their parts, and the distance of two data sets is the same once more over
their classes, with d as the cost and the shares of the classes as the weights (Delon and Desolneux 2020; Alvarez-Melis and Fusi
2020).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = Mapping[str, Tensor]
Floats = NDArray[np.float64]
MOST_PARTS = 3  # of one mixture: two of them have 81 couplings to try


def cka(one: Sequence[Tensors], other: Sequence[Tensors]) -> Tensor:
    """(n, m) in float64: the CKA of every C of the one with every C of the other, mean over modules. With a zero C it is 0."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for m in one[0]:
        total += _grams(one, m) @ _grams(other, m).mT
    return total / len(one[0])


def _grams(clients: Sequence[Tensors], m: str) -> Tensor:
    """C'C of every client in one row of length 1, (n, r^2)."""
    C = torch.stack([client[m].to(torch.float64) for client in clients])
    gram = (C.mT @ C).flatten(1)
    norm = gram.norm(dim=1, keepdim=True)
    rows: Tensor = gram / norm.where(norm > 0, 1.0)
    return rows


def dataset_distance(one: Tensors, other: Tensors) -> float:
    """The distance of two data sets; nan where one has no class at all, or features of another kind.

    Each is given as "shares" (c,), and of its c classes' mixtures "weights" (c, k), "means" (c, k, d), "variances" (c, k, d).
    """
    if not (len(one["shares"]) and len(other["shares"])) or one["means"].shape[2] != other["means"].shape[2]:
        return float("nan")
    import ot

    cost = mixture_distances(one, other)
    return max(0.0, float(ot.emd2(_share(one["shares"]), _share(other["shares"]), cost)))


def mixture_distances(one: Tensors, other: Tensors) -> Floats:
    """(c, c'): d of every class's mixture of the one to every class's of the other."""
    a, b = _share(one["weights"]), _share(other["weights"])
    (n, k), (m, l) = a.shape, b.shape
    cost = (_ground(one, other, "means") + _ground(one, other, "variances")).reshape(n, k, m, l).transpose(0, 2, 1, 3)
    from_a, from_b = _couplings(k, l)
    best: Floats = np.full((n, m), np.inf)
    for rows in range(n):  # a class at a time: (c', couplings, k l) numbers
        plans = (from_a @ a[rows]) + np.einsum("teb,nb->nte", from_b, b)
        costs = np.einsum("nte,ne->nt", plans, cost[rows].reshape(m, k * l))
        best[rows] = np.where(plans.min(axis=2) >= -1e-9, costs, np.inf).min(axis=1)
    return best.clip(min=0.0)


def _share(x: Tensor) -> Floats:
    """Rows that sum to 1 in float64, as transport wants them."""
    y: Floats = x.double().clamp_min(0.0).numpy()
    total: Floats = y.sum(axis=-1, keepdims=True)
    rows: Floats = np.where(total > 0, y, 1.0) / np.where(total > 0, total, y.shape[-1])
    return rows


def _ground(one: Tensors, other: Tensors, name: str) -> Floats:
    """||x_s - y_t||^2 of all parts of all classes, (c k, c' l); of variances, their roots."""
    x, y = (data[name].double().flatten(0, 1) for data in (one, other))
    if name == "variances":
        x, y = x.clamp_min(0.0).sqrt(), y.clamp_min(0.0).sqrt()
    squares: Floats = (torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2).numpy()
    return squares


@cache
def _couplings(k: int, l: int) -> tuple[Floats, Floats]:
    """Every vertex of the couplings of k with l parts, as linear maps of the weights: (T, k l, k) and (T, k l, l).

    A best coupling is a vertex, and a vertex lives on a spanning tree of the complete bipartite graph, where the weights leave no
    choice. A tree whose plan has a negative entry does not fit the weights at hand.
    """
    assert k <= MOST_PARTS and l <= MOST_PARTS
    sums = np.zeros((k + l, k * l))
    for s, t in product(range(k), range(l)):
        sums[s, s * l + t] = sums[k + t, s * l + t] = 1.0
    maps = []
    for edges in combinations(range(k * l), k + l - 1):
        chosen = sums[:, edges]
        if np.linalg.matrix_rank(chosen) == k + l - 1:
            full = np.zeros((k * l, k + l))
            full[list(edges)] = np.linalg.pinv(chosen)
            maps.append(full)
    stacked = np.stack(maps)
    return stacked[:, :, :k], stacked[:, :, k:]


def closeness(distances: Floats) -> Floats:
    """1 - d / max d; what is not known (nan) counts as farthest. All ones where all distances are zero or none is known."""
    known = distances[np.isfinite(distances)]
    farthest = float(known.max()) if known.size else 0.0
    if farthest == 0.0:
        return np.ones_like(distances)
    return 1.0 - np.where(np.isfinite(distances), distances, farthest) / farthest
