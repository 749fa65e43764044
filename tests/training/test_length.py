"""How long clients train, and at which learning rate: by hand, by FlowerTune's formula, and by a loop of torch's own optimiser."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fedlora import seeds
from fedlora.config import TrainConfig, resolve
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.training.learner import Job, batches
from fedlora.training.length import examples_of, has_schedule, lr_factor, steps_of
from fedlora.types import Train


def data(count: int) -> Encoded:
    rows = tuple(np.full(1, i, dtype=np.int32) for i in range(count))
    return Encoded(rows, np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64))


def ask(epochs: int | None = None, max_steps: int | None = None) -> Train:
    return Train({}, frozenset(), epochs, max_steps)


def taken(request: Train, count: int, train: TrainConfig, seed: int = 7) -> list[list[int]]:
    return [where.tolist() for where in batches(Job(request, data(count), seed, {}), train)]


def test_without_max_steps_a_pass_is_an_epoch() -> None:
    """Ten examples in batches of four: 4, 4 and 2, in the order that each epoch's seed gives."""
    train = TrainConfig(batch_size=4, epochs=2)
    orders = [seeds.generator(7, "epoch", epoch).permutation(10).tolist() for epoch in range(2)]
    assert taken(ask(), 10, train) == [order[i : i + 4] for order in orders for i in (0, 4, 8)]
    assert len(taken(ask(epochs=1), 10, train)) == 3
    assert len(taken(ask(max_steps=2), 10, train)) == 2


@pytest.mark.parametrize(
    "max_steps, epochs, passes, steps",
    [
        (10, 1, 1, 10),  # the round's
        (10, 1, 2, 20),  # FedLEASE's warm-up of two rounds
        (10, 5, 5, 10),
        (10, 5, 1, 2),  # LoRA-A²'s rehearsal,
        (10, 5, 4, 8),  # and what follows it
        (10, 3, 3, 10),  # not 3 * ceil(10 / 3) = 12: the round has the steps that it was given
        (10, 3, 1, 4),
        (1, 3, 1, 1),
        (1, 3, 3, 1),
    ],
)
def test_max_steps_are_those_of_a_round_of_all_passes(max_steps: int, epochs: int, passes: int, steps: int) -> None:
    train = TrainConfig(batch_size=4, epochs=epochs, max_steps=max_steps)
    for count in (1, 3, 10, 1000):
        assert len(taken(ask(passes), count, train)) == steps == steps_of(ask(passes), count, train)
    assert len(taken(ask(), 10, train)) == max_steps
    assert len(taken(ask(passes, max_steps=3), 10, train)) == min(3, steps)


def test_steps_that_outlast_the_data_begin_epochs_in_the_orders_that_epochs_have() -> None:
    train = TrainConfig(batch_size=4, max_steps=5)
    assert taken(ask(), 10, train) == taken(ask(), 10, TrainConfig(batch_size=4, epochs=2))[:5]


def test_who_has_nothing_takes_no_step() -> None:
    train = TrainConfig(max_steps=5)
    assert taken(ask(), 0, train) == [] and steps_of(ask(), 0, train) == 0 and examples_of(ask(), 0, train) == 0


@pytest.mark.parametrize("max_steps", [None, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("limit", [None, 1, 5])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_examples_of_a_request_are_those_of_its_batches(max_steps: int | None, limit: int | None, count: int) -> None:
    train = TrainConfig(batch_size=4, epochs=2, max_steps=max_steps)
    for passes in (None, 1, 3):
        request = ask(passes, limit)
        assert examples_of(request, count, train) == sum(map(len, taken(request, count, train)))


def flowertune(current_round: int, total_round: int, lrate_max: float, lrate_min: float) -> float:
    """The rate of a round as FlowerTune's applications have it, rounds counting from 1."""
    return lrate_min + (lrate_max - lrate_min) / 2 * (1 + math.cos(math.pi * current_round / total_round))


def test_the_cosine_is_flowertunes() -> None:
    train = TrainConfig(rounds=200, lr=5e-5, schedule="cosine", floor=1e-6 / 5e-5)
    for t in range(1, 201):
        assert train.lr * lr_factor(train, t) == pytest.approx(flowertune(t, 200, 5e-5, 1e-6), rel=1e-12)
    assert train.lr * lr_factor(train, 200) == pytest.approx(1e-6, rel=1e-12)


@pytest.mark.parametrize(
    "settings, factors",
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": 2}, [0.5, 1, 1, 1]),
        ({"warmup": 0.5}, [0.5, 1, 1, 1]),
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1]),
        ({"schedule": "linear", "floor": 0.2}, [0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "floor": 0.1, "warmup": 1}, [1, 0.7, 0.4, 0.1]),
        ({"schedule": "cosine", "floor": 0.5, "warmup": 2}, [0.5, 1, 0.75, 0.5]),
        ({"schedule": "cosine", "floor": 1.0}, [1, 1, 1, 1]),
        ({"schedule": "cosine", "warmup": 4}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_factors_by_hand(settings: dict[str, object], factors: list[float]) -> None:
    train = TrainConfig(rounds=4, **settings)
    assert [lr_factor(train, t) for t in range(1, 5)] == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_falls_and_never_to_nothing(schedule: str) -> None:
    train = TrainConfig(rounds=50, schedule=schedule)
    factors = [lr_factor(train, t) for t in range(1, 51)]
    assert all(a > b for a, b in pairwise(factors)) and factors[-1] == pytest.approx(0.02)


def test_constant_is_exactly_one() -> None:
    train = TrainConfig(rounds=7)
    assert {lr_factor(train, t) for t in range(1, 8)} == {1.0} and not has_schedule(train)
    assert has_schedule(replace_train(train, warmup=1)) and has_schedule(replace_train(train, schedule="linear"))
    assert not has_schedule(replace_train(train, warmup=0.01))  # rounded, it is none


def replace_train(train: TrainConfig, **changes: object) -> TrainConfig:
    return train.model_copy(update=changes)


@pytest.mark.parametrize(
    "train, said",
    [
        ({"warmup": 1.5}, "a share lies in [0, 1)"),
        ({"warmup": -1}, "train.warmup"),
        ({"warmup": 11}, "train.warmup = 11: the run has 10 rounds"),
        ({"floor": 0}, "train.floor"),
        ({"schedule": "cosin"}, "train.schedule"),
        ({"max_steps": 0}, "train.max_steps"),
    ],
)
def test_bad_input_is_one_line(train: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput) as error:
        resolve({"train": {"rounds": 10, **train}})
    assert said in str(error.value) and "\n" not in str(error.value)
