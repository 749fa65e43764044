"""RAVAN (2506.05568): frozen frames from the seed, cores that average, fewer heads for smaller budgets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.ravan import Ravan, Up, best_heads, frame
from fedlora.types import Client, Reply, Trained

SETUP = make_setup(make_clients((1, 2, 4, 3)))


@pytest.mark.parametrize("d, rank, count", [(12, 3, 4), (12, 3, 5), (8, 4, 3), (8, 8, 2), (7, 3, 5)])
def test_frames_are_orthonormal_and_orthogonal_to_each_other_while_they_fit(d, rank, count):
    frames = frame(np.random.default_rng(0), d, rank, count)
    for f in frames:
        np.testing.assert_allclose(f.T @ f, np.eye(rank), atol=1e-12)
    together = d // rank
    joined = np.concatenate(list(frames[:together]), axis=1)
    np.testing.assert_allclose(joined.T @ joined, np.eye(joined.shape[1]), atol=1e-12)


def test_a_rank_above_the_side_leaves_zero_columns():
    (f,) = frame(np.random.default_rng(0), 3, 5, 1)
    np.testing.assert_allclose(f.T @ f, np.diag([1, 1, 1, 0, 0]), atol=1e-12)


def test_server_and_clients_have_the_same_frames_and_other_seeds_others():
    trainer, method = Trainer(SETUP), Ravan()
    run = federate(method, SETUP, 2, trainer=trainer)
    deployed = method.deploy(run.states[2]).slots
    assert list(deployed) == ["head0", "head1", "head2", "head3"]
    for _, ask, _ in trainer.log:
        for head in deployed:
            assert same((ask.slots[head].A, ask.slots[head].B), (deployed[head].A, deployed[head].B))
    other = method.deploy(method.init(make_setup(SETUP.clients, seed=1))).slots
    assert not torch.equal(other["head0"].A["q"], deployed["head0"].A["q"])


def test_heads_by_budget_and_by_the_norm_of_their_cores():
    """Ranks 1, 2, 4, 3 of 4 train 1, 2, 4 and 3 of four heads; of one head everybody trains it."""
    H = {"q": torch.zeros(4, 4, 4), "up": torch.zeros(4, 4, 4)}
    H["q"][1, 0, 0], H["up"][2, 3, 3], H["q"][3, 1, 2], H["up"][3, 1, 2] = 3.0, -5.0, 3.0, 3.0  # norms 0, 3, 5, 4.24
    assert [best_heads(H, rank) for rank in (1, 2, 3, 4)] == [[2], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert [best_heads({"q": torch.zeros(4, 4, 4)}, rank) for rank in (1, 2)] == [[0], [0, 1]]  # the first at the start
    assert best_heads({"q": torch.zeros(1, 4, 4)}, 1) == [0]


def test_a_client_asks_for_its_heads_alone():
    trainer = Trainer(SETUP)
    federate(Ravan(), SETUP, 1, trainer=trainer)
    for client, ask, done in trainer.log:
        mine = [f"head{i}" for i in range(client.rank)]
        assert ask.roles == {(head, role) for head in mine for role in "CD"}
        moved = [head for head in done.slots if any(C.any() for C in done.slots[head].C.values())]
        assert moved == mine


def test_scales_go_up_inside_their_heads():
    method, client = Ravan(heads=2), SETUP.clients[2]
    H = {m: torch.full((2, 4, 4), 2.0, dtype=torch.float64) for m in SHAPES}
    g = method.local(H, method.hold(SETUP, client), client, 1)
    ask = next(g)
    assert all(torch.equal(D, torch.ones(1, dtype=torch.float64)) for f in ask.slots.values() for D in f.D.values())
    done = {
        head: replace(f, C={m: C + i for m, C in f.C.items()}, D={m: torch.tensor([10.0 + i], dtype=torch.float64) for m in f.D})
        for i, (head, f) in enumerate(ask.slots.items())
    }
    with pytest.raises(StopIteration) as end:
        g.send(Trained(done, 0.0, 1))
    for m in SHAPES:  # 10 * (2 + 0) - 2 and 11 * (2 + 1) - 2
        assert end.value.value[0].C[m].unique(dim=0).flatten().unique().tolist() == [18.0, 31.0]


def test_a_head_that_a_client_did_not_train_counts_as_it_was_sent():
    """By hand: n = 1 trains the best head (1) alone, n = 3 both: H_0 = 1 + 3/4 * 8, H_1 = 5 + (4 + 3 * 8)/4."""
    setup = make_setup([Client(0, 1, 1), Client(1, 2, 3)], shapes={"m": (5, 3)})
    method = Ravan(heads=2)
    H = torch.ones(2, 2, 2, dtype=torch.float64)
    H[1] = 5.0
    state = replace(method.init(setup), H={"m": H})
    one = Up({"m": torch.full((1, 2, 2), 4.0)}, {"m": torch.tensor([False, True])})
    two = Up({"m": torch.full((2, 2, 2), 8.0)}, {"m": torch.tensor([True, True])})
    now, _ = method.aggregate(state, iter([Reply(setup.clients[0], one), Reply(setup.clients[1], two)]), 1)
    assert now.H["m"][0].unique().tolist() == [7.0] and now.H["m"][1].unique().tolist() == [12.0]
    assert all(torch.equal(f.D["m"], torch.ones(1)) for f in method.deploy(now).slots.values())


def test_more_heads_reach_more_ranks():
    setup = make_setup(make_clients((2, 2)))
    for heads in (1, 3):
        method = Ravan(heads=heads)
        slots = method.deploy(federate(method, setup, 2).states[2]).slots.values()
        change = sum(f.B["q"] @ f.C["q"] @ f.A["q"] for f in slots)
        assert torch.linalg.matrix_rank(change) == 2 * heads


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match="heads"):
        make("ravan", {"heads": 0})
