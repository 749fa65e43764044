"""Which ranks are best, and whose turn it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.algebra.alternate import roles_changed, trained_role
from fedlora.algebra.select import top_mask


def picked(masks: dict[str, torch.Tensor]) -> list[tuple[str, int]]:
    return [(m, i) for m, mask in masks.items() for i in mask.flatten().nonzero().flatten().tolist()]


def test_top_mask_by_hand():
    scores = {"b": torch.tensor([1.0, 5.0, 2.0]), "a": torch.tensor([4.0, 3.0])}
    assert picked(top_mask(scores, 3)) == [("b", 1), ("a", 0), ("a", 1)]
    assert picked(top_mask(scores, 0)) == [] and len(picked(top_mask(scores, 99))) == 5
    masks = top_mask({"m": torch.tensor([[1.0, 2.0], [4.0, 3.0]])}, 2)
    assert masks["m"].tolist() == [[False, False], [True, True]] and masks["m"].dtype == torch.bool


def test_ties_go_to_the_earlier_module_then_to_the_earlier_entry():
    scores = {"b": torch.tensor([1.0, 2.0, 1.0]), "a": torch.tensor([1.0, 1.0])}
    assert [picked(top_mask(scores, n)) for n in (1, 2, 3, 4)] == [
        [("b", 1)],
        [("b", 0), ("b", 1)],
        [("b", 0), ("b", 1), ("b", 2)],
        [("b", 0), ("b", 1), ("b", 2), ("a", 0)],
    ]
    many = top_mask({"m": torch.ones(5000)}, 1234)["m"]  # an unstable sort would show here
    assert many[:1234].all() and not many[1234:].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_top_mask_refuses_scores_that_are_not_finite(bad):
    """A NaN sorts above every number."""
    with pytest.raises(ValueError, match="finite"):
        top_mask({"m": torch.tensor([1.0, 2.0]), "n": torch.tensor([3.0, bad])}, 1)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 30))
def test_top_mask_is_the_head_of_a_sorted_list(scores, count):
    tensors = {str(m): torch.tensor(s, dtype=torch.float32) for m, s in enumerate(scores)}
    ordered = sorted((-s, m, i) for m, row in enumerate(scores) for i, s in enumerate(row))
    assert picked(top_mask(tensors, count)) == sorted(((str(m), i) for _, m, i in ordered[:count]), key=lambda x: (int(x[0]), x[1]))


def test_B_first_then_by_turns():
    assert "".join(trained_role(t) for t in range(1, 7)) == "BABABA"


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(0, 12))
def test_roles_changed_is_what_a_simulation_changes(since, more):
    """Counters in the place of factors, and one more in every round for the one that trains."""
    history = [np.array([0, 0])]
    for t in range(1, since + more + 1):
        history.append(history[-1] + ([1, 0] if t % 2 == 0 else [0, 1]))
    a, b = history[since + more] != history[since]
    assert roles_changed(since, since + more) == {role for role, moved in (("A", a), ("B", b)) if moved}
