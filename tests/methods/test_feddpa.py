"""FedDPA (2403.19211): a global and a local adapter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Trainer, dense, deployed, distance, federate, make_clients, make_setup, same, tensors

from fedlora.check import refuse
from fedlora.errors import BadInput
from fedlora.methods import make
from fedlora.types import SHARED, Features, Mix, Nothing, Observe, Reply, Similarity

CLIENTS = make_clients((2, 2, 2, 2))
SETUP = make_setup(CLIENTS)


def dialogue(method, run, t: int, client):
    """What a client asks in round t + 1 and gives back: (requests, Up, held)."""
    trainer, asked = Trainer(SETUP), []
    g = method.local(method.send(run.states[t], client, t + 1), run.held[t][client.id], client, t + 1)
    answer = None
    try:
        while True:
            asked.append(g.send(answer))
            answer = trainer(client, asked[-1])
    except StopIteration as end:
        return asked, *end.value


def asks(requests) -> list[tuple[str, dict[str, float] | None]]:
    """What each trains, and how it weighs the slots."""
    return [(next(iter({slot for slot, _ in ask.roles})), ask.gate and dict(ask.gate.weights)) for ask in requests]


def test_together_the_global_adapter_trains_alone_and_then_the_local_one_beside_what_was_received():
    method = make("feddpa", {"mix": 0.3})
    run = federate(method, SETUP, 2)
    first, up, held = dialogue(method, run, 0, CLIENTS[1])
    assert first[0] == Observe(Features(5)) and asks(first[1:]) == [(SHARED, None)] and list(first[1].slots) == [SHARED]
    assert same(held.local, method.hold(SETUP, CLIENTS[1]).local)
    second, up, held = dialogue(method, run, 1, CLIENTS[1])
    assert asks(second) == [(SHARED, None), ("local", {SHARED: 0.7, "local": 0.3})] and list(second[0].slots) == [SHARED]
    assert same(second[0].slots[SHARED], run.states[1].shared) and same(second[1].slots[SHARED], run.states[1].shared)
    assert same(second[1].slots["local"], run.held[1][1].local) and not same(held.local, run.held[1][1].local)
    assert refuse(up, method, SETUP, CLIENTS[1]) is None
    alone = replace(second[0], slots={SHARED: run.states[1].shared}, gate=None)
    done = Trainer(SETUP)(CLIENTS[1], alone).slots[SHARED]
    for m in SETUP.shapes:
        np.testing.assert_allclose(up.B[m], done.B[m] - run.states[1].shared.B[m], atol=1e-12)


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_whatever_the_mix_the_global_adapter_is_fedits(mix):
    fedit, method = make("fedit", {}), make("feddpa", {"mix": mix, "uniform_weights": False})
    one, two = (federate(each, SETUP, 4, trainer=Trainer(SETUP, optimizer="adamw")) for each in (fedit, method))
    assert distance(dense(method.deploy(two.states[4]), SETUP), dense(fedit.deploy(one.states[4]), SETUP)) < 1e-12


def test_the_global_adapter_alone_is_better_than_none():
    """Trained at half of its weight, as one of two, it was worse."""
    setup = make_setup(make_clients((2,) * 6))
    trainer = Trainer(setup, optimizer="adamw")
    method, losses = make("feddpa", {}), []
    run = federate(method, setup, 12, trainer=trainer)
    for t in (0, 12):
        change = dense(method.deploy(run.states[t]), setup)
        fits = [
            np.square(X.numpy() @ (setup.base(m).numpy() + change[f"{m}.weight"]).T - Y.numpy()).sum(axis=1).mean()
            for data in trainer.data.values()
            for m, (X, Y) in data.items()
        ]
        losses.append(np.mean(fits))
    assert losses[1] < 0.9 * losses[0]


def test_after_learns_as_fedit_and_then_alone_and_silently():
    method = make("feddpa", {"variant": "f", "federated": 0.5})  # two rounds of four
    run = federate(method, SETUP, 4)
    for t in (0, 1):
        requests, up, _ = dialogue(method, run, t, CLIENTS[1])
        assert asks(requests[1 - t :]) == [(SHARED, None)]
    for t in (2, 3):
        requests, up, held = dialogue(method, run, t, CLIENTS[1])
        assert asks(requests) == [("local", {SHARED: 0.5, "local": 0.5})]
        assert up == Nothing() and not same(held.local, run.held[t][1].local)
        assert same(run.states[t + 1].shared, run.states[2].shared)
    fedit = federate(make("fedit", {}), SETUP, 2)
    uniform = federate(make("feddpa", {"variant": "f", "uniform_weights": False}), SETUP, 2)
    assert distance(dense(make("fedit", {}).deploy(fedit.states[2]), SETUP), dense(method.deploy(uniform.states[2]), SETUP)) < 1e-12
    assert distance(dense(method.deploy(run.states[2]), SETUP), dense(method.deploy(uniform.states[2]), SETUP)) > 1e-3


@pytest.mark.parametrize("rounds", [1, 3])
def test_without_a_share_of_the_local_adapter_it_is_fedit(rounds):
    fedit, method = make("fedit", {}), make("feddpa", {"mix": 0.0, "cap": 0.0, "uniform_weights": False})
    one, two = federate(fedit, SETUP, rounds), federate(method, SETUP, rounds)
    expected = dense(fedit.deploy(one.states[-1]), SETUP)
    assert distance(dense(method.deploy(two.states[-1]), SETUP), expected) < 1e-12
    for c in CLIENTS:
        assert distance(dense(deployed(method, two.states[-1], c, two.held[-1][c.id]), SETUP), expected) < 1e-12


def test_neither_the_local_adapter_nor_the_anchors_travel():
    method = make("feddpa", {})
    run = federate(method, SETUP, 3)
    trained = [x for x in tensors([h.local.B for held in run.held[2:] for h in held.values()])]
    anchors = [h.anchors for h in run.held[-1].values()]
    private = {x.contiguous().numpy().tobytes() for x in [*trained, *anchors]}
    messages = [x for exchanged in run.rounds for order, reply in exchanged for x in (order.down, reply.up)]
    assert len(private) == 2 * 4 * 2 + 4
    assert not private & {x.contiguous().numpy().tobytes() for x in tensors(messages)}


def test_anchors_are_drawn_once():
    method, trainer = make("feddpa", {"anchors": 3}), Trainer(SETUP)
    run = federate(method, SETUP, 3, trainer=trainer)
    for c in CLIENTS:
        assert torch.equal(run.held[1][c.id].anchors, trainer.data[c.id]["q"][0][:3])
        assert same(run.held[3][c.id].anchors, run.held[1][c.id].anchors)
    requests, _, _ = dialogue(method, run, 3, CLIENTS[0])
    assert not any(isinstance(ask, Observe) for ask in requests)


def test_models():
    method = make("feddpa", {"cap": 0.4})
    run = federate(method, SETUP, 3, lambda t: CLIENTS[:3])
    state, held = run.states[-1], run.held[-1]
    own = deployed(method, state, CLIENTS[1], held[1])
    assert own.slots.keys() == {SHARED, "local"} and isinstance(own.gate, Similarity)
    assert (own.gate.slot, own.gate.cap) == ("local", 0.4) and torch.equal(own.gate.anchors, held[1].anchors)
    assert method.deploy(state).slots.keys() == {SHARED} and method.deploy(state).gate is None
    stranger = deployed(method, state, CLIENTS[3], held[3])
    assert stranger.gate == Mix({"local": 0.0})
    assert distance(dense(stranger, SETUP), dense(method.deploy(state), SETUP)) == 0.0
    once = deployed(method, run.states[1], CLIENTS[1], run.held[1][1])  # its local adapter has not trained yet
    assert distance(dense(once, SETUP), dense(method.deploy(run.states[1]), SETUP)) == 0.0


def test_who_sits_out_keeps_its_own_and_its_first_round_may_be_any():
    method = make("feddpa", {})
    half = [[0, 1], [2, 3], [1, 2], [0, 3]]
    run = federate(method, SETUP, 4, lambda t: [CLIENTS[i] for i in half[t - 1]])
    for t in range(1, 5):
        for i in (i for i in range(4) if i not in half[t - 1]):
            assert same(run.held[t][i], run.held[t - 1][i])
    trained = [[bool(run.held[t][i].local.B["q"].any()) for i in range(4)] for t in range(5)]
    assert trained == [[False] * 4, [False] * 4, [False, False, True, True], [False, True, True, True], [True] * 4]


def test_silence_is_allowed_to_this_method_alone_and_counts_for_nothing():
    method, fedit = make("feddpa", {}), make("fedit", {})
    assert refuse(Nothing(), method, SETUP, CLIENTS[0]) is None
    assert "no message" in refuse(Nothing(), fedit, SETUP, CLIENTS[0])
    run = federate(method, SETUP, 2)
    replies = [reply for _, reply in run.rounds[2]]
    silenced = [replace(replies[0], up=Nothing()), *replies[1:]]
    assert same(method.aggregate(run.states[1], iter(silenced), 2)[0], method.aggregate(run.states[1], iter(replies[1:]), 2)[0])
    state, _ = method.aggregate(run.states[1], iter([Reply(c, Nothing()) for c in CLIENTS]), 2)
    assert same(state, run.states[1])


def test_means_are_uniform_unless_said_otherwise():
    for settings, weights in (({}, [1] * 4), ({"uniform_weights": False}, [c.num_examples for c in CLIENTS])):
        method = make("feddpa", settings)
        run = federate(method, SETUP, 1)
        ups = [reply.up for _, reply in run.rounds[1]]
        for m in SETUP.shapes:
            mean = np.average([up.B[m].numpy() for up in ups], axis=0, weights=weights)
            np.testing.assert_allclose(run.states[1].shared.B[m], mean, atol=1e-12)


@pytest.mark.parametrize("settings", [{"mix": 1.5}, {"cap": -0.1}, {"anchors": 0}, {"federated": 0.0}])
def test_settings(settings):
    with pytest.raises(BadInput):
        make("feddpa", settings)
