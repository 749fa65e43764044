"""What shares a forward pass."""

import numpy as np
import pytest

from fedlora.data.encoded import Encoded
from fedlora.training.passes import ALIGNED, filled_up


def texts(*lengths: int, trained: bool = False) -> Encoded:
    ids = tuple(np.arange(10 * n, 10 * n + n, dtype=np.int32) for n in lengths)
    masks = tuple(np.arange(n) > 0 for n in lengths) if trained else ()
    return Encoded(ids, np.arange(len(ids)), np.array(lengths), trained=masks)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 1), (50, 20, 3), (40, 90), (31, 64, 33), (200, 5)])
def test_texts_are_filled_up_to_few_numbers_of_tokens(lengths: tuple[int, ...], trained: bool) -> None:
    data = texts(*lengths, trained=trained)
    filled = filled_up(data)
    tokens, after = sum(lengths), sum(map(len, filled.inputs))
    assert tokens <= after <= tokens * 4 / 3
    assert tokens < 4 * ALIGNED or after % ALIGNED == 0
    for given, own in zip(filled.inputs, data.inputs, strict=False):
        assert np.array_equal(given, own)
    for more in filled.inputs[len(data) :]:
        assert len(more) and np.array_equal(more, data.inputs[-1][: len(more)])
    assert [len(x) for x in filled.trained] == ([len(x) for x in filled.inputs] if trained else [])
    assert sum(int(x.sum()) for x in filled.trained) == sum(int(x.sum()) for x in data.trained)


def test_so_a_few_hundred_texts_have_few_numbers() -> None:
    counts = {sum(map(len, filled_up(texts(n, 20)).inputs)) for n in range(1, 500)}
    assert len(counts) < 40
