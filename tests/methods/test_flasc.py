"""FLASC (2406.05233): masks against sorting, the two densities, both server optimisers."""

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, federate, make_clients, make_setup, play

from fedlora.check import refuse
from fedlora.methods import make
from fedlora.methods.flasc import FLASC, Optimizer, State, Up
from fedlora.types import SHARED, Client, Factors, Reply

N = 2 * (12 + 8 + 20 + 12)  # entries of both modules at rank 2


def flat(A, B) -> np.ndarray:
    return np.concatenate([x.numpy().ravel() for part in (A, B) for x in part.values()])


def largest(x: np.ndarray, count: int) -> np.ndarray:
    order = sorted(range(len(x)), key=lambda i: (-abs(x[i]), i))[:count]
    return np.array([i in order and x[i] != 0 for i in range(len(x))])


@pytest.mark.parametrize("density, kept", [(1.0, 104), (0.5, 52), (0.25, 26), (0.001, 1)])
def test_down_go_the_largest_entries_of_both_factors_and_all_modules(density, kept):
    setup = make_setup(make_clients((2, 2)))
    method = FLASC(density_down=density, density_up=1.0, server=Optimizer.SGD)
    for t in (0, 2):
        state = federate(method, setup, t).states[-1]
        trainer, client = Trainer(setup), setup.clients[0]
        play(method, trainer, method.send(state, client, 1), None, client)
        start = trainer.log[0][1].slots[SHARED]
        P = flat(state.shared.A, state.shared.B)
        np.testing.assert_array_equal(flat(start.A, start.B), np.where(largest(P, kept), P, 0.0))
        assert len(P) == N and np.count_nonzero(flat(start.A, start.B)) == (kept if t else min(kept, 40))  # B = 0 at first
        assert not trainer.log[0][1].mask  # trained densely


@pytest.mark.parametrize("density, kept", [(1.0, 104), (0.25, 26), (0.001, 1)])
def test_up_go_the_largest_changes_from_the_masked_start(density, kept):
    setup = make_setup(make_clients((2, 2)))
    method = FLASC(density_down=0.5, density_up=density)
    trainer, client = Trainer(setup), setup.clients[0]
    up, _ = play(method, trainer, method.send(federate(method, setup, 2).states[-1], client, 1), None, client)
    _, ask, done = trainer.log[0]
    before, after = ask.slots[SHARED], done.slots[SHARED]
    moved = flat(after.A, after.B) - flat(before.A, before.B)
    got = np.zeros(N)
    got[flat(up.where_A, up.where_B).astype(bool)] = flat(up.A, up.B)
    np.testing.assert_array_equal(got, np.where(largest(moved, kept), moved, 0.0))
    assert np.count_nonzero(got) == kept


def test_masks_differ_between_clients_and_rounds():
    setup = make_setup(make_clients((2, 2)))
    run = federate(FLASC(server=Optimizer.SGD), setup, 2)
    masks = {flat(r.up.where_A, r.up.where_B).tobytes() for exchanged in run.rounds for _, r in exchanged}
    assert len(masks) == 4


def test_dense_with_plain_averaging_it_is_fedit_with_equal_clients():
    setup = make_setup(make_clients((2, 2, 2), examples=(20, 20, 20)))
    one = federate(FLASC(1.0, 1.0, Optimizer.SGD), setup, 3)
    two = federate(make("fedit", {}), setup, 3)
    for m in SHAPES:
        torch.testing.assert_close(one.states[-1].shared.A[m], two.states[-1].A[m], rtol=0, atol=1e-12)
        torch.testing.assert_close(one.states[-1].shared.B[m], two.states[-1].B[m], rtol=0, atol=1e-12)


def reply(id: int, n: int, A: list[float], B: list[float]) -> Reply:
    """A module (3, 2) at rank 1: A is (1, 2), B (3, 1)."""
    a, b = torch.tensor(A, dtype=torch.float64), torch.tensor(B, dtype=torch.float64)
    return Reply(Client(id, 1, n), Up({"m": a[a != 0]}, {"m": b[b != 0]}, {"m": a != 0}, {"m": b != 0}))


START = Factors({"m": torch.tensor([[1.0, 2.0]]).double()}, {"m": torch.tensor([[3.0], [4.0], [5.0]]).double()}, 2.0)
ONE, TWO = reply(0, 1, [4.0, 0.0], [0.0, 8.0, 0.0]), reply(1, 3, [0.0, 0.0], [2.0, 4.0, 0.0])


@pytest.mark.parametrize("uniform, A, B", [(True, [3.0, 2.0], [4.0, 10.0, 5.0]), (False, [2.0, 2.0], [4.5, 9.0, 5.0])])
def test_plain_averaging_counts_what_a_client_did_not_send_as_zero(uniform, A, B):
    state, _ = FLASC(server=Optimizer.SGD, uniform_weights=uniform).aggregate(State(START), iter([ONE, TWO]), 1)
    assert state.shared.A["m"].flatten().tolist() == A and state.shared.B["m"].flatten().tolist() == B
    half, _ = FLASC(server=Optimizer.SGD, server_lr=0.5).aggregate(State(START), iter([ONE, TWO]), 1)
    assert half.shared.A["m"].flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize("lr", [None, 0.1])
def test_adam_is_torchs_adam_on_minus_the_mean_change(lr):
    method, state = FLASC(server_lr=lr), State(START)
    P = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    adam = torch.optim.Adam([P], lr=lr or 1e-3)
    for t in range(4):
        weak = reply(0, 1, [0.1 * t, 0.0], [0.0, -1.0, 0.0])
        mean = {0: [2.0, 0, 1, 6, 0], 1: [0.05, 0, 1, 1.5, 0]}[0 if t % 2 == 0 else 1]
        if t % 2:
            mean[0] = 0.05 * t
        state, _ = method.aggregate(state, iter([weak if t % 2 else ONE, TWO]), 1)
        P.grad = -torch.tensor(mean, dtype=torch.float64)
        adam.step()
        got = torch.cat([state.shared.A["m"].flatten(), state.shared.B["m"].flatten()])
        torch.testing.assert_close(got, P.detach(), rtol=0, atol=1e-12)
    assert state.moments.step == 4 and state.shared.B["m"][2] == 5.0  # what never moved does not


def test_the_default_is_the_papers_adam():
    assert FLASC().server is Optimizer.ADAM and FLASC().uniform_weights and State(START).moments is None


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"density_up": 0.0}, "density"),
        ({"density_down": 1.1}, "density"),
        ({"server_lr": 0.0}, "server_lr"),
        ({"server": "x"}, "method.server"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        make("flasc", settings)


def test_a_mask_that_does_not_fit_is_refused():
    setup = make_setup(make_clients((2, 2)))
    method, client = FLASC(), setup.clients[0]
    good = federate(method, setup, 2).rounds[2][0][1].up
    kept = int(good.where_B["q"].sum())

    def why(**fields):
        return refuse(Up(**{**vars(good), **fields}), method, setup, client)

    assert why() is None
    longer = torch.cat([good.where_B["q"], torch.zeros(1, dtype=torch.bool)])
    assert "'out*rank' is 25, expected 24" in why(where_B={**good.where_B, "q": longer})
    more = good.where_B["q"].clone()
    more[(~more).nonzero()[0]] = True
    assert f"is {kept + 1}, expected {kept}" in why(where_B={**good.where_B, "q": more})
    assert "comes without 'where_A'" in why(where_A={})
