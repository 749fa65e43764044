"""How many of its ranks the deployed model uses.

Of direction i: the sum over modules of the i-th squared singular value, in shares of the sum over all i. Where clients have
different ranks, it says whether what the larger ones learn is kept.
"""

import torch

from fedlora.algebra.lowrank import singular_values
from fedlora.types import BaseUpdate, Diagnostics, Model


def energy(model: Model) -> Diagnostics:
    """`energy`, a list of r shares of sum 1 with six digits, r the most ranks that a module has.

    Nothing where the change is more than one slot (merged into the base, gated, full) or zero. O(r^2 (d_out + d_in)) a module.
    """
    if len(model.slots) != 1 or model.base != BaseUpdate() or model.full or model.gate is not None or model.drop_base:
        return {}
    (slot,) = model.slots.values()
    squares = [singular_values(slot.left(m), slot.A[m]).square().cpu() for m in slot.A]
    whole = torch.zeros(max(map(len, squares), default=0), dtype=torch.float64)
    for each in squares:
        whole[: len(each)] += each
    total = float(whole.sum())
    return {"energy": [float(f"{x:.6g}") for x in (whole / total).tolist()]} if total > 0 else {}
