"""Cycles of rounds whose length follows the length of the run."""


def cycle_length(period: float, rounds: int) -> int:
    """`period` rounds, or, where it is below 1, that share of the run's rounds, to the nearest; at least one round."""
    return max(1, round(period * rounds if period < 1 else period))
