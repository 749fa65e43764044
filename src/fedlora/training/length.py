"""How long a client trains and how far its steps go: in passes over its data, in steps, and over the rounds.

A request counts local passes. A pass is an epoch; with `train.max_steps` = M and `train.epochs` = E, p passes are ceil(p M / E)
steps instead, so that the E passes of a round are M steps, and a rehearsal of one pass weighs against them as one epoch against E.
Where the steps outlast an epoch, the next one begins, in an order of its own.
"""

import math

from fedlora.config import TrainConfig
from fedlora.types import Train


def passes_of(ask: Train, train: TrainConfig) -> int:
    """How many local passes a request asks for."""
    return train.epochs if ask.epochs is None else ask.epochs


def steps_of(ask: Train, count: int, train: TrainConfig) -> int:
    """How many steps a request takes on so many examples."""
    epoch = -(-count // train.batch_size)
    passes = passes_of(ask, train)
    steps = passes * epoch if train.max_steps is None or not count else -(-passes * train.max_steps // train.epochs)
    return steps if ask.max_steps is None else min(steps, ask.max_steps)


def examples_of(ask: Train, count: int, train: TrainConfig) -> int:
    """How many examples those steps see, of a client that has `count`; the last batch of an epoch may be a small one."""
    if not count:
        return 0
    epochs, rest = divmod(steps_of(ask, count, train), -(-count // train.batch_size))
    return epochs * count + rest * train.batch_size


def lr_factor(train: TrainConfig, round: int) -> float:
    """What the learning rate of a round is multiplied with; it depends on nothing but the round and the configuration.

    Of T rounds let w be those of the warm-up, f the floor. In round t = 1, ..., T the factor is

        t / w                                          for t <= w
        1                                              then, where the schedule is constant
        1 - (1 - f) p                                  linear
        f + (1 - f) (1 + cos(pi p)) / 2                cosine,  with p = (t - w) / (T - w)

    so the last round of a falling schedule is at the floor. Without warm-up, cosine is that of FlowerTune, whose 5e-5 -> 1e-6 is
    lr = 5e-5 and f = 0.02.
    """
    warmup = warmup_rounds(train)
    if round <= warmup:
        return round / warmup
    p = (round - warmup) / (train.rounds - warmup)
    if train.schedule == "linear":
        return 1 - (1 - train.floor) * p
    if train.schedule == "cosine":
        return train.floor + (1 - train.floor) * (1 + math.cos(math.pi * p)) / 2
    return 1.0


def warmup_rounds(train: TrainConfig) -> int:
    """Rounds of the warm-up; a share of the rounds is rounded to whole ones."""
    return train.warmup if isinstance(train.warmup, int) else round(train.warmup * train.rounds)


def has_schedule(train: TrainConfig) -> bool:
    """Whether the learning rate differs from round to round."""
    return train.schedule != "constant" or warmup_rounds(train) > 0
