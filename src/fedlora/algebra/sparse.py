"""Choosing the entries of a model that matter most, and putting a few values back among zeros."""

from collections.abc import Mapping

import torch
from torch import Tensor


def largest(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` entries of largest magnitude over all tensors together, as bool masks of their shapes; fewer where fewer are
    not zero. Of equal ones the earlier tensor's, then the earlier entry, so the choice is the same on every machine.

    By selection, O(n), not by sorting. What is not a number counts as infinite, so that it is seen and not hidden.
    """
    sizes = [x.numel() for x in tensors.values()]
    flat = torch.cat([x.detach().flatten().abs() for x in tensors.values()])
    flat = torch.where(flat.isnan(), torch.inf, flat)
    if count < len(flat):
        limit = flat.kthvalue(len(flat) - count + 1).values if count else flat.new_tensor(torch.inf)
        chosen = flat > limit
        ties = (flat == limit).nonzero().flatten()
        chosen[ties[: count - int(chosen.sum())]] = True
        chosen &= flat > 0
    else:
        chosen = flat > 0
    parts = torch.split(chosen, sizes)
    return {name: part.view_as(x) for (name, x), part in zip(tensors.items(), parts, strict=True)}


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """A tensor of the mask's shape with the values, in order, where it is True, and zeros elsewhere."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out
