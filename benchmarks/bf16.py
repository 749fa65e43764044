"""bf16 arithmetic for a CPU that has none: what bf16 units compute, by fp32 products.

Without them torch multiplies bf16 matrices some hundred times slower than fp32 ones. A bf16 unit multiplies exactly, adds up in
fp32 and rounds the sum to bf16 once; so does this, by an fp32 product of the same numbers, rounded. Only the order of the sum
differs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.linear.default}
IN_PLACE = {aten.addmm_.default: aten.addmm.default, aten.baddbmm_.default: aten.baddbmm.default}


class Widened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every product of bf16 matrices is computed so, forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func not in PRODUCTS and func not in IN_PLACE) or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        wide = [x.float() if isinstance(x, Tensor) else x for x in args]
        out = IN_PLACE.get(func, func)(*wide, **kwargs)
        return args[0].copy_(out) if func in IN_PLACE else out.to(torch.bfloat16)
