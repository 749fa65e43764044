"""Statistics of a client's own data, for the methods whose server or gate needs them. They are made of features of texts (see
`types.Observe`), never of the texts.

A class's mixture is fitted with a diagonal covariance, 1e-5 added to its variances, at most 200 steps of EM; a class with fewer
examples than components has a component for each example.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedlora import seeds
from fedlora.models.packing import Inputs
from fedlora.types import ClassMixtures, Features, Statistic, Tensors


def observe(statistic: Statistic, labels: np.ndarray, features: Callable[[np.ndarray], Tensor], seed: int) -> Tensors:
    """The statistic of n examples.

    Args:
        labels: (n,).
        features: positions (k,) among the examples -> their features (k, d).
    """
    if isinstance(statistic, Features):
        drawn = seeds.generator(seed, "examples").permutation(len(labels))[: statistic.count]
        return {"features": features(np.sort(drawn))}
    x = features(np.arange(len(labels)))
    return _mixtures(statistic, labels, x.numpy(), seed)


def _mixtures(statistic: ClassMixtures, labels: np.ndarray, x: np.ndarray, seed: int) -> Tensors:
    kept, counts = np.unique(labels, return_counts=True)
    kept, counts = kept[counts >= 2], counts[counts >= 2]
    c, k, d = len(kept), statistic.components, x.shape[1]
    weights, means, variances = np.zeros((c, k)), np.zeros((c, k, d)), np.zeros((c, k, d))
    for i, label in enumerate(kept):
        w, m, v = _fit(x[labels == label], k, seeds.derive(seed, "mixture", int(label)))
        weights[i, : len(w)], means[i, : len(w)], variances[i, : len(w)] = w, m, v
    parts = {name: torch.from_numpy(y.astype(x.dtype)) for name, y in (("weights", weights), ("means", means))}
    return {
        "labels": torch.from_numpy(kept.astype(np.int64)),
        "counts": torch.from_numpy(counts.astype(np.int64)),
        **parts,
        "variances": torch.from_numpy(variances.astype(x.dtype)),
    }


def _fit(x: np.ndarray, components: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (k,), means (k, d) and variances (k, d) of a Gaussian mixture."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        min(components, len(x)), covariance_type="diag", reg_covar=1e-5, max_iter=200, tol=1e-3, random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # texts that occur twice: fewer different points than components
        mixture.fit(x.astype(np.float64))
    return mixture.weights_, mixture.means_, mixture.covariances_


def similarity_weights(features: Tensor, anchors: Tensor, cap: float) -> Tensor:
    """(n,): cap times the mean cosine of each row of (n, d) to the anchors (count, d)."""
    cosines = normalize(features.to(torch.float32), dim=1) @ normalize(anchors.to(features.device, torch.float32), dim=1).mT
    return cap * cosines.mean(dim=1)


def mean_of_each(hidden: Tensor, inputs: Inputs) -> Tensor:
    """The mean over the tokens of each text, (n, d), of the hidden states of all rows (rows, d)."""
    weight = torch.ones(len(hidden), device=hidden.device) if inputs.mask is None else inputs.mask.flatten().float()
    text = torch.from_numpy(np.repeat(np.arange(len(inputs.lengths)), inputs.lengths)).to(hidden.device)
    sums = hidden.new_zeros(len(inputs.lengths), hidden.shape[1]).index_add_(0, text, hidden * weight[:, None])
    counts = weight.new_zeros(len(inputs.lengths)).index_add_(0, text, weight)
    return sums / counts.clamp_min(1)[:, None]


def first_of_each(hidden: Tensor, inputs: Inputs) -> Tensor:
    """The first token of each text, (n, d)."""
    starts = torch.from_numpy(np.cumsum(inputs.lengths) - inputs.lengths).to(hidden.device)
    return hidden[starts if inputs.mask is None else starts + inputs.mask.argmax(dim=1)]
