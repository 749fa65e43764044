"""What a classifier's answers are worth: sums that add up over clients, and the scores that they make. Without torch.

confusion   (C, C + 1) integers: how often each class (row) was taken for each (column); the last column counts the examples for
            which a model gives no finite numbers, which are never right
commonest   (1,) integers: the examples that would be right if the answer were always the commonest training class
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
UNDECIDED = -1  # the class of a text for which a model gives no finite numbers


def decided(logits: Array) -> Array:
    """The class (n,) with the largest of logits (n, C), or UNDECIDED where that is no finite number. The classes of other domains
    are at -inf."""
    return np.where(np.isfinite(logits.max(axis=1)), logits.argmax(axis=1), UNDECIDED)


def confusion(logits: Array, labels: Array) -> Array:
    """The sum of that name over these examples."""
    classes = logits.shape[1]
    taken = decided(logits) % (classes + 1)  # UNDECIDED is the last column
    return np.bincount(labels * (classes + 1) + taken, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def count(sums: Mapping[str, Array]) -> int:
    """How many examples were scored."""
    return int(sums["confusion"].sum())


def undecided(sums: Mapping[str, Array]) -> int:
    """For how many of them a model gave no finite numbers."""
    return int(sums["confusion"][:, -1].sum())


def accuracy(sums: Mapping[str, Array], classes: slice = slice(None)) -> float:
    """The share of examples, of these classes alone, that were right; nan without examples."""
    taken = sums["confusion"][classes]
    return _share(int(np.trace(taken, offset=classes.start or 0)), int(taken.sum()))


def commonest_accuracy(sums: Mapping[str, Array]) -> float:
    """What the same examples give where the answer is always the commonest training class."""
    return _share(int(sums["commonest"].sum()), count(sums))


def macro_f1(sums: Mapping[str, Array]) -> float:
    """Mean over the classes that occur, among labels or answers, of 2 TP / (2 TP + FP + FN); nan without examples."""
    taken = sums["confusion"]
    hits, either = np.diag(taken), taken.sum(axis=1) + taken[:, :-1].sum(axis=0)
    return float((2 * hits[either > 0] / either[either > 0]).mean()) if taken.any() else float("nan")


def scores(sums: Mapping[str, Array]) -> dict[str, float]:
    """The scores of a model, by name; the first is the one that runs are compared by."""
    return {"accuracy": accuracy(sums), "macro_f1": macro_f1(sums)}


def _share(right: int, of: int) -> float:
    return right / of if of else float("nan")
