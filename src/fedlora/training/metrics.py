"""What a classifier's predictions are worth."""

import numpy as np

UNDECIDED = -1  # the class of a text for which a model gives no finite numbers: never right


def decided(logits: np.ndarray) -> np.ndarray:
    """The class (n,) with the largest of logits (n, C), or UNDECIDED where that is no finite number. The classes of other domains
    are at -inf."""
    return np.where(np.isfinite(logits.max(axis=1)), logits.argmax(axis=1), UNDECIDED)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of correct predictions; nan without examples."""
    return float((predicted == labels).mean()) if len(labels) else float("nan")


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur, among labels or predictions, of 2 TP / (2 TP + FP + FN); nan without examples."""
    if not len(labels):
        return float("nan")
    classes = int(max(predicted.max(), labels.max())) + 1
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(predicted[predicted >= 0], minlength=classes)
    return float((2 * hits[either > 0] / either[either > 0]).mean())


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often each class (row) was predicted as each (column): (classes, classes) integers."""
    known = predicted >= 0
    return np.bincount(labels[known] * classes + predicted[known], minlength=classes * classes).reshape(classes, classes)
