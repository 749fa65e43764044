"""Metrics against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from fedlora.training.metrics import accuracy, macro_f1


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 6, 40), rng.integers(1, 8, 40)  # some classes only in one of the two
    assert accuracy(predicted, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert macro_f1(predicted, labels) == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


def test_nothing_to_score() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert np.isnan(accuracy(none, none)) and np.isnan(macro_f1(none, none))
