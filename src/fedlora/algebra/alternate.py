"""Alternating freeze: odd rounds train B, even rounds train A.

B goes first because it starts at zero: then the gradient of A is zero and A can neither be trained nor scored.
"""


def trained_role(round: int) -> str:
    """ "B" in rounds 1, 3, ... and "A" in rounds 2, 4, ..."""
    return "B" if round % 2 else "A"


def roles_changed(since: int, version: int) -> frozenset[str]:
    """Which factors differ between the states after `since` and after `version` rounds."""
    return frozenset(trained_role(t) for t in range(max(since, version - 2) + 1, version + 1))
