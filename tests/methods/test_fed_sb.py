"""Fed-SB (2502.15436): the first round fixes the outer factors, and the cores average exactly."""

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.fed_sb import FedSB

SETUP = make_setup(make_clients((3, 3, 3, 3)), lora_alpha=12.0)  # s = 4
WEIGHTS = [1, 4, 2, 3]


@pytest.fixture(scope="module")
def run():
    return federate(FedSB(), SETUP, 4)


def test_round_one_keeps_the_best_part_of_the_mean_of_the_products(run):
    start, fixed = SETUP.fresh(3), run.states[1].shared
    for m in SHAPES:
        products = [4 * reply.up.B[m].numpy() @ (start.A[m] + reply.up.A[m]).numpy() for _, reply in run.rounds[1]]
        U, S, Vt = np.linalg.svd(np.average(products, axis=0, weights=WEIGHTS), full_matrices=False)
        got = 4 * fixed.B[m].numpy() @ fixed.C[m].numpy() @ fixed.A[m].numpy()
        np.testing.assert_allclose(got, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-10)
        assert S[3] > 1e-3  # there was something to cut
        np.testing.assert_allclose(fixed.B[m].T @ fixed.B[m], np.eye(3), atol=1e-12)
        np.testing.assert_allclose(fixed.A[m] @ fixed.A[m].T, np.eye(3), atol=1e-12)


def test_then_the_outer_factors_never_move_and_the_cores_average(run):
    for t in (2, 3, 4):
        before, now = run.states[t - 1].shared, run.states[t].shared
        assert same((now.A, now.B, now.scale), (before.A, before.B, before.scale))
        for m in SHAPES:
            cores = [(before.C[m] + reply.up.C[m]).numpy() for _, reply in run.rounds[t]]
            np.testing.assert_allclose(now.C[m], np.average(cores, axis=0, weights=WEIGHTS), atol=1e-12)
            assert not torch.equal(now.C[m], before.C[m])


def test_the_outer_factors_come_down_once_and_are_kept(run):
    method = FedSB()
    for t in (1, 3, 4):
        assert all(not order.down.A and not order.down.B for order, _ in run.rounds[t])
    fixed = run.states[1].shared
    for order, _ in run.rounds[2]:
        assert same(order.down, fixed)
        assert same((run.held[2][order.client.id].A, run.held[2][order.client.id].B), (fixed.A, fixed.B))
    late = federate(method, SETUP, 4, lambda t: SETUP.clients if t == 4 else SETUP.clients[:2])
    assert [bool(order.down.A) for order, _ in late.rounds[4]] == [False, False, True, True]


def test_a_client_that_was_there_in_round_one_alone_does_not_know_the_outer_factors():
    late = federate(FedSB(), SETUP, 3, lambda t: SETUP.clients[:2] if t == 2 else SETUP.clients)
    assert [bool(order.down.A) for order, _ in late.rounds[3]] == [False, False, True, True]


def test_first_steps_limit_round_one_alone():
    trainer = Trainer(SETUP)
    federate(FedSB(first_steps=1), SETUP, 2, trainer=trainer)
    assert [done.num_steps for _, _, done in trainer.log] == [1] * 4 + [4] * 4
    with pytest.raises(ValueError, match="first_steps"):
        make("fed-sb", {"first_steps": 0})


def test_a_first_round_that_learned_nothing_can_still_learn():
    idle = federate(FedSB(), SETUP, 1, trainer=Trainer(SETUP, steps_per_epoch=0))
    assert all(not C.any() for C in idle.states[1].shared.C.values())
    rest = federate(FedSB(), SETUP, 2, resume=(1, idle.states[1], idle.held[1]))
    assert all(C.abs().max() > 1e-3 for C in rest.states[-1].shared.C.values())


def test_past_the_smaller_side_of_a_module_the_factors_are_zero():
    setup = make_setup(make_clients((10, 10)))
    fixed = federate(FedSB(), setup, 1).states[1].shared  # q is (12, 8)
    assert not fixed.C["q"][8:].any() and not fixed.C["q"][:, 8:].any()
    assert not fixed.A["q"][8:].any() and np.linalg.matrix_rank(fixed.A["q"].numpy()) == 8
    np.testing.assert_allclose(fixed.B["q"].T @ fixed.B["q"], np.eye(10), atol=1e-12)
