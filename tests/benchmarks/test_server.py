"""Ours and the dense formulas of the peers come to the same model."""

import pytest

from benchmarks import server


@pytest.mark.parametrize("d, K", [(160, 3), (40, 12)], ids=["by factors", "as the matrix"])
@pytest.mark.parametrize("name", server.CASES)
def test_ours_and_the_dense_formula_agree_in_float32(name, d, K, monkeypatch):
    monkeypatch.setattr(server, "MOST_TIMES", 1)
    row = server.measure(name, d, K)
    assert row["largest difference"] < 1e-6 and row["repetitions"] == 1
