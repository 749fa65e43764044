import numpy as np
import pytest

from fedlora.config import resolve
from fedlora.data.bands import PARTS, STATISTICS, Band, over_seeds
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.domains import deal


def test_a_band_leaves_one_in_forty_out_at_each_end():
    """Of 1 to 1000, 25 are left out below 26 and 25 above 975."""
    band = Band(np.random.default_rng(0).permutation(np.arange(1, 1001)))
    assert (band.low, band.median, band.high) == (26, 500, 975)
    assert 26 in band and 975 in band and 25 not in band and 976 not in band
    assert (band.as_far(3), band.as_far(998), band.as_far(0), band.as_far(1001)) == (3, 3, 0, 0)


def test_a_statistic_that_never_changes_is_a_band_of_one_value():
    band = Band(np.full(10, 20))
    assert (band.low, band.high) == (20, 20) and 20 in band and 19 not in band


@pytest.mark.parametrize("seeds", [range(3), [7]])
def test_statistics_are_those_of_the_splits_that_runs_have(seeds):
    labels = np.arange(400, dtype=np.int64) % 5
    dataset = Dataset("toy", Split(("x",) * 400, labels), Split(("x",) * 100, labels[:100]), Schema(tuple("abcde")))
    config = resolve({"data": {"alpha": 0.3}, "clients": {"count": 6}})
    found = over_seeds(dataset, config.data, config.clients, seeds)
    assert set(found) == {(p, s) for p in PARTS for s in STATISTICS}
    for i, seed in enumerate(seeds):
        parts = deal(dataset, config.data, config.clients, seed)
        for part, rows, y in (("train", parts.train, labels), ("test", parts.test, labels[:100])):
            assert found[part, "max_examples"][i] == max(map(len, rows)) and found[part, "min_examples"][i] == min(map(len, rows))
            classes = [len(set(y[mine].tolist())) for mine in rows]
            assert found[part, "max_classes"][i] == max(classes) and found[part, "min_classes"][i] == min(classes)
