"""Adapter slots on a model's linear layers.

The sum over slots of scale * D (B C A x) is added to each adapted layer's output. The model keeps its own modules and parameter
names, and any linear layer will do: nn.Linear, GPT-2's Conv1D (whose weight is the transpose), quantised ones. A batch holds the
rows of many clients, each with slots of its own.

Shapes: x (..., d_in), A (r, d_in), C (r, r) or (r,), B (d_out, r), D (d_out,) or (1,).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlora.errors import BadInput
from fedlora.types import Factors, Gate, Router, Slots

Weight = float | Tensor


@dataclass(frozen=True)
class Live:
    """One slot of one module, as the forward pass uses it: leaves of the graph where they train. `weight` is the gate's: a number,
    or one for each input of the batch, (batch,)."""

    A: Tensor
    B: Tensor
    scale: float
    C: Tensor | None = None
    D: Tensor | None = None
    weight: Weight = 1.0

    @property
    def is_simple(self) -> bool:
        """Nothing but scale * B A x."""
        return self.C is None and self.D is None and not isinstance(self.weight, Tensor)


def apply_slot(x: Tensor, slot: Live) -> Tensor:
    """weight * scale * D (B C A x) in the dtype of x; factors are cast to it."""
    h = linear(x, slot.A.to(x.dtype))
    if slot.C is not None:
        C = slot.C.to(x.dtype)
        h = linear(h, C) if C.ndim == 2 else h * C
    # The scale goes on the narrow side, r wide instead of d_out; so does what the gate weighs.
    scale = slot.scale * slot.weight
    if isinstance(scale, Tensor):
        scale = scale.to(x.dtype).view(-1, *[1] * (h.ndim - 1))
    y = linear(h if isinstance(scale, float) and scale == 1.0 else h * scale, slot.B.to(x.dtype))
    return y if slot.D is None else y * slot.D.to(x.dtype)


@dataclass(frozen=True)
class LiveRouter:
    """The router of one module, (2M - 1, d_in), and the places of its experts among the module's slots."""

    G: Tensor
    own: int
    others: tuple[int, ...]
    renormalise: bool


def route(x: Tensor, router: LiveRouter) -> Tensor:
    """What each slot's output is weighted with, (..., M): see `types.Router`. Of equal places the earlier one wins."""
    count = len(router.others) + 1
    p = linear(x.float(), router.G.float()).softmax(dim=-1)
    best = p.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = torch.zeros_like(p).scatter(-1, best, 1.0) * p
    if router.renormalise:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    by_expert = torch.cat([chosen[..., :count].sum(dim=-1, keepdim=True), chosen[..., count:]], dim=-1)
    place = torch.tensor([router.own, *router.others], device=x.device).argsort()
    return by_expert[..., place].to(x.dtype)


Bound = tuple[slice, tuple[Live, ...]]  # some rows of a batch, one client's, and the slots that they pass through


class Adapted:
    """A model with slots on the modules of `targets`.

    Attributes:
        bound: what the next forward pass adds: module -> its slots, rows by rows in order, all rows or none; x (..., d_in) counts
            as a matrix of rows.
        routers: module -> what weighs its slots, for each of `bound` or None.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str]) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in targets}
        self.shapes = {name: layer_shape(module) for name, module in self.modules.items()}
        self.bound: Mapping[str, Sequence[Bound]] = {}
        self.routers: Mapping[str, Sequence[LiveRouter | None]] = {}
        self.attach()

    def attach(self) -> None:
        """Put the slots on the model's layers."""
        self._before = {name: module.__dict__.get("forward") for name, module in self.modules.items()}  # quantised ones have theirs
        for name, module in self.modules.items():
            module.forward = partial(self._forward, name, module, module.forward)

    def release(self) -> None:
        """Give the model its own layers back."""
        for name, module in self.modules.items():
            del module.forward
            before = self._before[name]
            if before is not None:
                module.forward = before

    def _forward(self, name: str, module: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        bound = self.bound.get(name, ())
        if not bound:
            return plain(x)
        rows = x.flatten(0, -2)
        if bound[-1][0].stop not in (None, len(rows)):  # the trial saw the step's tokens here; never train on what it did not see
            raise BadInput(
                f"{name} is given {len(rows)} rows in a step of {bound[-1][0].stop} tokens, so clients cannot be told apart; "
                "leave it out of model.target_modules"
            )
        simple = [(where, slot) for where, slots in bound for slot in slots if slot.is_simple]
        routers = self.routers.get(name, [None] * len(bound))
        if len(simple) == sum(len(slots) for _, slots in bound) and not any(routers):
            places = tuple((where, slot.scale * slot.weight) for where, slot in simple)
            factors = [x for _, slot in simple for x in (slot.A, slot.B)]
            if is_plain(module):
                base = (module.weight, module.bias, transposed(module))
                y: Tensor = _Projected.apply(rows, *base, places, *factors)  # type: ignore[no-untyped-call]
                return y.view(*x.shape[:-1], -1)
            own = plain(rows)
            if all(each.dtype == own.dtype for each in (rows, *factors)):
                y = _Added.apply(own, rows, places, *factors)  # type: ignore[no-untyped-call]
                return y.view(*x.shape[:-1], -1)
        out = plain(x).flatten(0, -2)
        parts = [_add(out[where], rows[where], slots, router) for (where, slots), router in zip(bound, routers, strict=True)]
        return torch.cat(parts).view(*x.shape[:-1], -1)


def _add(out: Tensor, x: Tensor, slots: Sequence[Live], router: LiveRouter | None) -> Tensor:
    """The layer's output for some rows, with what their slots add."""
    weights = None if router is None else route(x, router)
    for i, slot in enumerate(slots):
        out = out + (apply_slot(x, slot) if weights is None else weights[:, i : i + 1] * apply_slot(x, slot))
    return out


Places = tuple[tuple[slice, float], ...]  # rows, and the scale of what is added to them


def _add_products(y: Tensor, x: Tensor, places: Places, factors: Sequence[Tensor]) -> list[Tensor]:
    """Write scale * B A x into the rows of y, place by place; returns scale * A x of each. `factors` are A, B, A, B, ..."""
    hs = []
    for (rows, scale), A, B in zip(places, factors[::2], factors[1::2], strict=True):
        h = x[rows] @ A.mT
        hs.append(h if scale == 1.0 else h.mul_(scale))
        y[rows].addmm_(hs[-1], B.mT)
    return hs


def _slopes(
    grad: Tensor,
    dx: Tensor | None,
    x: Tensor,
    places: Places,
    hs: Sequence[Tensor],
    factors: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of those of the factors that need one; that of x is written into dx, where there is one."""
    out: list[Tensor | None] = []
    for i, (rows, scale) in enumerate(places):
        A, B = factors[2 * i], factors[2 * i + 1]
        dA, dB = needed[2 * i], needed[2 * i + 1]
        g = grad[rows]
        dh = torch.mm(g, B).mul_(scale) if dx is not None or dA else None
        if dx is not None and dh is not None:
            dx[rows].addmm_(dh, A)
        out += [dh.mT @ x[rows] if dA and dh is not None else None, (hs[i].mT @ g).mT if dB else None]
    return out


class _Projected(torch.autograd.Function):
    """y = W x + b + sum over places of scale * B A x, for x (rows, d_in), W frozen, in one node of the graph.

    Writing each product into the output that is there already, and gradients only for what trains, is what makes many clients on
    one base cheap: W meets the rows of all of them at once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, places: Places, *factors: Tensor
    ) -> Tensor:
        y = linear(x, weight.mT if transposed else weight, bias)
        hs = _add_products(y, x, places, factors)
        ctx.places, ctx.transposed = places, transposed
        ctx.save_for_backward(x, weight, *hs, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *rest = ctx.saved_tensors
        hs, factors = rest[: len(ctx.places)], rest[len(ctx.places) :]
        needed = ctx.needs_input_grad
        dx = grad @ (weight.mT if ctx.transposed else weight) if needed[0] else None
        return dx, None, None, None, None, *_slopes(grad, dx, x, ctx.places, hs, factors, needed[5:])


class _Added(torch.autograd.Function):
    """The same on the output y of a layer that computes W x + b in a way of its own, as quantised ones do."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, places: Places, *factors: Tensor) -> Tensor:
        hs = _add_products(y, x, places, factors)
        ctx.mark_dirty(y)
        ctx.places = places
        ctx.save_for_backward(x, *hs, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        hs, factors = rest[: len(ctx.places)], rest[len(ctx.places) :]
        needed = ctx.needs_input_grad
        dx = torch.zeros_like(x) if needed[1] else None
        return grad, dx, None, *_slopes(grad, dx, x, ctx.places, hs, factors, needed[3:])


def bind(slots: Slots, modules: Sequence[str], weights: Mapping[str, Weight]) -> dict[str, tuple[Live, ...]]:
    """The slots of one client, module by module; `weights` are the gate's, by slot, 1 where absent."""

    def live(m: str, slot: str, f: Factors) -> Live:
        return Live(f.A[m], f.B[m], f.scale, f.C.get(m), f.D.get(m), weights.get(slot, 1.0))

    return {m: tuple(live(m, slot, f) for slot, f in slots.items() if m in f.A) for m in modules}


def bind_routers(gate: Gate | None, slots: Slots) -> dict[str, LiveRouter]:
    """The routers of a message, module by module; every slot is an expert in every module."""
    if not isinstance(gate, Router):
        return {}
    names = list(slots)
    own, others = names.index(gate.own), tuple(map(names.index, gate.others))
    return {m: LiveRouter(G, own, others, gate.renormalise) for m, G in gate.G.items()}


def transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (d_in, d_out), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = module.get_parameter("weight")
    return weight.shape[1], weight.shape[0]


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is exactly W x + b with a frozen matrix W, and not a quantised or otherwise wrapped one."""
    exact = type(module) is nn.Linear or transposed(module)
    return exact and not any(p.requires_grad for p in module.parameters(recurse=False))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or transposed(module)


def find_targets(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers to adapt, in the order of the model. The head's are left out: it travels whole.

    Args:
        wanted: "all-linear" for every linear layer of the blocks (those in a numbered list of layers: no embedding, pooler or
            head; and no gate, which chooses experts or has one output); a list of names ("query", "attention.output.dense"),
            each matching a whole path or its end; or a pattern that must match a whole path.

    Raises:
        BadInput: nothing matches, or a name matches no linear layer, or none outside the head.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    head = set(linears) - set(inside_base(model, linears))
    body = [name for name in linears if name not in head]
    kinds = ", ".join(sorted({re.sub(r".*\.\d+\.", "", name) for name in body}))
    if wanted == "all-linear":
        found = [name for name in body if any(part.isdigit() for part in name.split(".")) and not is_gate(model, name)]
        if not found:
            raise BadInput(
                f'model.target_modules = "all-linear": {type(model).__name__} has no linear layer in its blocks'
                + (f"; name some of: {kinds}" if kinds else "")
            )
        return found
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if not names:
        raise BadInput(f"model.target_modules = []: no layer to adapt; they end in: {kinds}")
    found = []
    for name in names:
        if isinstance(wanted, str):
            matched = [path for path in linears if _pattern(name).fullmatch(path)]
        else:
            matched = [path for path in linears if path == name or path.endswith("." + name)]
        if not matched:
            raise BadInput(f"model.target_modules: '{name}' matches no linear layer; they end in: {kinds}")
        if head.issuperset(matched):
            raise BadInput(
                f"model.target_modules: '{name}' matches only the head, which has no adapter (model.head = \"shared\" trains it); "
                f"layers outside it end in: {kinds}"
            )
        found += matched
    return [path for path in body if path in found]


def inside_base(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of these paths that lie in the base model, not in a head on it."""
    prefix = getattr(model, "base_model_prefix", "")
    return [name for name in names if not prefix or name.startswith(prefix + ".")]


def is_gate(model: nn.Module, path: str) -> bool:
    """Whether a linear layer is a mixture's gate: it has one output, or as many as there are experts beside it, which are modules
    in a list or lie in one tensor (experts, ., .)."""
    outputs, _ = layer_shape(model.get_submodule(path))
    around = [model.get_submodule(path.rsplit(".", up)[0]) for up in (1, 2) if path.count(".") >= up]
    beside = [child for each in around for child in each.children() if child not in around]
    lists = [len(child) for child in beside if isinstance(child, nn.ModuleList) and any(map(is_linear, child.modules()))]
    tensors = [p.shape[0] for each in (*around, *beside) for p in each.parameters(recurse=False) if p.ndim == 3]
    return outputs in {1, *lists, *tensors}


def _pattern(wanted: str) -> re.Pattern[str]:
    try:
        return re.compile(wanted)
    except re.error as error:
        raise BadInput(f"model.target_modules = '{wanted}': not a regular expression: {error}") from error
