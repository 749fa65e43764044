"""Sums and scores against scikit-learn, and by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from fedlora.data.dataset import Schema
from fedlora.tasks import classification as metrics
from fedlora.tasks.classification import UNDECIDED, Classes

CLASSES = 8
SCORING = Classes(Schema(tuple(map(str, range(CLASSES)))))


def sums(predicted: np.ndarray, labels: np.ndarray, classes: int = CLASSES) -> dict[str, np.ndarray]:
    """Of these answers, by logits that say so."""
    logits = np.zeros((len(labels), classes), dtype=np.float32)
    logits[np.arange(len(labels)), predicted] = 1.0
    return {"confusion": metrics.confusion(logits, labels), "commonest": np.array([int((labels == 0).sum())])}


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 6, 40), rng.integers(1, 8, 40)  # some classes only in one of the two
    found = sums(predicted, labels)
    assert metrics.accuracy(found) == pytest.approx(accuracy_score(labels, predicted))
    assert metrics.macro_f1(found) == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    assert SCORING.baseline(found) == pytest.approx(accuracy_score(labels, np.zeros_like(labels)))
    assert (found["confusion"][:, :-1] == confusion_matrix(labels, predicted, labels=range(CLASSES))).all()
    own = labels < 3
    assert metrics.accuracy(found, slice(0, 3)) == pytest.approx(accuracy_score(labels[own], predicted[own]))
    own = (labels >= 2) & (labels < 5)
    assert metrics.accuracy(found, slice(2, 5)) == pytest.approx(accuracy_score(labels[own], predicted[own]))


def test_sums_of_parts_add_up() -> None:
    rng = np.random.default_rng(9)
    labels, logits = rng.integers(0, 5, 60), rng.normal(size=(60, 5))
    parts = [metrics.confusion(logits[i::3], labels[i::3]) for i in range(3)]
    assert (sum(parts) == metrics.confusion(logits, labels)).all()


def test_nothing_to_score() -> None:
    none = np.zeros(0, dtype=np.int64)
    found = sums(none, none)
    assert SCORING.count(found) == 0 and np.isnan([metrics.accuracy(found), metrics.macro_f1(found)]).all()


def test_a_confusion_matrix_counts_true_classes_in_rows() -> None:
    found = sums(np.array([0, 2, 2, 1]), np.array([0, 1, 1, 2]), 4)["confusion"]
    assert found.tolist() == [[1, 0, 0, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


def test_what_is_not_finite_is_no_answer() -> None:
    logits = np.array([[0.0, 1.0], [np.nan, 1.0], [2.0, np.inf], [3.0, 1.0]])
    assert metrics.decided(logits).tolist() == [1, UNDECIDED, UNDECIDED, 0]
    found = {"confusion": metrics.confusion(logits, np.array([1, 1, 1, 0]))}
    assert found["confusion"].tolist() == [[1, 0, 0], [0, 1, 2]]
    assert metrics.accuracy(found) == 0.5 and SCORING.undecided(found) == 2
    assert metrics.macro_f1(found) == pytest.approx((1 + 2 / 4) / 2)  # class 1: one hit of three, one prediction
    assert metrics.macro_f1({"confusion": np.array([[0, 0, 1], [0, 0, 0]])}) == 0.0
