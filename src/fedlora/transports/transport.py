"""The one seam between the round loop and wherever clients live: `exchange(orders) -> replies`."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from fedlora.types import Order, Reply


class Transport(Protocol):
    """Carries a round's orders to clients and their replies back."""

    def exchange(self, orders: Sequence[Order]) -> Iterator[Reply]:
        """The replies, in order of client id; a client that fails is left out."""

    def commit(self, accepted: Collection[int]) -> None:
        """The round is over: these clients' replies counted, so they keep what they now hold. All others keep what they held."""
