"""FedSA-LoRA (2410.01463): only A travels, or only VeRA's d."""

import numpy as np
import pytest
import torch
from toy import Trainer, dense, dense_slot, deployed, distance, federate, make_clients, make_setup, same, tensors

from fedlora.check import refuse
from fedlora.methods import make
from fedlora.methods.fedsa_lora import Up, Variant
from fedlora.types import SHARED

CLIENTS = make_clients((3, 3, 3, 3))
SETUP = make_setup(CLIENTS)
STAYS = {Variant.LORA: "B", Variant.VERA: "D"}


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().numpy().tobytes()


@pytest.mark.parametrize("variant", list(Variant))
def test_what_stays_is_never_in_a_message(variant):
    method = make("fedsa-lora", {"variant": variant})
    run = federate(method, SETUP, 3)
    private = {bits(x) for held in run.held[1:] for h in held.values() for x in h.role(STAYS[variant]).values()}
    messages = [x for exchanged in run.rounds for order, reply in exchanged for x in (order.down, reply.up)]
    assert len(private) == 3 * 4 * 2  # rounds, clients, modules: none twice
    assert not private & {bits(x) for x in tensors(messages)}


def test_A_is_the_same_for_all_after_a_round_and_B_each_ones_own():
    method = make("fedsa-lora", {})
    run = federate(method, SETUP, 2)
    slots = [deployed(method, run.states[-1], c, run.held[-1][c.id]).slots[SHARED] for c in CLIENTS]
    n = np.array([c.num_examples for c in CLIENTS])
    A = {m: sum(k * r.up.A[m].numpy() for k, (_, r) in zip(n, run.rounds[2], strict=True)) / n.sum() for m in SETUP.shapes}
    for m in SETUP.shapes:
        assert all(torch.equal(slot.A[m], slots[0].A[m]) for slot in slots)
        assert len({bits(slot.B[m]) for slot in slots}) == 4
        np.testing.assert_allclose(slots[0].A[m], run.states[1].A[m].numpy() + A[m], atol=1e-12)


def test_a_client_goes_on_with_its_own_B():
    method, trainer = make("fedsa-lora", {}), Trainer(SETUP)
    run = federate(method, SETUP, 1, trainer=trainer)
    trained = {c.id: done.slots[SHARED].B for c, _, done in trainer.log}
    federate(method, SETUP, 3, lambda t: CLIENTS[:2] if t == 2 else CLIENTS, trainer, resume=(1, run.states[1], run.held[1]))
    third = {c.id: ask.slots[SHARED].B for c, ask, _ in trainer.log[-4:]}
    assert same(third[3], trained[3]) and not same(third[0], trained[0])


def test_scale_is_rslora_where_the_model_says_so():
    assert make("fedsa-lora", {}).init(SETUP).scale == pytest.approx(4.0 / 3)
    from dataclasses import replace

    rslora = replace(SETUP, rslora=True)
    assert rslora.scaling(3) == pytest.approx(4.0 / 3**0.5)


def test_vera_freezes_both_factors_and_trains_two_vectors():
    method = make("fedsa-lora", {"variant": "vera"})
    trainer = Trainer(SETUP)
    run = federate(method, SETUP, 3, trainer=trainer)
    start = method.init(SETUP)
    assert start.scale == 1.0 and all((C == 0.1).all() and C.shape == (3,) for C in start.C.values())
    assert all(B.abs().max() <= 3**-0.5 and B.std() > 0.2 for B in start.B.values())
    for _, ask, done in trainer.log:
        assert ask.roles == {(SHARED, "C"), (SHARED, "D")}
        for f in (ask.slots[SHARED], done.slots[SHARED]):
            assert same(f.A, start.A) and same(f.B, start.B)
    client = CLIENTS[1]
    slot = deployed(method, run.states[-1], client, run.held[-1][1]).slots[SHARED]
    for m, (d_out, _) in SETUP.shapes.items():
        b, B, d, A = (getattr(slot, role)[m].numpy() for role in "DBCA")
        assert b.shape == (d_out,)
        np.testing.assert_allclose(dense_slot(slot, m), np.diag(b) @ B @ np.diag(d) @ A, atol=1e-12)
        assert np.abs(dense_slot(slot, m)).max() > 0


@pytest.mark.parametrize("variant", list(Variant))
def test_the_shared_part_alone_changes_nothing(variant):
    method = make("fedsa-lora", {"variant": variant})
    run = federate(method, SETUP, 2)
    zero = {name: np.zeros(shape) for name, shape in SETUP.params.items()}
    assert distance(dense(method.deploy(run.states[-1]), SETUP), zero) == 0.0
    stranger = deployed(method, run.states[-1], CLIENTS[0], method.hold(SETUP, CLIENTS[0]))
    assert distance(dense(stranger, SETUP), zero) == 0.0


def test_the_other_variants_upload_is_refused():
    A, d = {m: torch.ones(3, i) for m, (_, i) in SETUP.shapes.items()}, {m: torch.ones(3) for m in SETUP.shapes}
    lora, vera = make("fedsa-lora", {}), make("fedsa-lora", {"variant": "vera"})
    for good, bad, up in ((lora, vera, Up(A=A)), (vera, lora, Up(C=d))):
        assert refuse(up, good, SETUP, CLIENTS[0]) is None
        assert "expected nothing" in refuse(up, bad, SETUP, CLIENTS[0])
