"""Personal methods with half of the clients a round, drawn anew: who sits out keeps what is its own, and the end is not that of who
came first. Eight clients of two tasks, dealt in turn."""

from typing import Any

import numpy as np
import pytest
from toy import Trainer, deployed, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.types import Client, Mix

ROUNDS = 12
METHODS: dict[str, dict[str, Any]] = {"fl-tac": {}, "fedlease": {}, "ce-lora": {}, "feddpa": {}}


def play(name: str, draw: int):
    """(method, setup, run, clients of each round)."""
    method, setup = make(name, METHODS[name]), make_setup(make_clients([2] * 8, tasks=[("x",), ("y",)]), rounds=ROUNDS)

    def half(t: int) -> list[Client]:
        return [setup.clients[i] for i in sorted(np.random.default_rng([draw, t]).permutation(8)[:4])]

    run = federate(method, setup, ROUNDS, half, Trainer(setup, lr=0.01 if name == "ce-lora" else 0.02))
    assert not any(run.refused)
    return method, setup, run, [{order.client.id for order, _ in played} for played in run.rounds]


def own_part(name: str, method, state, client: Client, held) -> Any:
    """What is a client's own: its model, or, where it has a part in what many share, which, and what only it has."""
    model = deployed(method, state, client, held)
    if name == "fedlease":
        return (model.gate.own, list(model.slots)) if state.experts else model
    return model.slots["local"] if name == "feddpa" else model


@pytest.mark.parametrize("draw", [0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_who_sits_out_keeps_its_own(name: str, draw: int) -> None:
    method, setup, run, here = play(name, draw)
    been: set[int] = set()
    for t in range(1, ROUNDS + 1):
        founding = name == "fedlease" and bool(run.states[t].experts) != bool(run.states[t - 1].experts)
        for c in (c for c in setup.clients if c.id in been - here[t] and not founding):
            before, after = (own_part(name, method, run.states[i], c, run.held[i][c.id]) for i in (t - 1, t))
            assert same(after, before), f"round {t}, client {c.id}"
        been |= here[t]
    assert been == set(range(8))


@pytest.mark.parametrize("draw", [0, 1, 2, 3, 4, 5])
def test_whoever_came_first_the_groups_are_the_tasks(draw: int) -> None:
    state = play("fedlease", draw)[2].states[-1]
    groups = [{i for i, j in state.clusters.items() if j == expert} for expert in range(len(state.experts))]
    assert sorted(map(sorted, groups)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    method, _, run, _ = play("fl-tac", draw)
    _, diagnostics = method.aggregate(run.states[-2], iter([reply for _, reply in run.rounds[-1]]), 1)
    assert (diagnostics["purity"], diagnostics["mixed"]) == (1.0, 0.0)


def test_every_client_that_ever_came_is_in_ce_loras_means() -> None:
    method, _, run, _ = play("ce-lora", 0)
    _, diagnostics = method.aggregate(run.states[-2], iter([reply for _, reply in run.rounds[-1]]), 1)
    assert diagnostics["mixing"].shape == (4, 8) and bool((diagnostics["mixing"] > 0).all())


def test_feddpas_local_adapter_trains_whenever_a_client_comes_and_takes_no_share_before() -> None:
    method, setup, run, here = play("feddpa", 0)
    assert all(run.held[-1][c.id].local.B["q"].any() for c in setup.clients)
    once = next(i for i in here[1] if i not in here[2])  # it took part in round 1, where no local adapter trains
    assert deployed(method, run.states[2], setup.clients[once], run.held[2][once]).gate == Mix({"local": 0.0})
