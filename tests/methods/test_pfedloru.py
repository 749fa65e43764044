"""pFedLoRU (2409.12371): the personal adapter stays at home, and each part trains with the other at rest."""

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, deployed, distance, federate, make_clients, make_setup, same, tensors

from fedlora import wire
from fedlora.methods import make

SETUP = make_setup(make_clients((2, 2, 2, 2)))
METHOD = make("pfedloru", {"period": 2})


def test_the_personal_adapter_trains_first_and_the_shared_one_after_it():
    trainer = Trainer(SETUP)
    run = federate(METHOD, SETUP, 1, trainer=trainer)
    for client in SETUP.clients:
        (_, one, first), (_, two, second) = [entry for entry in trainer.log if entry[0] == client]
        assert one.roles == {("personal", "A"), ("personal", "B")} and two.roles == {("shared", "A"), ("shared", "B")}
        assert same(first.slots["shared"], one.slots["shared"]) and same(second.slots["personal"], first.slots["personal"])
        assert same(two.slots, first.slots)  # it goes on from what the first learned
        assert not same(first.slots["personal"], one.slots["personal"])
        assert same(run.held[1][client.id], first.slots["personal"])
        order, reply = run.rounds[1][client.id]
        for m in SHAPES:
            assert torch.equal(reply.up.A[m], second.slots["shared"].A[m] - order.down.shared.A[m])
            assert torch.equal(reply.up.B[m], second.slots["shared"].B[m] - order.down.shared.B[m])


def test_the_personal_adapter_is_in_no_message():
    run = federate(METHOD, SETUP, 3)
    for t in (1, 2, 3):
        own = [x.numpy().tobytes() for held in (run.held[t - 1], run.held[t]) for x in tensors(held) if x.any()]
        for order, reply in run.rounds[t]:
            for message in (order.down, reply.up):
                sent = wire.encode(message)
                assert not any(x in sent for x in own)


def test_personal_adapters_start_apart_and_change_nothing():
    starts = [METHOD.hold(SETUP, client) for client in SETUP.clients]
    assert len({x.A["q"].numpy().tobytes() for x in starts}) == 4
    assert all(not B.any() for x in starts for B in x.B.values())
    assert not any(same(x.A, METHOD.init(SETUP).shared.A) for x in starts)


def test_a_clients_model_has_its_own_adapter_on_top_of_what_all_share():
    run = federate(METHOD, SETUP, 3)
    everybody = dense(METHOD.deploy(run.states[3]), SETUP)
    for client in SETUP.clients:
        own, model = run.held[3][client.id], dense(deployed(METHOD, run.states[3], client, run.held[3][client.id]), SETUP)
        for m in SHAPES:
            extra = SETUP.lora_alpha / 2 * own.B[m].numpy() @ own.A[m].numpy()
            np.testing.assert_allclose(model[f"{m}.weight"], everybody[f"{m}.weight"] + extra, atol=1e-12)
            assert np.abs(extra).max() > 1e-2


def test_a_merge_takes_the_shared_adapter_alone_and_leaves_the_personal_one():
    run = federate(METHOD, SETUP, 2)
    before, now = (dense(METHOD.deploy(run.states[2]), SETUP), run.states[2])
    assert now.merged.version == 1 and all(not B.any() for B in now.shared.B.values())
    merged = {
        f"{m}.weight": now.merged.pairs[0].scale * (now.merged.pairs[0].B[m] @ now.merged.pairs[0].A[m]).numpy() for m in SHAPES
    }
    assert distance(merged, {n: before[n] for n in merged}) < 1e-12
    idle = federate(METHOD, SETUP, 3, trainer=Trainer(SETUP, steps_per_epoch=0), resume=(2, now, run.held[2]))
    assert same(idle.held[-1], run.held[2])


def test_personal_epochs_are_those_of_the_personal_adapter():
    trainer = Trainer(SETUP)
    federate(make("pfedloru", {"personal_epochs": 5}), SETUP, 1, trainer=trainer)
    assert [done.num_steps for _, _, done in trainer.log[:2]] == [10, 4]  # two steps an epoch, two epochs in the run
    with pytest.raises(ValueError, match="personal_epochs"):
        make("pfedloru", {"personal_epochs": 0})
