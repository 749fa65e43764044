"""HetLoRA (2401.06432). Modules: q (12, 8) and up (20, 12)."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from toy import Trainer, federate, make_clients, make_setup, same

from fedlora import wire
from fedlora.methods import make
from fedlora.methods.hetlora import HetLoRA, State, Up
from fedlora.types import SHARED, Client, Factors, Reply, TailNorm, Train, Trained

SHAPES = {"q": (12, 8), "up": (20, 12)}


def random_up(seed: int, rank: int, size: float = 1.0) -> Up:
    rng = np.random.default_rng(seed)
    A = {m: torch.tensor(size * rng.normal(size=(rank, i))) for m, (_, i) in SHAPES.items()}
    return Up(A, {m: torch.tensor(rng.normal(size=(o, rank))) for m, (o, _) in SHAPES.items()})


def tail_scaled(factors: Factors, first: int, by: float) -> Factors:
    return replace(factors, B={m: torch.cat([B[:, :first], by * B[:, first:]], dim=1) for m, B in factors.B.items()})


def answer(method: HetLoRA, down: Factors, done: Factors) -> Up:
    """The Up of a client that received `down` and trained to `done`."""
    g = method.local(down, None, Client(0, 99, 10), 1)
    next(g)
    with pytest.raises(StopIteration) as end:
        g.send(Trained({SHARED: done}, 0.0, 1))
    return end.value.value[0]


def down_of(rank: int, seed: int = 0) -> Factors:
    up = random_up(seed, rank)
    return Factors(up.A, up.B, 0.5)


# ---- the client -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 7, 50, 51, 99, 100])
def test_gamma_099_makes_the_last_rank_the_tail(rank):
    """Rounding to nearest, as public code does, makes the tail empty up to rank 50, and nothing is ever pruned."""
    ask = next(HetLoRA(gamma=0.99, penalty=0.3).local(down_of(rank), None, Client(0, rank, 10), 1))
    assert ask.penalty == TailNorm(SHARED, rank - 1, 0.3)
    assert ask.roles == {(SHARED, "A"), (SHARED, "B")}


@pytest.mark.parametrize("gamma, rank", [(0.99, 1), (0.5, 1), (0.3, 3), (1.0, 4)])
def test_without_a_tail_there_is_no_penalty_and_no_pruning(gamma, rank):
    """floor(gamma r) is 0, where the tail would be all that the client has, or r, where there is none."""
    method, down = HetLoRA(gamma=gamma, penalty=0.3), down_of(rank)
    assert next(method.local(down, None, Client(0, rank, 10), 1)).penalty is None
    smaller = replace(down, B={m: 0.1 * B for m, B in down.B.items()})
    assert answer(method, down, smaller).A["q"].shape[0] == rank


def test_a_client_of_rank_one_trains_as_without_the_penalty():
    """By hand from the trainer: HetLoRA's one client of rank 1 ends where plain local training ends."""
    setup = make_setup(make_clients((1,)))
    plain = Trainer(setup)
    ends = [plain(setup.clients[0], Train({SHARED: setup.fresh(1)}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]]
    ends.append(federate(HetLoRA(penalty=5.0), setup, 1).states[1].shared)
    for m in SHAPES:
        torch.testing.assert_close(ends[1].A[m] / ends[0].A[m], torch.ones_like(ends[0].A[m]), rtol=0, atol=1e-12)
        torch.testing.assert_close(ends[1].B[m] / ends[0].B[m], torch.ones_like(ends[0].B[m]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by, kept", [(0.5, 4), (0.0, 4), (1.0, 8), (2.0, 8)], ids=["shrank", "vanished", "as it was", "grew"])
def test_a_tail_that_shrank_is_dropped(by, kept):
    down = down_of(8)
    done = tail_scaled(down, 4, by)
    up = answer(HetLoRA(gamma=0.5), down, done)
    for m in SHAPES:
        assert torch.equal(up.A[m], done.A[m][:kept]) and torch.equal(up.B[m], done.B[m][:, :kept])


def test_nothing_is_dropped_in_round_one():
    down = replace(down_of(8), B={m: torch.zeros(o, 8, dtype=torch.float64) for m, (o, _) in SHAPES.items()})
    assert answer(HetLoRA(gamma=0.5), down, down_of(8)).A["q"].shape[0] == 8
    assert answer(HetLoRA(gamma=0.5), down, down).A["q"].shape[0] == 8


@pytest.mark.parametrize("min_rank, kept", [(1, 4), (4, 4), (6, 6), (8, 8), (20, 8)])
def test_pruning_stops_at_the_smallest_rank(min_rank, kept):
    down = down_of(8)
    assert answer(HetLoRA(gamma=0.5, min_rank=min_rank), down, tail_scaled(down, 4, 0.1)).A["q"].shape[0] == kept


def test_rank_one_is_never_pruned_away():
    down = down_of(1)
    assert answer(HetLoRA(), down, tail_scaled(down, 0, 0.1)).A["q"].shape[0] == 1


# ---- the server -----------------------------------------------------------------------------------------------------------------


def server(ranks: dict[int, int], largest: int = 4) -> State:
    return State(replace(down_of(largest, seed=9), scale=1.0), ranks)


def padded_means(ups: list[Up], weights: list[float], rank: int = 4) -> tuple[dict, dict]:
    """sum_k p_k pad(A_k) and the same of B, in numpy."""
    p = np.array(weights) / sum(weights)
    A = {m: sum(w * np.pad(u.A[m].numpy(), ((0, rank - len(u.A[m])), (0, 0))) for w, u in zip(p, ups, strict=True)) for m in SHAPES}
    B = {m: sum(w * np.pad(u.B[m].numpy(), ((0, 0), (0, rank - len(u.A[m])))) for w, u in zip(p, ups, strict=True)) for m in SHAPES}
    return A, B


def assert_factors(got: Factors, A: dict, B: dict) -> None:
    for m in SHAPES:
        np.testing.assert_allclose(got.A[m].numpy(), A[m], rtol=0, atol=1e-13)
        np.testing.assert_allclose(got.B[m].numpy(), B[m], rtol=0, atol=1e-13)


def test_factors_are_padded_and_weighted_by_the_norms_of_the_dense_products():
    ups = [random_up(1, 1), random_up(2, 4, size=3.0), random_up(3, 2, size=0.2)]
    norms = [np.sqrt(sum(np.linalg.norm(u.B[m].numpy() @ u.A[m].numpy()) ** 2 for m in SHAPES)) for u in ups]
    replies = [Reply(Client(i, 4, n), u) for i, (u, n) in enumerate(zip(ups, (1, 1000, 7), strict=True))]  # n_k plays no part
    state, diagnostics = HetLoRA().aggregate(server({0: 1, 1: 4, 2: 4, 3: 3}), iter(replies), 1)
    assert_factors(state.shared, *padded_means(ups, norms))
    assert state.ranks == {0: 1, 1: 4, 2: 2, 3: 3}  # client 2 has pruned; client 3 was not there
    assert diagnostics["ranks"] == {"0": 1, "1": 4, "2": 2, "3": 3}


def test_equal_norms_and_ranks_give_the_uniform_mean():
    one = random_up(1, 4)
    flipped = Up({m: -A for m, A in one.A.items()}, {m: B.flip(0) for m, B in one.B.items()})
    replies = [Reply(Client(0, 4, 1), one), Reply(Client(1, 4, 99), flipped)]
    state, _ = HetLoRA().aggregate(server({0: 4, 1: 4}), iter(replies), 1)
    assert_factors(state.shared, *padded_means([one, flipped], [0.5, 0.5]))


def test_where_nothing_was_learned_the_weights_are_the_numbers_of_examples():
    ups = [Up(random_up(s, 2).A, {m: torch.zeros(o, 2, dtype=torch.float64) for m, (o, _) in SHAPES.items()}) for s in (1, 2)]
    replies = [Reply(Client(i, 2, n), u) for i, (u, n) in enumerate(zip(ups, (1, 3), strict=True))]
    state, _ = HetLoRA().aggregate(server({0: 2, 1: 2}), iter(replies), 1)
    assert_factors(state.shared, *padded_means(ups, [0.25, 0.75]))


def test_one_scale_for_all_ranks_and_truncating_undoes_padding():
    setup = make_setup(make_clients((1, 2, 4, 2)))
    method = HetLoRA()
    state = method.init(setup)
    for client in setup.clients:
        down = method.send(state, client, 1)
        assert down.scale == setup.lora_alpha / 4 and down.A["q"].shape == (client.rank, 8)
    up = random_up(1, 2)
    state, _ = method.aggregate(state, iter([Reply(setup.clients[1], up)]), 1)
    assert_factors(state.shared.first(2), {m: A.numpy() for m, A in up.A.items()}, {m: B.numpy() for m, B in up.B.items()})
    assert not any(torch.count_nonzero(A[2:]) for A in state.shared.A.values())


# ---- whole runs -----------------------------------------------------------------------------------------------------------------


def test_ranks_never_grow_never_pass_the_smallest_and_a_pruning_run_resumes_bit_for_bit():
    setup = make_setup(make_clients((3, 4, 8, 8)))
    method = HetLoRA(gamma=0.7, penalty=20.0, min_rank=2)
    run = federate(method, setup, 6)
    ranks = [state.ranks for state in run.states]
    for before, after in pairwise(ranks):
        assert all(2 <= after[k] <= before[k] for k in after)
    assert ranks[-1] != ranks[0] and ranks[1] == ranks[0]
    for t in range(1, 7):
        for order, reply in run.rounds[t]:
            assert order.down.A["q"].shape[0] == ranks[t - 1][order.client.id]
            assert reply.up.A["q"].shape[0] == ranks[t][order.client.id]
    classes = wire.message_classes(method)
    for t in range(6):
        state = wire.decode(wire.encode(run.states[t]), classes)
        assert same(federate(method, setup, 6, resume=(t, state, run.held[t])).states[-1], run.states[-1])


def test_zero_local_steps_keep_the_ranks_that_everybody_has():
    """Ranks that only some clients have are diluted by the zeros of the others: that is the method."""
    setup = make_setup(make_clients((2, 4, 3, 2)))
    method = HetLoRA(gamma=1.0)
    run = federate(method, setup, 3)
    idle = federate(method, setup, 4, trainer=Trainer(setup, steps_per_epoch=0), resume=(3, run.states[-1], run.held[-1]))
    before, after = (s.shared.first(2) for s in idle.states)
    assert_factors(after, {m: A.numpy() for m, A in before.A.items()}, {m: B.numpy() for m, B in before.B.items()})
    assert all((after.A[m][2:].abs() <= before.A[m][2:].abs()).all() for m in SHAPES)
    assert any(not torch.equal(idle.states[0].shared.A[m][3], idle.states[1].shared.A[m][3]) for m in SHAPES)


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"gamma": 1.5}, {"min_rank": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make("hetlora", settings)
