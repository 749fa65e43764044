"""The transforms of a run: a client's changes go through them on their way out, and back at the server.

    client   u = changes + memory;   each transform in turn encodes u;   what travels is a Packed in place of the Up
    memory   the sum of what each transform with error feedback lost, put back in the places of u; kept beside `held`
    server   each transform decodes, the last one first; the Up is then checked and aggregated as if nothing had happened

Methods and their messages know nothing of it: an Up says by `change` which of its fields may be touched, and by `index` where a
field's entries belong, so that memory stays with the same parameters when a client sends others in the next round. A head that is
shared travels as it is.
"""

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora import seeds, transforms, wire
from fedlora.algebra.tensors import minus, plus
from fedlora.config import HeadMode, TransformConfig
from fedlora.errors import BadInput
from fedlora.transforms import Transform
from fedlora.types import Client, Method, Nothing, Tensors, Unfit


@dataclass(frozen=True)
class Packed:
    """An Up on its way.

    Attributes:
        up: the Up without its changes.
        numbers: "field module" -> what the last transform left of it.
        sides: of each transform, what else it takes to decode.
    """

    up: Any
    numbers: Tensors
    sides: tuple[Any, ...]


@dataclass(frozen=True)
class Pipeline:
    steps: tuple[Transform, ...] = ()
    seed: int = 0

    def pack(self, up: Any, memory: Tensors, round: int, client: Client) -> tuple[Any, Tensors]:
        """What travels, and the client's new memory; the Up itself where there are no transforms, or nothing to act on."""
        changes = _changes(up) if self.steps else {}
        if not changes:
            return up, memory
        places = {name: _places(up, name, x) for name, x in changes.items()}
        x = {name: u + _recall(memory, name, u, places[name]) for name, u in changes.items()}
        lost: Tensors = {}
        sides: list[Any] = []
        for i, step in enumerate(self.steps):
            numbers, side = step.encode(x, seeds.generator(self.seed, "transform", i, round, client.id))
            if step.error_feedback:
                loss = minus(x, step.decode(numbers, side))
                for before, its_side in zip(reversed(self.steps[:i]), reversed(sides), strict=True):
                    loss = dict(before.decode(loss, its_side))  # where the entries stand in the changes
                lost = plus(lost, loss) if lost else loss
            x = dict(numbers)
            sides.append(side)
        kept = {name: _put(memory, name, e.to(changes[name].dtype), places[name]) for name, e in lost.items()}
        empty = replace(up, **{f.name: {} for f in fields(up) if f.metadata.get("kind") == "change"})
        return Packed(empty, x, tuple(sides)), {**memory, **kept}

    def unpack(self, sent: Any) -> Any:
        """The Up that the server uses.

        Raises:
            ValueError: it cannot be read; says why.
        """
        if not self.steps:
            return sent
        if isinstance(sent, Nothing | Unfit):
            return sent
        if not isinstance(sent, Packed) or not is_dataclass(sent.up) or isinstance(sent.up, type):
            raise ValueError(f"it is a {type(sent).__name__}, which did not go through the transforms of this run")
        try:
            x = sent.numbers
            for step, side in zip(reversed(self.steps), reversed(sent.sides), strict=True):
                x = step.decode(x, side)
            parts: dict[str, dict[str, Tensor]] = {}
            for name, u in x.items():
                where, _, module = name.partition(" ")
                parts.setdefault(where, {})[module] = u
            return replace(sent.up, **parts)
        except (ValueError, *wire.DAMAGE) as error:
            raise ValueError(f"its transformed changes cannot be read: {str(error).splitlines()[0]:.120}") from error

    def _count(self, sent: Packed) -> int:
        """How many values of weights a message carries, however coarse."""
        x: Tensors = sent.numbers
        for step, side in zip(reversed(self.steps), reversed(sent.sides), strict=True):
            if step.numbers_out:
                break
            x = step.decode(x, side)
        return sum(u.numel() for u in x.values()) + wire.measure(sent.up).numbers

    def measure(self, sent: Any) -> wire.Size:
        """The parts of a message's bytes; codes count as values, scales too."""
        size = wire.measure(sent)
        if not isinstance(sent, Packed):
            return size
        codes = sum(u.numel() * u.element_size() for u in sent.numbers.values() if not u.is_floating_point())
        return replace(size, values=size.values + codes, indices=size.indices - codes, numbers=self._count(sent))


UNCHANGED = Pipeline()


def make(configs: Sequence[TransformConfig], method: Method, seed: int, head: HeadMode = HeadMode.FROZEN) -> Pipeline:
    """The configured transforms.

    Raises:
        BadInput: one cannot be made; the method sends values; or one is there to tell less of the data, and beside what it acts on
            something else travels that it does not name.
    """
    steps = tuple(transforms.make(config.name, config.settings) for config in configs)
    for config, step in zip(configs[:-1], steps[:-1], strict=True):
        if not step.numbers_out:
            raise BadInput(f"transform {config.name} leaves codes, which no other transform can act on: it must be the last")
    for name in [f.name for f in _declared(method) if f.metadata["kind"] == "value"] if steps else ():
        raise BadInput(
            f"{method.FACTS.title} uploads '{name}' as a value, not as a change, so transform {configs[0].name} cannot act on it"
        )
    named = {name for step in steps for name in step.bare or ()}
    for i, (config, step) in enumerate(zip(configs, steps, strict=True)):
        beside = _beside(method, head, configs[:i], steps[:i]) if step.bare is not None else {}
        untold = [name for name in beside if name not in named]
        if untold:
            raise BadInput(
                f"transform {config.name} acts on changes alone, but '{untold[0]}', {beside[untold[0]]}, travels as it is; "
                f"where that may be seen, say so in the transform: bare = {sorted({*untold, *(step.bare or ())})}"
            )
    return Pipeline(steps, seed)


def message_classes() -> list[type[Any]]:
    """What a transformed message may hold beside the method's own classes."""
    return [Packed, *transforms.message_classes()]


def _declared(method: Method) -> list[Field[Any]]:
    """The fields of the method's messages that say what they are."""
    found = [f for c in wire.message_classes(method) if is_dataclass(c) for f in fields(c)]
    return [f for f in found if "kind" in f.metadata]


def _beside(method: Method, head: HeadMode, configs: Sequence[TransformConfig], steps: Sequence[Transform]) -> dict[str, str]:
    """What tells of a client's data and is no change, by name, after these transforms."""
    kinds = {"index": "which entries {} sends", "statistic": "a statistic that {} sends"}
    told = {f.name: kinds[f.metadata["kind"]].format(method.FACTS.title) for f in _declared(method) if f.metadata["kind"] in kinds}
    told |= {config.name: "which entries it chose" for config, step in zip(configs, steps, strict=True) if step.bare is None}
    return told | {"head": "the shared head"} if head is HeadMode.SHARED else told


def _changes(up: Any) -> dict[str, Tensor]:
    """ "field module" -> tensor. Field names have no spaces, whatever modules have."""
    names = [f.name for f in fields(up) if f.metadata.get("kind") == "change"]
    return {f"{name} {m}": x for name in names for m, x in getattr(up, name).items()}


# ---- memory ------------------------------------------------------------------------------------------------------------
#
# An entry keeps its memory also where its method turns the direction that it is along from one round to the next (FedSVD, the
# nested factors of mFedLoRU) or draws it anew at a merge (the FedLoRU family). Turned directions lie near those before, and
# forgetting every time is worse, next to no feedback at all; at a merge it would gain a per cent or two.


def _places(up: Any, name: str, x: Tensor) -> Tensor | None:
    """Where the entries of a change stand among all that it could hold: a bool mask of the whole's shape. None: everywhere."""
    where, _, module = name.partition(" ")
    masks = {f.metadata["dims"][0]: getattr(up, f.name) for f in fields(up) if f.metadata.get("kind") == "index"}
    dims = next(f.metadata["dims"] for f in fields(up) if f.name == where)
    if not any(axis in masks for axis in dims):
        return None
    whole = torch.ones((1,) * len(dims), dtype=torch.bool)
    for i, axis in enumerate(dims):
        along = masks[axis][module] if axis in masks else torch.ones(x.shape[i], dtype=torch.bool)
        whole = whole & along.view([-1 if j == i else 1 for j in range(len(dims))])
    return whole


def _recall(memory: Tensors, name: str, x: Tensor, places: Tensor | None) -> Tensor:
    """What the client remembers of these entries; zero where it remembers nothing that fits."""
    shape = x.shape if places is None else places.shape
    if name not in memory or memory[name].shape != shape:
        return torch.zeros_like(x)
    return memory[name] if places is None else memory[name][places].view(x.shape)


def _put(memory: Tensors, name: str, lost: Tensor, places: Tensor | None) -> Tensor:
    """The memory of a change with the entries that took part replaced."""
    if places is None:
        return lost
    fits = name in memory and memory[name].shape == places.shape
    whole = memory[name].clone() if fits else lost.new_zeros(places.shape)
    whole[places] = lost.flatten()
    return whole
