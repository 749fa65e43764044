"""RoLoRA (2502.01755)."""

import pytest
import torch
from toy import SHAPES, Trainer, federate, make_clients, make_setup, same

from fedlora.methods.rolora import RoLoRA, State, Up
from fedlora.types import SHARED, Client, Factors, Reply


def test_B_trains_first_and_then_they_take_turns():
    """Starting with A while B is zero trains nothing, as one public library does."""
    setup = make_setup(make_clients((2, 2)))
    trainer = Trainer(setup)
    run = federate(RoLoRA(), setup, 4, trainer=trainer)
    assert [ask.roles for _, ask, _ in trainer.log[::2]] == [{(SHARED, role)} for role in "BABA"]
    for t, moves, rests in ((1, "B", "A"), (2, "A", "B"), (3, "B", "A"), (4, "A", "B")):
        before, after = run.states[t - 1].shared, run.states[t].shared
        assert same(getattr(before, rests), getattr(after, rests))
        assert all(not torch.equal(getattr(before, moves)[m], getattr(after, moves)[m]) for m in SHAPES)


@pytest.mark.parametrize("uniform, B, A", [(True, 16.0, 5.0), (False, 17.0, 6.0)])
def test_means_by_hand(uniform, B, A):
    """n = 1 and 3; changes 4 and 8 of B from 10: +6 uniform, +7 by examples. Changes 0 and 4 of A from 3: +2 and +3."""
    method = RoLoRA(uniform_weights=uniform)
    one = {"m": torch.tensor([[1.0]])}
    state = State(Factors({"m": torch.tensor([[3.0]])}, {"m": torch.tensor([[10.0]])}, 2.0))
    clients = [Client(0, 1, 1), Client(4, 1, 3)]
    ups = [Up(B={"m": 4 * one["m"]}), Up(B={"m": 8 * one["m"]})]
    odd, _ = method.aggregate(state, iter([Reply(c, u) for c, u in zip(clients, ups, strict=True)]), 1)
    assert (odd.shared.B["m"].item(), odd.shared.A["m"].item(), odd.seen) == (B, 3.0, {0: 0, 4: 0})
    ups = [Up(A={"m": 0 * one["m"]}), Up(A={"m": 4 * one["m"]})]
    even, _ = method.aggregate(odd, iter([Reply(c, u) for c, u in zip(clients, ups, strict=True)]), 2)
    assert (even.shared.B["m"].item(), even.shared.A["m"].item(), even.seen) == (B, A, {0: 1, 4: 1})


def test_the_papers_mean_is_the_default():
    assert RoLoRA().uniform_weights is True
