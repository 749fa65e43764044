"""FSLoRA (2501.19389): sketches by hand and by Monte Carlo, the compact form against the paper's masked one."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, federate, make_clients, make_setup, play, same

from fedlora.check import refuse
from fedlora.methods import make
from fedlora.methods.fslora import FSLoRA, State, Up
from fedlora.types import SHARED, Client, Factors, Reply

METHOD = FSLoRA(global_rank=4)


def chosen(down) -> tuple[int, ...]:
    return tuple(down.ranks.nonzero().flatten().tolist())


def later_state(setup, rounds: int = 2) -> State:
    return federate(METHOD, setup, rounds).states[-1]


def test_the_mean_of_the_sketches_is_the_identity():
    """Over 4000 rounds, S = r / k on the set: diagonal mean 1 within five standard errors, and every set of two comes as often."""
    setup = make_setup(make_clients((1, 2, 3)))
    state = METHOD.init(setup)
    for client in setup.clients:
        sets = Counter(chosen(METHOD.send(state, client, t + 1)) for t in range(4000))
        S = np.zeros(4)
        for ranks, count in sets.items():
            assert len(ranks) == client.rank
            S[list(ranks)] += count / 4000 * 4 / client.rank
        error = np.sqrt(4 / client.rank - 1) / np.sqrt(4000)
        np.testing.assert_allclose(S, 1.0, atol=5 * error)
        if client.rank == 2:
            assert len(sets) == 6 and max(abs(n / 4000 - 1 / 6) for n in sets.values()) < 5 * np.sqrt(5 / 36 / 4000)


def test_sets_differ_by_round_client_and_seed_and_repeat():
    setup = make_setup(make_clients((8,) * 40), lora_alpha=16.0)
    method = FSLoRA(global_rank=16)
    state = method.init(setup)
    draws = {(t, c.id): chosen(method.send(state, c, t + 1)) for t in range(10) for c in setup.clients}
    assert len(set(draws.values())) > 390  # of 12870
    assert draws[3, 5] == chosen(method.send(state, setup.clients[5], 4))
    assert draws[3, 5] != chosen(method.send(replace(state, seed=1), setup.clients[5], 4))


def test_A_and_B_and_all_modules_share_one_set():
    setup = make_setup(make_clients((1, 2, 4, 2)))
    state = later_state(setup)
    for client in setup.clients:
        down = METHOD.send(state, client, 1)
        for m in SHAPES:
            for row, i in enumerate(chosen(down)):
                assert torch.equal(down.sketch.A[m][row], state.shared.A[m][i])
                assert torch.equal(down.sketch.B[m][:, row], state.shared.B[m][:, i])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_chosen_ranks_alone_train_as_the_whole_adapter_does_under_the_papers_sketch_and_a_mask(optimizer):
    setup = make_setup(make_clients((2, 3)))
    state = later_state(setup)
    for client in setup.clients:
        trainer, down = Trainer(setup, optimizer=optimizer), METHOD.send(state, client, 1)
        up, _ = play(METHOD, trainer, down, None, client)
        ask = trainer.log[0][1]
        S = down.ranks.double() * (4 / client.rank)
        whole = replace(state.shared, C=dict.fromkeys(SHAPES, S))
        rows, columns = dict.fromkeys(SHAPES, down.ranks[:, None]), dict.fromkeys(SHAPES, down.ranks)
        done = trainer(client, replace(ask, slots={SHARED: whole}, mask={(SHARED, "A"): rows, (SHARED, "B"): columns}))
        for m in SHAPES:
            dA, dB = done.slots[SHARED].A[m] - whole.A[m], done.slots[SHARED].B[m] - whole.B[m]
            assert not dA[~down.ranks].any() and not dB[:, ~down.ranks].any()
            torch.testing.assert_close(up.A[m], dA[down.ranks], rtol=0, atol=1e-10)
            torch.testing.assert_close(up.B[m], dB[:, down.ranks], rtol=0, atol=1e-10)
            assert up.A[m].abs().max() > 1e-3 and up.B[m].abs().max() > 1e-3


def test_the_published_scaled_B_is_the_same_under_sgd():
    """B' = B S trained without a sketch, its gradient times S^2, gives B = B' / S: one step, by hand."""
    setup = make_setup(make_clients((2, 2)))
    state, client = later_state(setup), setup.clients[0]
    trainer, down = Trainer(setup, steps_per_epoch=1), METHOD.send(state, client, 1)
    one_step = replace(setup, epochs=1)
    trainer.setup = one_step
    up, _ = play(METHOD, trainer, down, None, client)
    s = 4 / client.rank
    scaled = replace(down.sketch, B={m: s * B for m, B in down.sketch.B.items()})
    done = trainer(client, replace(trainer.log[0][1], slots={SHARED: scaled}, lr_scale={"B": s**2})).slots[SHARED]
    for m in SHAPES:
        torch.testing.assert_close(done.B[m] / s - down.sketch.B[m], up.B[m], rtol=0, atol=1e-12)
        torch.testing.assert_close(done.A[m] - down.sketch.A[m], up.A[m], rtol=0, atol=1e-12)


@pytest.mark.parametrize("uniform, first", [(True, [[13.0, 20.0], [31.0, 44.0]]), (False, [[11.5, 20.0], [30.5, 46.0]])])
def test_the_server_adds_the_mean_where_an_untrained_rank_counts_as_zero(uniform, first):
    """By hand: n = 1 and 3; column 0 from the first client alone (6, 2), column 1 from the second alone (0, 8)."""
    start = Factors({"m": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}, {"m": torch.tensor([[10.0, 20.0], [30.0, 40.0]])}, 8.0)
    one = Up({"m": torch.ones(1, 3)}, {"m": torch.tensor([[6.0], [2.0]])}, {"m": torch.tensor([True, False])})
    two = Up({"m": torch.zeros(1, 3)}, {"m": torch.tensor([[0.0], [8.0]])}, {"m": torch.tensor([False, True])})
    method = FSLoRA(2, uniform_weights=uniform)
    state, _ = method.aggregate(State(0, start), iter([Reply(Client(0, 1, 1), one), Reply(Client(1, 1, 3), two)]), 1)
    assert state.shared.B["m"].tolist() == first
    share = 0.5 if uniform else 0.25
    assert state.shared.A["m"].tolist() == [[1.0 + share, share, share], [0.0, 1.0, 0.0]]
    assert state.shared.scale == 8.0


def test_ranks_that_nobody_drew_do_not_move_by_a_bit():
    setup = make_setup(make_clients((1, 1)))
    run, idle = federate(METHOD, setup, 4), 0
    for t in range(1, 5):
        ranks = torch.stack([reply.up.ranks["q"] for _, reply in run.rounds[t]]).any(dim=0)
        idle += int((~ranks).sum())
        for m in SHAPES:
            assert torch.equal(run.states[t].shared.A[m][~ranks], run.states[t - 1].shared.A[m][~ranks])
            assert torch.equal(run.states[t].shared.B[m][:, ~ranks], run.states[t - 1].shared.B[m][:, ~ranks])
    assert idle >= 8


def test_with_every_rank_it_is_fedit_with_equal_clients():
    """S = I; also regression: the published condition never held, so that no client was ever sketched."""
    setup = make_setup(make_clients((4, 4, 4), examples=(20, 20, 20)))
    one, two = federate(METHOD, setup, 3), federate(make("fedit", {}), setup, 3)
    for m in SHAPES:
        torch.testing.assert_close(one.states[-1].shared.A[m], two.states[-1].A[m], rtol=0, atol=1e-12)
        torch.testing.assert_close(one.states[-1].shared.B[m], two.states[-1].B[m], rtol=0, atol=1e-12)
    less = federate(METHOD, make_setup(make_clients((2, 2, 2), examples=(20, 20, 20))), 3)
    assert not torch.allclose(less.states[-1].shared.B["q"], one.states[-1].shared.B["q"], atol=1e-3)


def test_the_global_rank_covers_the_largest_client_and_sets_the_scale():
    setup = make_setup(make_clients((2, 32)), shapes={"m": (40, 50)}, lora_alpha=16.0)
    assert FSLoRA().init(setup).shared.scale == 0.5
    assert same(FSLoRA().init(setup).shared, setup.fresh(32))
    with pytest.raises(ValueError, match="global_rank"):
        make("fslora", {"global_rank": 0})


def test_a_set_of_another_size_is_refused():
    setup = make_setup(make_clients((2, 2)))
    up = federate(METHOD, setup, 1).rounds[1][0][1].up
    for ranks, word in (
        ([True, False, False, False], "'sketch' is 1, expected 2"),
        ([True, True, False], "'global' is 3, expected 4"),
    ):
        why = refuse(replace(up, ranks={**up.ranks, "q": torch.tensor(ranks)}), METHOD, setup, setup.clients[0])
        assert why is not None and word in why
    assert "'ranks'" in refuse(replace(up, ranks={}), METHOD, setup, setup.clients[0])
