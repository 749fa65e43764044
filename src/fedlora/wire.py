"""One byte format for messages and checkpoints: any tree of frozen dataclasses, mappings, sequences, plain values and tensors.

A message is one safetensors file. Tensors of one dtype lie in one flat buffer, in the order of the tree; bool masks are packed,
eight to a byte. The tree itself (compressed JSON, under "tree") says what goes where. A tensor that occurs twice is stored once,
and comes back as one tensor. Nothing is executed on reading: classes come from a closed list, and every size is checked.
"""

import json
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlora import types
from fedlora.algebra.tensors import Flat
from fedlora.history import History

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool)
DTYPES = {str(d).removeprefix("torch."): d for d in FLOATS + OTHERS}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Limits on what a hostile header can ask for.
LARGEST_TREE = 1 << 26  # bytes of JSON after decompression
MOST_AXES = 16
SAME = 16  # outlines whose headers are remembered: most clients of a round send the same one
Outline = tuple[Any, tuple[tuple[torch.dtype, torch.Size], ...]]  # the tree, and dtype and shape of its tensors
OLD = {"Kept": "ClientState", "ByTask": "ByDomain"}  # class names in files of earlier versions -> what they are called now
# The fields of a class in files of an earlier version, where some are gone since: module.class -> names.
OLD_FIELDS: Mapping[str, Sequence[str]] = {
    "methods.fed_sb.State": ("rounds", "shared", "know"),
    "methods.feddpa.State": ("shared", "rounds", "federated"),
    "methods.fedlease.State": (
        *("warmup", "epochs", "fresh", "draw", "wanted", "deadline", "round", "waiting", "experts", "routers", "clusters"),
    ),
    "methods.fedsvd.State": ("rounds", "turned", "shared", "seen"),
    "methods.fl_tac.State": ("seed", "round", "count", "start", "owned", "means", "clusters"),
    "methods.flora.State": ("rounds", "scale", "merged"),
    "methods.fslora.State": ("rounds", "seed", "shared"),
    "methods.lora_a2.State": ("rounds", "epochs", "shared", "seen"),
    "methods.mfedloru.State": ("rounds", "cycle", "seed", "shared", "merged"),
    "methods.pfedloru.State": ("rounds", "cycle", "seed", "shared", "merged"),
    "methods.rolora.State": ("rounds", "shared", "seen"),
}
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


def encode(tree: Any, apart: Sequence[Tensor] = ()) -> bytes:
    """The bytes of a tree. Tensors that are `apart` are left out, for the reader has them. TypeError names what cannot travel."""
    outline, tensors = _flatten(tree, apart)
    groups: dict[str, list[Tensor]] = {}
    for (dtype, _), t in zip(outline[1], tensors, strict=True):
        groups.setdefault(NAMES[dtype], []).append(_flat(t))
    buffers = {name: torch.cat(group) for name, group in groups.items()}
    return save({"tree": torch.frombuffer(bytearray(_header(outline)), dtype=torch.uint8), **buffers})


def measure(tree: Any) -> Size:
    """The parts of `len(encode(tree))`, without copying a value."""
    return _measured(_flatten(tree)[0])


@lru_cache(maxsize=SAME)
def _measured(outline: Outline) -> Size:
    counts: dict[str, int] = {}  # of elements in the buffers
    for dtype, shape in outline[1]:
        counts[NAMES[dtype]] = counts.get(NAMES[dtype], 0) + _stored(NAMES[dtype], math.prod(shape))
    size = {name: count * DTYPES[name].itemsize for name, count in counts.items()}
    values = sum(s for name, s in size.items() if DTYPES[name].is_floating_point)
    numbers = sum(count for name, count in counts.items() if DTYPES[name].is_floating_point)
    header = len(_header(outline))
    around = _safetensors_header(tuple(sorted({"tree": header, **counts}.items())))
    return Size(values, sum(size.values()) - values, around + header, numbers)


def decode(data: bytes, classes: Iterable[type[Any]], largest_tree: int = LARGEST_TREE, apart: Sequence[Tensor] = ()) -> Any:
    """The tree of `encode`. `classes` are the dataclasses and enums that may occur, beside those of `fedlora.types`;
    `largest_tree` the bytes of JSON that its header may have; `apart` the tensors that were left out of it.

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
        text = unpack.decompress(tree.numpy().tobytes(), largest_tree)
        if unpack.unconsumed_tail or not unpack.eof:
            raise ValueError("its header is too large or cut off")
        header = json.loads(text)
        return _build(header["tree"], [*apart, *_cut(stored, header["tensors"])], allowed)
    except ValueError:
        raise
    except DAMAGE as error:
        raise ValueError(f"damaged message: {error!r}") from error


def message_classes(method: Any) -> list[type[Any]]:
    """The dataclasses and enums that a method's messages and state may hold, beside those of `fedlora.types`: what the modules of
    its class and of the classes that it inherits from define or import. Of two with one name the nearest counts: one that a module
    defines before one that it imports, the class's own module before those of its bases."""
    return list(_classes_around(type(method)))  # type: ignore[arg-type]  # a class can be a key


@cache  # every reply is checked by it
def _classes_around(kind: type[Any]) -> tuple[type[Any], ...]:
    found: dict[str, type[Any]] = {}
    plain = _plain_classes()
    for name in dict.fromkeys(c.__module__ for c in kind.__mro__):
        there = [c for c in vars(sys.modules[name]).values() if isinstance(c, type) and c not in plain]
        for c in sorted(there, key=lambda c: c.__module__ != name):
            if is_dataclass(c) or (issubclass(c, Enum) and len(c)):
                found.setdefault(c.__name__, c)
    return tuple(found.values())


def tensors_of(tree: Any) -> list[Tensor]:
    """The different tensors of a tree, in its order; of a `Flat` its entries."""
    return _flatten(tree)[1]


def finite(tree: Any, known: Any = None) -> bool:
    """Whether all numbers of a tree are finite; tensors of a tree that is known to be so are not looked at again."""
    seen = {id(t) for t in tensors_of(known)}
    return all(all_finite(t) for t in tensors_of(tree) if id(t) not in seen)


def all_finite(t: Tensor) -> bool:
    """A finite sum has finite terms; only where it is not, which large terms can do too, each of them is looked at."""
    return math.isfinite(t.sum().item()) or bool(t.isfinite().all())


# ---- the tree ----------------------------------------------------------------------------------------------------------
# JSON of a node: a plain value as it is; {"t": n} the n-th tensor; {"f": hex} a float; {"l": [...]} a list, {"u": [...]} a tuple,
# {"m": [[k, v], ...]} a mapping, {"v": [n, [k, sizes...], ...]} a `Flat` one whose entries are the n-th tensor, {"d": [class,
# fields...]} a dataclass, {"e": [class, value]} an enum.


def _flatten(tree: Any, apart: Sequence[Tensor] = ()) -> tuple[Outline, list[Tensor]]:
    """What a tree is but for the numbers in its tensors, and those; the ones that are `apart` are not among them, and have the
    first places. Trees of equal outlines differ in numbers only: nodes are tuples (kind, body), and True, which equals 1, is a node
    of its own."""
    tensors: dict[int, tuple[int, Tensor]] = {id(t): (i, t) for i, t in enumerate(apart)}
    whole = _node(tree, tensors)
    own = [t for _, t in tensors.values()][len(apart) :]
    for t in own:
        if t.dtype not in NAMES:
            raise TypeError(f"a tensor of {t.dtype} cannot travel")
    return (whole, tuple([(t.dtype, t.shape) for t in own])), own


def _node(x: Any, tensors: dict[int, tuple[int, Tensor]]) -> Any:
    """The node of a value; its tensors go into `tensors`: id -> place and tensor. No closure that calls itself: such a one lives
    until the garbage collector comes by, and the tensors with it."""
    if isinstance(x, Tensor):
        return "t", tensors.setdefault(id(x), (len(tensors), x))[0]
    if isinstance(x, Enum):  # before int and str: an enum may also be one of them
        return "e", (type(x).__name__, _node(x.value, tensors))
    if isinstance(x, bool):
        return "b", int(x)
    if x is None or isinstance(x, int | str):
        return x
    if isinstance(x, float):
        return "f", x.hex()
    if isinstance(x, Flat):
        return "v", (_node(x.entries, tensors)[1], *[(name, *shape) for name, shape in x.shapes.items()])
    if is_dataclass(x):
        return "d", (type(x).__name__, *[_node(getattr(x, f.name), tensors) for f in fields(x)])
    if isinstance(x, Mapping):
        return "m", tuple([(k if type(k) is str else _node(k, tensors), _node(v, tensors)) for k, v in x.items()])
    if isinstance(x, list | tuple):
        return "l" if isinstance(x, list) else "u", tuple([_node(v, tensors) for v in x])
    raise TypeError(f"a {type(x).__name__} cannot travel: states and messages hold tensors and plain values only")


def _json(node: Any) -> Any:
    """A node of an outline as it stands in the header."""
    if not isinstance(node, tuple):
        return node
    kind, body = node
    if kind == "b":
        return bool(body)
    if kind == "v":
        return {"v": body}
    if kind == "m":
        return {"m": [[_json(k), _json(v)] for k, v in body]}
    return {kind: [_json(x) for x in body] if isinstance(body, tuple) else body}


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
        case "v":
            return _flat_of(inner({"t": body[0]}), body[1:])
        case "f":
            return float.fromhex(body)
        case "e":
            return _class(body[0], allowed)(body[1])
        case "d":
            cls = _class(body[0], allowed)
            given = {name: inner(v) for name, v in zip(_names(cls, len(body) - 1), body[1:], strict=True)}
            return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})
        case "m":
            return {inner(k): inner(v) for k, v in body}
        case "l":
            return [inner(v) for v in body]
        case "u":
            return tuple(inner(v) for v in body)
    raise ValueError(f"unknown node '{kind}'")


def _flat_of(entries: Tensor, parts: list[list[Any]]) -> Flat:
    # A size beside a zero takes no entries, and yet torch cannot count with any: what is refused here must not fail later.
    sane = ((name, shape) for name, *shape in parts if _possible(shape) and math.prod(max(n, 1) for n in shape) < 2**63)
    shapes = {name: torch.Size(shape) for name, shape in sane if isinstance(name, str)}
    if entries.ndim != 1 or len(shapes) != len(parts) or sum(math.prod(shape) for shape in shapes.values()) != len(entries):
        raise ValueError("a vector that does not have the parts it says")
    return Flat(entries, shapes)


def _class(name: str, allowed: Mapping[str, type[Any]]) -> Any:
    name = name if name in allowed else OLD.get(name, name)
    if name not in allowed:
        raise ValueError(f"class '{name}' is not allowed in this message")
    return allowed[name]


def _names(cls: type[Any], count: int) -> Sequence[str]:
    """The fields of a class of which a message gives so many: all, those of an earlier version (`OLD_FIELDS`), or the first ones,
    where the rest was appended later and has defaults."""
    own = [f.name for f in fields(cls)]
    if count == len(own):
        return own
    before = OLD_FIELDS.get(f"{cls.__module__.removeprefix('fedlora.')}.{cls.__name__}", ())
    if count == len(before):
        return before
    needed = sum(f.default is MISSING and f.default_factory is MISSING for f in fields(cls))
    if not needed <= count < len(own):
        raise ValueError(f"{cls.__name__} has {len(own)} fields, the message gives {count}")
    return own[:count]


def _plain_classes() -> list[type[Any]]:
    own = [c for c in vars(types).values() if isinstance(c, type) and c.__module__ == types.__name__ and is_dataclass(c)]
    return [*own, History]


# ---- the buffers -------------------------------------------------------------------------------------------------------


def _possible(shape: list[Any]) -> bool:
    return len(shape) <= MOST_AXES and all(type(n) is int and 0 <= n < 2**63 for n in shape)


def _dtype(name: str) -> torch.dtype:
    return torch.uint8 if name == "bool" else DTYPES[name]


def _stored(name: str, count: int) -> int:
    """How many elements of its buffer so many of a tensor take."""
    return -(-count // 8) if name == "bool" else count


def _flat(t: Tensor) -> Tensor:
    t = t.detach().cpu().flatten()
    return torch.from_numpy(np.packbits(t.numpy())) if t.dtype == torch.bool else t


def _cut(buffers: Mapping[str, Tensor], shapes: list[list[Any]]) -> list[Tensor]:
    """The buffers, cut back into tensors in order."""
    at = dict.fromkeys(buffers, 0)
    out = []
    for name, *shape in shapes:
        if not _possible(shape) or name not in at:
            raise ValueError("a tensor with an impossible shape or dtype")
        count = math.prod(shape)
        length = _stored(name, count)
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


@lru_cache(maxsize=SAME)
def _header(outline: Outline) -> bytes:
    tree, tensors = outline
    text = json.dumps({"tree": _json(tree), "tensors": [[NAMES[dtype], *shape] for dtype, shape in tensors]}, separators=(",", ":"))
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
