"""Adapter slots on a model's linear layers.

A hook adds the sum over slots of scale * D (B C A x) to each adapted layer's output, so the model keeps its own modules and
parameter names, and any linear layer will do: nn.Linear, GPT-2's Conv1D (whose weight is the transpose), quantised ones.

Shapes: x (..., d_in), A (r, d_in), C (r, r) or (r,), B (d_out, r), D (d_out,) or (1,).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from fedlora.errors import BadInput
from fedlora.types import Slots


@dataclass(frozen=True)
class Live:
    """One slot of one module, as the forward pass uses it: leaves of the graph where they train."""

    A: Tensor
    B: Tensor
    scale: float
    C: Tensor | None = None
    D: Tensor | None = None


def apply_slot(x: Tensor, slot: Live) -> Tensor:
    """scale * D (B C A x) in the dtype of x; factors are cast to it."""
    h = linear(x, slot.A.to(x.dtype))
    if slot.C is not None:
        C = slot.C.to(x.dtype)
        h = linear(h, C) if C.ndim == 2 else h * C
    # The scale goes on the narrow side, r wide instead of d_out.
    y = linear(h * slot.scale if slot.scale != 1.0 else h, slot.B.to(x.dtype))
    return y if slot.D is None else y * slot.D.to(x.dtype)


class Adapted:
    """A model with slots on the modules of `targets`. `bound` is what the next forward pass adds: module -> its slots."""

    def __init__(self, model: nn.Module, targets: Sequence[str]) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in targets}
        self.shapes = {name: layer_shape(module) for name, module in self.modules.items()}
        self.bound: Mapping[str, Sequence[Live]] = {}
        self._hooks: list[RemovableHandle] = [m.register_forward_hook(self._hook(name)) for name, m in self.modules.items()]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for slot in self.bound.get(name, ()):
                output = output + apply_slot(args[0], slot)
            return output

        return add


def bind(slots: Slots, modules: Sequence[str]) -> dict[str, list[Live]]:
    """The slots of a message, module by module."""
    return {m: [Live(f.A[m], f.B[m], f.scale, f.C.get(m), f.D.get(m)) for f in slots.values() if m in f.A] for m in modules}


def transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (d_in, d_out), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or transposed(module)


def find_targets(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers to adapt, in the order of the model.

    Args:
        wanted: "all-linear" for every linear layer of the blocks (those in a numbered list of layers: no embedding, pooler or
            head); a list of names ("query", "attention.output.dense"), each matching a whole path or its end; or a pattern
            that must match a whole path.

    Raises:
        BadInput: nothing matches, or a name matches no linear layer.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    if wanted == "all-linear":
        return [name for name in linears if any(part.isdigit() for part in name.split("."))]
    kinds = ", ".join(sorted({re.sub(r".*\.\d+\.", "", name) for name in linears}))
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise BadInput(f"model.target_modules = '{wanted}': not a regular expression: {error}") from error
        found = [name for name in linears if pattern.fullmatch(name)]
        if not found:
            raise BadInput(f"model.target_modules = '{wanted}' matches no linear layer; they end in: {kinds}")
        return found
    for name in wanted:
        if not any(path == name or path.endswith("." + name) for path in linears):
            raise BadInput(f"model.target_modules: '{name}' matches no linear layer; they end in: {kinds}")
    return [path for path in linears if any(path == name or path.endswith("." + name) for name in wanted)]
