"""Who takes part in a round."""

from collections.abc import Callable

from fedlora import seeds
from fedlora.types import Client, Setup


def sampler(setup: Setup, sample: int | float) -> Callable[[int], list[Client]]:
    """Who takes part in a round: `sample` of the clients that have data (a number, or a share up to 1.0), drawn by the round."""
    able = [client for client in setup.clients if client.num_examples > 0]
    count = min(len(able), sample if isinstance(sample, int) else max(1, round(sample * len(able))))

    def draw(round: int) -> list[Client]:
        chosen = seeds.generator(setup.seed, "participants", round).permutation(len(able))[:count]
        return [able[i] for i in sorted(chosen)]

    return draw
