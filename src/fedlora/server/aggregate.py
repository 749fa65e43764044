"""Aggregation that no reply can poison: a new state that would not be finite is made anew without those who made it so.

Each reply is finite by itself, and yet large numbers overflow where they are squared, multiplied or decomposed. So a state is
looked at before it counts. Where it is not finite, or the method fails over its numbers, it is made anew without each reply in
turn, the largest Up first. Where that does not help there are several: then replies are taken up one by one, the smallest Up first,
and those with which the state is finite stay. Who is left out is refused by name.
"""

import math
from collections.abc import Collection
from typing import Any

from fedlora import wire
from fedlora.server.spool import Spool
from fedlora.types import Diagnostics, Method

OVERFLOW = "with it the new state would not be finite"
Made = tuple[Any, Diagnostics]


def aggregate(method: Method, state: Any, spool: Spool, round: int) -> tuple[Any, Diagnostics, frozenset[int]]:
    """The state after a round, what the method says about it, and the clients whose replies do not count.

    The state is the old one where all are refused.

    Raises:
        Exception: what the method raised, where it does so whoever is left out.
    """
    everybody = spool.clients()
    made, error = _tried(method, state, spool, everybody, round)
    if made is not None:
        return *made, frozenset()
    by_size = sorted(everybody, key=lambda id: (_norm(spool.reply(id).up), id))
    for suspect in reversed(by_size) if len(everybody) > 1 else ():
        made, _ = _tried(method, state, spool, [id for id in everybody if id != suspect], round)
        if made is not None:
            return *made, frozenset({suspect})
    taken: list[int] = []
    best: Made | None = None
    for id in by_size:
        made, _ = _tried(method, state, spool, [*taken, id], round)
        if made is not None:
            taken, best = [*taken, id], made
    if best is None and error is not None:
        raise error
    return *(best or (state, {})), frozenset(everybody) - frozenset(taken)


def _tried(method: Method, state: Any, spool: Spool, clients: Collection[int], round: int) -> tuple[Made | None, Exception | None]:
    """What the method makes of these clients' replies, or None where it is not finite; and what it raised."""
    replies = spool.replies(clients)
    try:
        made = method.aggregate(state, replies, round)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a decomposition raises over numbers that are too large
        return None, error
    if next(replies, None) is not None:
        raise AssertionError("aggregate must take every reply")
    return (made, None) if wire.finite(made[0], known=state) else (None, None)


def _norm(up: Any) -> float:
    """The L2 norm of all numbers of an Up together, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in wire.tensors_of(up) if t.is_floating_point()))
