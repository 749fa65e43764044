"""Rules by hand: what counts as a loss that still falls."""

import pytest

from fedlora.scores import still_falling


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([], False),
        ([2.0], False),
        ([2.0, 1.9], True),  # 5 % below
        ([2.0, 1.97], False),  # 1.5 % below
        ([2.872, 2.817, 2.679, 2.637, 2.579, 2.564], True),  # the last two of six are 5.143, the two before 5.316: 3.3 % below
        ([3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], False),  # it has come to rest
        ([9.0] * 8 + [2.6, 2.0, 2.9, 2.1, 2.5, 1.8, 2.7, 2.0], False),  # 6 % below, and two standard errors are 0.6: other clients
        ([9.0] * 8 + [2.6, 2.5, 2.6, 2.5, 2.3, 2.2, 2.3, 2.2], True),  # 12 % below, and two standard errors are 0.08
        ([1.0, None], False),
        ([1.0, float("nan")], False),
        ([1.0, 2.0, 3.0, 4.0], False),
    ],
)
def test_a_loss_that_still_falls(losses: list[float | None], verdict: bool) -> None:
    assert still_falling(losses) is verdict
