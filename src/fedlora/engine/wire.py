"""One byte format for messages and checkpoints: any tree of frozen dataclasses, mappings, sequences, plain values and tensors.

A message is one safetensors file. Tensors of one dtype lie in one flat buffer, in the order of the tree; bool masks are packed,
eight to a byte. The tree itself (compressed JSON, under "tree") says what goes where. A tensor that occurs twice is stored once,
and comes back as one tensor. Nothing is executed on reading: classes come from a closed list, and every size is checked.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlora import types
from fedlora.history import History

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
DTYPES = {str(d).removeprefix("torch."): d for d in FLOATS + OTHERS}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Limits on what a hostile header can ask for.
LARGEST_TREE = 1 << 26  # bytes of JSON after decompression
MOST_AXES = 16
# What reading damaged bytes may raise, beside ValueError.
DAMAGE = (SafetensorError, zlib.error, LookupError, TypeError, RuntimeError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Size:
    """Bytes of one message: `values` carry weights, `indices` say where they belong, `header` is the rest. `numbers` counts the
    weights: what papers call communicated parameters."""

    values: int = 0
    indices: int = 0
    header: int = 0
    numbers: int = 0

    @property
    def total(self) -> int:
        return self.values + self.indices + self.header

    def __add__(self, other: "Size") -> "Size":
        return Size(
            self.values + other.values,
            self.indices + other.indices,
            self.header + other.header,
            self.numbers + other.numbers,
        )


def encode(tree: Any) -> bytes:
    """The bytes of a tree. TypeError names what cannot travel."""
    node, tensors = _flatten(tree)
    buffers = {name: torch.cat([_flat(t) for t in group]) for name, group in _grouped(tensors).items()}
    return save({"tree": torch.frombuffer(bytearray(_header(node)), dtype=torch.uint8), **buffers})


def measure(tree: Any) -> Size:
    """The parts of `len(encode(tree))`, without copying a value."""
    node, tensors = _flatten(tree)
    groups = _grouped(tensors)
    counts = {name: sum(_stored(t) for t in group) for name, group in groups.items()}
    size = {name: counts[name] * DTYPES[name].itemsize for name in groups}
    values = sum(s for name, s in size.items() if DTYPES[name].is_floating_point)
    numbers = sum(count for name, count in counts.items() if DTYPES[name].is_floating_point)
    header = len(_header(node))
    around = _safetensors_header(tuple(sorted({"tree": header, **counts}.items())))
    return Size(values, sum(size.values()) - values, around + header, numbers)


def decode(data: bytes, classes: Iterable[type[Any]]) -> Any:
    """The tree of `encode`. `classes` are the dataclasses and enums that may occur, beside those of `fedlora.types`.

    Raises:
        ValueError: the bytes are damaged, or ask for something that is not allowed.
    """
    allowed = {c.__name__: c for c in (*_plain_classes(), *classes)}
    try:
        stored = load(data)
        tree = stored.pop("tree", None)
        if tree is None or tree.dtype != torch.uint8:
            raise ValueError("not a fedlora message")
        if any(name not in DTYPES or buffer.dtype != _dtype(name) or buffer.ndim != 1 for name, buffer in stored.items()):
            raise ValueError("not a fedlora message")
        unpack = zlib.decompressobj()
        text = unpack.decompress(tree.numpy().tobytes(), LARGEST_TREE)
        if unpack.unconsumed_tail or not unpack.eof:
            raise ValueError("its header is too large or cut off")
        header = json.loads(text)
        return _build(header["tree"], _cut(stored, header["tensors"]), allowed)
    except ValueError:
        raise
    except DAMAGE as error:
        raise ValueError(f"damaged message: {error!r}") from error


def message_classes(method: Any) -> list[type[Any]]:
    """The dataclasses and enums that a method's messages and state may hold: those of the file that it is defined in."""
    import sys

    module = sys.modules[type(method).__module__]
    return [
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == module.__name__ and (is_dataclass(c) or issubclass(c, Enum))
    ]


# ---- the tree ----------------------------------------------------------------------------------------------------------
# JSON of a node: a plain value as it is; {"t": n} the n-th tensor; {"l": [...]} a list, {"u": [...]} a tuple, {"m": [[k, v], ...]}
# a mapping, {"d": [class, fields...]} a dataclass, {"e": [class, value]} an enum.


def _flatten(tree: Any) -> tuple[Any, list[Tensor]]:
    tensors: list[Tensor] = []
    seen: dict[int, int] = {}

    def node(x: Any) -> Any:
        if isinstance(x, Tensor):
            if id(x) not in seen:
                seen[id(x)] = len(tensors)
                tensors.append(x)
            return {"t": seen[id(x)]}
        if isinstance(x, Enum):  # before int and str: an enum may also be one of them
            return {"e": [type(x).__name__, x.value]}
        if x is None or isinstance(x, bool | int | str):
            return x
        if isinstance(x, float):
            return {"f": x.hex()}
        if is_dataclass(x):
            return {"d": [type(x).__name__, *(node(getattr(x, f.name)) for f in fields(x))]}
        if isinstance(x, Mapping):
            return {"m": [[k if type(k) is str else node(k), node(v)] for k, v in x.items()]}
        if isinstance(x, list):
            return {"l": [node(v) for v in x]}
        if isinstance(x, tuple):
            return {"u": [node(v) for v in x]}
        raise TypeError(f"a {type(x).__name__} cannot travel: states and messages hold tensors and plain values only")

    return {"tree": node(tree), "tensors": [[_name(t), *t.shape] for t in tensors]}, tensors


def _build(node: Any, tensors: list[Tensor], allowed: Mapping[str, type[Any]]) -> Any:
    if isinstance(node, list | float):
        raise ValueError("a bare list or number")
    if not isinstance(node, dict):
        return node
    ((kind, body),) = node.items()

    def inner(x: Any) -> Any:
        return _build(x, tensors, allowed)

    match kind:
        case "t":
            if not isinstance(body, int) or body < 0:
                raise ValueError("a tensor that is not there")
            return tensors[body]
        case "f":
            return float.fromhex(body)
        case "e":
            return _class(body[0], allowed)(body[1])
        case "d":
            cls = _class(body[0], allowed)
            if len(body) - 1 != len(fields(cls)):
                raise ValueError(f"{body[0]} has {len(fields(cls))} fields, the message gives {len(body) - 1}")
            return cls(**{f.name: inner(v) for f, v in zip(fields(cls), body[1:], strict=True)})
        case "m":
            return {inner(k): inner(v) for k, v in body}
        case "l":
            return [inner(v) for v in body]
        case "u":
            return tuple(inner(v) for v in body)
    raise ValueError(f"unknown node '{kind}'")


def _class(name: str, allowed: Mapping[str, type[Any]]) -> Any:
    if name not in allowed:
        raise ValueError(f"class '{name}' is not allowed in this message")
    return allowed[name]


def _plain_classes() -> list[type[Any]]:
    own = [c for c in vars(types).values() if isinstance(c, type) and c.__module__ == types.__name__ and is_dataclass(c)]
    return [*own, History]


# ---- the buffers -------------------------------------------------------------------------------------------------------


def _name(t: Tensor) -> str:
    if t.dtype not in NAMES:
        raise TypeError(f"a tensor of {t.dtype} cannot travel")
    return NAMES[t.dtype]


def _dtype(name: str) -> torch.dtype:
    return torch.uint8 if name == "bool" else DTYPES[name]


def _stored(t: Tensor) -> int:
    """How many elements a tensor takes in its buffer."""
    return math.ceil(t.numel() / 8) if t.dtype == torch.bool else t.numel()


def _flat(t: Tensor) -> Tensor:
    t = t.detach().cpu().flatten()
    return torch.from_numpy(np.packbits(t.numpy())) if t.dtype == torch.bool else t


def _grouped(tensors: list[Tensor]) -> dict[str, list[Tensor]]:
    groups: dict[str, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(_name(t), []).append(t)
    return groups


def _cut(buffers: Mapping[str, Tensor], shapes: list[list[Any]]) -> list[Tensor]:
    """The buffers, cut back into tensors in order."""
    at = dict.fromkeys(buffers, 0)
    out = []
    for name, *shape in shapes:
        possible = len(shape) <= MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in shape)
        if not possible or name not in at:
            raise ValueError("a tensor with an impossible shape or dtype")
        count = math.prod(shape)
        length = -(-count // 8) if name == "bool" else count
        if length > len(buffers[name]) - at[name]:
            raise ValueError("a tensor is larger than its buffer")
        part = buffers[name][at[name] : at[name] + length]
        at[name] += length
        if name == "bool":
            part = torch.from_numpy(np.unpackbits(part.numpy(), count=count).astype(bool))
        out.append(part.view(shape))
    if any(at[name] != len(buffer) for name, buffer in buffers.items()):
        raise ValueError("bytes that belong to no tensor")
    return out


def _header(node: Any) -> bytes:
    return _compressed(json.dumps(node, separators=(",", ":")))


@lru_cache(maxsize=256)  # the same for most clients of a round
def _compressed(text: str) -> bytes:
    return zlib.compress(text.encode(), 6)


@lru_cache(maxsize=256)
def _safetensors_header(counts: tuple[tuple[str, int], ...]) -> int:
    """Length of what safetensors itself adds: 8 bytes and a JSON padded to a multiple of 8. `counts`: buffer -> its elements."""
    dtypes = {name: torch.uint8 if name == "tree" else _dtype(name) for name, _ in counts}
    empty = save({name: torch.empty(0, dtype=dtype) for name, dtype in dtypes.items()})
    table, elements = json.loads(empty[8:]), dict(counts)
    end = 0
    # safetensors lays out wider dtypes first, then by name; offsets are the only thing that depends on the sizes.
    for name in table:
        size = elements[name] * dtypes[name].itemsize
        table[name] |= {"shape": [elements[name]], "data_offsets": [end, end + size]}
        end += size
    text = len(json.dumps(table, separators=(",", ":")))
    return 8 + math.ceil(text / 8) * 8
