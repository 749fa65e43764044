"""Randomness by name: every random draw belongs to (seed, purpose, ...), so nothing depends on order or on a restart.

NumPy's PCG64 draws the numbers, not torch: its stream is the same on every device and for every number of threads, and
the first n draws of a stream do not depend on how many are drawn after them.
"""

from hashlib import blake2b

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(seed, "batches", round, client)``."""
    text = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """The random stream of one purpose."""
    return np.random.Generator(np.random.PCG64(derive(seed, *purpose)))
