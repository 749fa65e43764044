"""Who takes part in a round, and who has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedlora import seeds
from fedlora.types import Client


def sampler(clients: Sequence[Client], seed: int, sample: int | float) -> Callable[[int], list[Client]]:
    """Who takes part in a round: `sample` of the clients that have data (a number, or a share up to 1.0), drawn by the round."""
    able = [client for client in clients if client.num_examples > 0]
    count = min(len(able), sample if isinstance(sample, int) else max(1, round(sample * len(able))))

    def draw(round: int) -> list[Client]:
        chosen = seeds.generator(seed, "participants", round).permutation(len(able))[:count]
        return [able[i] for i in sorted(chosen)]

    return draw


def accepted_by(rows: Iterable[Mapping[str, Any]], participants: Callable[[int], Sequence[Client]]) -> dict[int, int]:
    """Client -> the last of these rounds in which its reply counted, from rows of metrics: for checkpoints that do not say it."""
    found: dict[int, int] = {}
    for row in rows:
        failed = row.get("failures", {})
        found |= {client.id: row["round"] for client in participants(row["round"]) if str(client.id) not in failed}
    return found
