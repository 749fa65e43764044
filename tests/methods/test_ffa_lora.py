"""FFA-LoRA (2403.12313)."""

import numpy as np
import torch
from toy import SHAPES, Trainer, dense, dense_slot, federate, make_clients, make_setup, same, tensors

from fedlora.methods.ffa_lora import FFALoRA
from fedlora.types import SHARED

METHOD = FFALoRA()


def run_of(seed: int = 0):
    setup = make_setup(make_clients((2, 2, 2)), seed=seed)
    trainer = Trainer(setup, optimizer="adamw")
    return setup, trainer, federate(METHOD, setup, 3, trainer=trainer)


def test_A_is_for_ever_the_first_draw_on_server_and_clients():
    setup, trainer, run = run_of()
    first = setup.fresh(2).A
    for state in run.states:
        assert same(dict(state.A), dict(first))
    for held in run.held:
        assert all(same(dict(A), dict(first)) for A in held.values())
    for _, ask, done in trainer.log:
        assert same(dict(ask.slots[SHARED].A), dict(first)) and same(dict(done.slots[SHARED].A), dict(first))


def test_A_never_travels():
    _, _, run = run_of()
    for exchanged in run.rounds[1:]:
        for order, reply in exchanged:
            assert not order.down.A
            shapes = [tuple(t.shape) for t in tensors([order.down, reply.up])]
            assert shapes == [(d_out, 2) for d_out, _ in SHAPES.values()] * 2


def test_A_is_the_same_for_one_seed_and_another_for_another():
    """Built in each client's own random state, A differs between clients, and the method fails without a word."""
    setup, again, other = (make_setup(make_clients((2, 2, 2)), seed=seed) for seed in (0, 0, 1))
    torch.rand(3)
    A = [METHOD.hold(s, c) for s in (setup, again) for c in s.clients]
    assert all(same(x, A[0]) for x in A)
    assert not same(METHOD.hold(other, other.clients[0]), A[0])


def test_the_deployed_change_is_the_mean_B_times_the_first_A():
    setup, trainer, run = run_of()
    trained = [done.slots[SHARED] for _, _, done in trainer.log[-3:]]
    A0, n = setup.fresh(2).A, np.array([10, 40, 20])
    for m in SHAPES:
        B = sum(p * f.B[m].numpy() for p, f in zip(n / n.sum(), trained, strict=True))
        got = dense(METHOD.deploy(run.states[-1]), setup)[f"{m}.weight"]
        np.testing.assert_allclose(got, setup.scaling(2) * B @ A0[m].numpy(), rtol=0, atol=1e-12)
        exact = sum(p * dense_slot(f, m) for p, f in zip(n / n.sum(), trained, strict=True))
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-12)
