"""FedLoRU (2409.12371): merges, what follows them, and who hears of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SHAPES, dense, distance, federate, make_clients, make_setup, same

from fedlora.algebra.cycle import cycle_length
from fedlora.methods import make
from fedlora.types import SHARED, Model

SETUP = make_setup(make_clients((2, 2, 2, 2)))


def play(rounds: int, **settings):
    method = make("fedloru", settings)
    return method, federate(method, SETUP, rounds)


def mean_adapter(run, t: int):
    """s B A after round t by hand, module by module: both factors averaged with n = 10, 40, 20, 30, from what was sent."""
    sent = run.rounds[t][0][0].down.shared
    change = {}
    for m in SHAPES:
        ups = [reply.up for _, reply in run.rounds[t]]
        A = sent.A[m].numpy() + np.average([up.A[m].numpy() for up in ups], axis=0, weights=[1, 4, 2, 3])
        B = sent.B[m].numpy() + np.average([up.B[m].numpy() for up in ups], axis=0, weights=[1, 4, 2, 3])
        change[f"{m}.weight"] = SETUP.lora_alpha / 2 * B @ A
    return change


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: x for name, x in dense(model, SETUP).items() if name.endswith("weight")}


def what_clients_start_from(run, t: int) -> dict[str, np.ndarray]:
    """The function of a client that was there in every round, at the start of round t."""
    down = run.rounds[t][0][0].down
    merged = [pair for s in range(1, t + 1) for pair in run.rounds[s][0][0].down.base.pairs]
    assert not down.base.dense
    return weights_of(Model({SHARED: down.shared}, replace(down.base, pairs=tuple(merged))))


def test_with_a_cycle_longer_than_the_run_it_is_fedit():
    _, run = play(4, period=5)
    fedit = federate(make("fedit", {}), SETUP, 4)
    assert same([state.shared for state in run.states], fedit.states)
    assert all(state.merged.version == 0 for state in run.states)


def test_after_a_merge_the_base_holds_the_mean_adapter_and_the_function_goes_on():
    method, run = play(3, period=2)
    trained = mean_adapter(run, 2)
    (pair,) = run.states[2].merged.pairs
    assert distance(weights_of(Model(base=method.deploy(run.states[2]).base)), trained) < 1e-12
    assert pair.scale == SETUP.lora_alpha / 2
    assert all(not B.any() for B in run.states[2].shared.B.values())
    assert distance(what_clients_start_from(run, 3), trained) < 1e-12


def test_literally_the_function_jumps_by_the_adapter_at_the_start_of_the_next_cycle():
    method, run = play(3, period=2, accumulate="literal")
    trained = mean_adapter(run, 2)
    assert distance(weights_of(method.deploy(run.states[2])), trained) < 1e-12  # what was trained, once
    assert distance(what_clients_start_from(run, 3), {n: 2 * x for n, x in trained.items()}) < 1e-12
    assert max(np.abs(x).max() for x in trained.values()) > 0.05


def test_literally_the_message_after_a_merge_holds_the_pair_once():
    _, run = play(3, period=2, accumulate="literal")
    down = run.rounds[3][0][0].down
    assert all(x is y for x, y in zip(down.shared.A.values(), down.base.pairs[0].A.values(), strict=True))


def test_the_adapter_is_drawn_anew_at_every_merge():
    _, run = play(3, period=1)
    drawn = [state.shared.A["up"] for state in run.states]
    assert len({x.numpy().tobytes() for x in drawn}) == 4
    for x in drawn[1:]:
        assert 0.5 / 12**0.5 < x.abs().max() <= 1 / 12**0.5  # uniform in +-1/sqrt(d_in)
        assert not torch.equal(x[:, :8], run.states[1].shared.A["q"])
    again = play(3, period=1)[1]
    assert same(run.states[-1], again.states[-1])


def test_where_the_cycle_does_not_divide_the_run_the_live_adapter_counts():
    method, run = play(5, period=2)
    model = method.deploy(run.states[5])
    assert model.base.version == 2
    live = {n: x - weights_of(Model(base=model.base))[n] for n, x in weights_of(model).items()}
    assert distance(live, mean_adapter(run, 5)) < 1e-12
    assert max(np.abs(x).max() for x in live.values()) > 0.05


@pytest.mark.parametrize("accumulate", ["reinit", "literal"])
def test_rank_grows_with_the_merges(accumulate):
    method, run = play(4, period=2, accumulate=accumulate)
    change = weights_of(method.deploy(run.states[-1]))["up.weight"]
    assert np.linalg.matrix_rank(change, tol=1e-8) == 4


@pytest.mark.parametrize(
    "period, rounds, cycle", [(0.125, 400, 50), (0.125, 2, 1), (0.5, 7, 4), (3, 10, 3), (1, 10, 1), (50, 10, 50), (0.001, 10, 1)]
)
def test_the_cycle_is_a_number_of_rounds_or_a_share_of_the_run(period, rounds, cycle):
    assert cycle_length(period, rounds) == cycle
    assert make("fedloru", {"period": period}).init(replace(SETUP, rounds=rounds)).cycle == cycle


@pytest.mark.parametrize("name", ["fedloru", "pfedloru", "mfedloru"])
@pytest.mark.parametrize("settings, word", [({"period": 0}, "period"), ({"period": -1.0}, "period")])
def test_impossible_settings_are_refused(name, settings, word):
    with pytest.raises(ValueError, match=word):
        make(name, settings)


def test_the_mode_is_one_of_two():
    with pytest.raises(ValueError, match=r"method\.accumulate"):
        make("fedloru", {"accumulate": "sometimes"})
