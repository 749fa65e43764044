"""Rules by hand: how a score is shown, what counts as a tie and as no better than a constant answer, which sums fit."""

import numpy as np
import pytest

from fedlora.data.dataset import Schema
from fedlora.tasks.classification import Classes
from fedlora.tasks.metrics import CLASSIFICATION, Metric, fit, total

ACCURACY = CLASSIFICATION[0]
ERROR = Metric("mse", "mean squared error", unit="", better="lower")


def test_what_is_shown_alike_is_a_tie() -> None:
    assert ACCURACY.shown(0.33841) == ACCURACY.shown(0.33799) == 33.8
    assert ACCURACY.shown(0.3386) == 33.9
    assert ERROR.shown(0.12345) == ERROR.shown(0.1226) == 0.123 and ERROR.shown(1234.5) == 1230


def test_a_score_in_words() -> None:
    assert (ACCURACY.text(0.5), ACCURACY.number(0.5), ACCURACY.text(None)) == ("50.0 %", "50.0", "-")
    assert (ERROR.text(0.12345), ERROR.text(None), Metric("mae", "error", unit="years").text(2.5)) == ("0.123", "-", "2.5 years")
    assert (ACCURACY.points(0.25), ERROR.points(0.25)) == (25.0, 0.25)


@pytest.mark.parametrize(("accuracy", "commonest", "verdict"), [(0.3, 0.3, True), (0.3004, 0.3, True), (0.301, 0.3, False)])
def test_no_better_than_the_commonest_class(accuracy: float, commonest: float, verdict: bool) -> None:
    assert ACCURACY.no_better(accuracy, commonest) is verdict
    assert not ACCURACY.no_better(accuracy, None)


def test_an_error_is_better_the_lower_it_is() -> None:
    assert ERROR.ahead(0.1, 0.2) and not ERROR.ahead(0.2, 0.1) and ACCURACY.ahead(0.2, 0.1) and not ACCURACY.ahead(0.2, 0.2)
    assert ERROR.no_better(0.5, 0.4) and ERROR.no_better(0.4001, 0.4) and not ERROR.no_better(0.3, 0.4)


def test_sums_are_added_and_hostile_ones_refused() -> None:
    scoring = Classes(Schema(("a", "b")))
    one = {"confusion": np.array([[1, 0, 0], [0, 2, 0]]), "commonest": np.array([1])}
    assert scoring.scores(total(scoring, [one, one]))["accuracy"] == 1.0 and scoring.count(total(scoring, [])) == 0
    assert fit(scoring, one)
    for bad in (
        None,
        {},
        {"confusion": one["confusion"]},
        one | {"more": np.array([1])},
        one | {"confusion": one["confusion"].astype(float)},
        one | {"confusion": -one["confusion"]},
        one | {"commonest": np.array([1, 2])},
        one | {"commonest": [1]},
    ):
        assert not fit(scoring, bad)
