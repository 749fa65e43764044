"""Choosing the best entries over a whole model."""

from collections.abc import Mapping

import torch
from torch import Tensor


def top_mask(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` best entries over all modules together, as bool masks of the scores' shapes.

    Ties go to the earlier module, then to the earlier entry, so the choice is the same on every machine.

    Raises:
        ValueError: a score is not finite: it would come first.
    """
    flat = torch.cat([s.flatten() for s in scores.values()])
    if not bool(flat.isfinite().all()):
        raise ValueError("not all scores are finite")
    best = flat.sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[best] = True
    parts = torch.split(chosen, [s.numel() for s in scores.values()])
    return {m: part.view_as(s) for (m, s), part in zip(scores.items(), parts, strict=True)}
