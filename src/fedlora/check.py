"""What a reply must look like before the server uses it: the fields that the method's file declares, and nothing else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.algebra.tensors import Flat, Tensors
from fedlora.errors import first_line
from fedlora.types import Client, Method, Nothing, Setup, Unfit, declared
from fedlora.wire import all_finite, message_classes

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
INFINITE = "not all of its numbers are finite"


def refuse(up: Any, method: Method, setup: Setup, client: Client) -> str | None:
    """Why this Up must not be used, in one line, or None. Never raises, whatever the client sent."""
    name = type(up).__name__
    if type(up) is Nothing and method.FACTS.silent:
        return None
    if type(up) is Unfit:
        return first_line(str(up.reason)[:200])
    if not is_dataclass(up) or type(up) not in message_classes(method):
        return f"it is a {name}, which is no message of {method.FACTS.title}"
    parts = {f.name: getattr(up, f.name, None) for f in fields(up)}
    kinds = declared(up)
    if not kinds:
        return f"it is a {name}, which is not what {method.FACTS.title} uploads"
    for field, part in parts.items():
        if field not in kinds and not _plain(part):
            return f"field '{field}' holds more than plain finite values"
    sizes: Mapping[str, int | range | Mapping[str, int]] = {"rank": client.rank, **method.FACTS.dims(method, setup, client)}
    seen: dict[tuple[str, str], int] = {}
    indexed = {dims[0]: field for field, (kind, dims) in kinds.items() if kind == "index"}
    for field, (kind, dims) in kinds.items():
        part = parts[field]
        known: Mapping[str, tuple[int, ...]] = setup.params if dims == ("*",) else setup.shapes
        if not isinstance(part, Mapping):
            return f"field '{field}' is a {type(part).__name__}, not a mapping"
        if kind == "statistic":
            if part and (why := _no_statistic(part, dims, sizes)):
                return f"field '{field}' {why}"
            continue
        if part and (why := _unlike(part, known)):
            return f"field '{field}' {why}"
        for missing in (indexed[axis] for axis in dims if part and axis in indexed):
            if isinstance(parts[missing], Mapping) and not parts[missing]:
                return f"field '{field}' comes without '{missing}', which says where its entries belong"
        if isinstance(part, Flat) and part.entries.dtype in FLOATS and part.shapes == _expected(dims, sizes, known):
            if (module := _not_finite(part)) is not None:
                return f"field '{field}', '{module}': {INFINITE}"
            continue
        for module, t in part.items():
            if why := _kind(t, kind, len(known[module]) if dims == ("*",) else len(dims)):
                return f"field '{field}', '{module}': {why}"
            if dims == ("*",):
                if tuple(t.shape) != tuple(known[module]):
                    return f"field '{field}', '{module}': its shape is {tuple(t.shape)}, expected {tuple(known[module])}"
                continue
            lengths = (int(t.sum()), len(t)) if kind == "index" else tuple(t.shape)
            here = {axis: n if isinstance(n, int | range) else n[module] for axis, n in sizes.items()}
            here["out"], here["in"] = known[module]
            for axis, length in zip(dims, lengths, strict=True):
                agreed = here.get(axis, seen.get((module, axis), length))
                if "*" in axis:  # several axes, laid out as one
                    agreed = math.prod(n for name in axis.split("*") if isinstance(n := here[name], int))
                fits = length in agreed if isinstance(agreed, range) else length == agreed
                if not fits:
                    return f"field '{field}', '{module}': '{axis}' is {length}, expected {_said(agreed)}"
                if seen.setdefault((module, axis), length) != length:
                    return f"field '{field}', '{module}': '{axis}' is {length}, but {seen[module, axis]} in another field"
        if kind != "index" and (module := _not_finite(part)) is not None:
            return f"field '{field}', '{module}': {INFINITE}"
    for axes, most in method.FACTS.budget(method, setup, client).items():
        total = sum(n for (_, axis), n in seen.items() if axis in axes)
        if total > most:
            return f"{' and '.join(map(repr, axes))} sum to {total} over all modules, above the client's budget of {most}"
    if not any(parts[field] for field, (kind, _) in kinds.items() if kind not in ("index", "statistic")):
        return "it is empty"
    return None


def unasked(up: Any, method: Method, state: Any, client: Client, round: int) -> str | None:
    """Which fields an Up that `refuse` accepts still lacks for an answer in this round, or has beyond it, in one line, or None."""
    if type(up) is Nothing:
        wanted = frozenset() if method.FACTS.sends is None else method.FACTS.sends(method, state, client, round)
        return f"it is Nothing, but {', '.join(sorted(wanted))} was asked for" if wanted else None
    kinds = {name: kind for name, (kind, _) in declared(up).items()}
    wanted = frozenset(kinds) if method.FACTS.sends is None else method.FACTS.sends(method, state, client, round)
    lacking = sorted(name for name in wanted if kinds[name] != "statistic" and not getattr(up, name))
    beyond = sorted(name for name in kinds if name not in wanted and getattr(up, name))
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    return f"it has {', '.join(beyond)}, which this round does not send" if beyond else None


def cast(up: Any, dtype: torch.dtype) -> Any:
    """The same Up with all floating-point tensors in one dtype: what a client computes in must not decide what the server does.
    Whatever is no Up, or no such tensor, stays for `refuse` to see."""
    if not is_dataclass(up) or isinstance(up, type):
        return up
    changes: dict[str, Any] = {}
    for f in fields(up):
        part = getattr(up, f.name, None)
        if "kind" not in f.metadata or not isinstance(part, Mapping):
            continue
        if isinstance(part, Flat):
            changes[f.name] = replace(part, entries=_cast(part.entries, dtype))
        else:
            changes[f.name] = {m: _cast(t, dtype) for m, t in part.items()}
    return replace(up, **changes)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOATS else t


def _unlike(part: Mapping[Any, Any], known: Mapping[str, Any]) -> str | None:
    """The first name that is missing from a mapping, or that it should not have."""
    for name in known:
        if name not in part:
            return f"lacks '{name}'"
    for name in part:
        if name not in known:
            return f"has an unexpected entry {name!a:.80}"
    return None


def _no_statistic(part: Mapping[Any, Any], dims: Mapping[str, tuple[str, ...]], sizes: Mapping[str, Any]) -> str | None:
    """What is wrong with a statistic, or None."""
    if why := _unlike(part, dims):
        return why
    seen: dict[str, int] = {}
    for name, axes in dims.items():
        if why := _kind(part[name], "statistic", len(axes)):
            return f"'{name}': {why}"
        if _not_finite({name: part[name]}) is not None:
            return f"'{name}': {INFINITE}"
        for axis, length in zip(axes, part[name].shape, strict=True):
            agreed = sizes.get(axis, seen.setdefault(axis, length))
            if not (length in agreed if isinstance(agreed, range) else length == agreed):
                return f"'{name}': '{axis}' is {length}, expected {_said(agreed)}"
    return None


def _kind(t: Any, kind: str, ndim: int) -> str | None:
    """What is wrong with an entry before its sizes are looked at."""
    if not isinstance(t, Tensor):
        return f"it is a {type(t).__name__}, not a tensor"
    if t.layout != torch.strided or t.is_meta:
        return "it is no dense tensor"
    if kind == "index":
        return None if t.dtype == torch.bool and t.ndim == 1 else f"it is {t.dtype} with {t.ndim} axes, expected torch.bool with 1"
    if t.dtype not in FLOATS:
        return f"it is {t.dtype}, expected a floating-point number"
    if t.ndim != ndim:
        return f"it has {t.ndim} axes, expected {ndim}"
    return None


def _not_finite(part: Tensors) -> str | None:
    """The first entry with a number that is not finite, or None."""
    if isinstance(part, Flat) and all_finite(part.entries):
        return None
    return next((name for name, t in part.items() if not all_finite(t)), None)


def _expected(
    dims: Sequence[str], sizes: Mapping[str, Any], known: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a field whose axes are all known beforehand, or None."""
    if dims == ("*",):
        return dict(known)
    of: dict[tuple[int, ...], tuple[int, ...]] = {}
    for shape in set(known.values()):
        own = {**sizes, "out": shape[0], "in": shape[1]}
        lengths = tuple([n for axis in dims if isinstance(n := own.get(axis), int)])
        if len(lengths) < len(dims):
            return None
        of[shape] = lengths
    return {module: of[shape] for module, shape in known.items()}


def _plain(part: Any) -> bool:
    """Whether an undeclared field may pass: a plain value, or a tuple of them."""
    if isinstance(part, tuple):
        return all(isinstance(x, bool | int | str) or x is None for x in part)
    return part is None or isinstance(part, bool | int | str) or (isinstance(part, float) and abs(part) < float("inf"))


def _said(size: int | range) -> str:
    if isinstance(size, range):
        return f"{size.start} to {size.stop - 1}" if size else "nothing"
    return str(size)
