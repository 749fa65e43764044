"""What a classifier's predictions are worth."""

import numpy as np


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of correct predictions; nan without examples."""
    return float((predicted == labels).mean()) if len(labels) else float("nan")


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur, among labels or predictions, of 2 TP / (2 TP + FP + FN); nan without examples."""
    if not len(labels):
        return float("nan")
    classes = int(max(predicted.max(), labels.max())) + 1
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(labels, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * hits[either > 0] / either[either > 0]).mean())
