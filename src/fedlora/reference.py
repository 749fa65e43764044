"""Every key of a run's configuration, from the models that check it: docs/configuration.md, and `fedlora run --help-keys`.

python -m fedlora.reference > docs/configuration.md
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedlora import methods, tasks, transforms
from fedlora.config import Config, MethodConfig, TaskConfig, TransformConfig

HEADING = """# Configuration

Made by `python -m fedlora.reference`; do not edit. A recipe is a TOML file with these tables; `--set train.lr=1e-3` sets one
key. Behind each key stand its possible values and, after "default", what holds when nothing is said.
"""
TASKS = "The fields of each task, as `task.NAME`. A task that is not here has none."
METHODS = "The fields of each method, as `method.NAME`. A method that is not here has none."
TRANSFORMS = (
    'A list of what is done to clients\' changes on their way, in order: `transform=[{name="clip", max_norm=1.0}]`. '
    "The fields of each:"
)


def reference() -> str:
    """The markdown page."""
    tables = {name: kind for name, kind in get_type_hints(Config).items() if _is_table(kind)}
    blocks = [HEADING, "## Top level", "", *_keys(Config, "")]
    for name, kind in tables.items():
        blocks += ["", f"## {name}", "", _about(kind), "", *_keys(kind, f"{name}.")]
        if kind is TaskConfig:
            blocks += ["", TASKS, *_settings({each: tasks.find(each) for each in tasks.names()}, "task.")]
        if kind is MethodConfig:
            blocks += ["", METHODS, *_settings({each: methods.find(each) for each in methods.names()}, "method.")]
    blocks += ["", "## transform", "", TRANSFORMS]
    blocks += _settings({each: transforms.find(each) for each in transforms.names()}, "")
    return "\n".join(blocks) + "\n"


def possible(kind: Any) -> str:
    """The values of a type, in words."""
    if get_origin(kind) in (Union, UnionType):
        return ", or ".join(possible(each) for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Annotated:
        inner, *limits = get_args(kind)
        words = {Gt: "above", Ge: "of at least", Lt: "below", Le: "of at most"}
        said = [f"{words[type(x)]} {getattr(x, type(x).__name__.lower())}" for x in flat_limits(limits) if type(x) in words]
        return f"{possible(inner)} {' and '.join(said)}".rstrip()
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind))
    if get_origin(kind) in (list, tuple):
        return f"a list, each {possible(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _one_of([each.value for each in kind])
    return {int: "an integer", float: "a number", str: "a text", bool: "true or false"}.get(kind, str(kind))


def flat_limits(limits: Sequence[Any]) -> list[Any]:
    """The limits of an annotated type, those inside a pydantic Field too."""
    return [x for limit in limits for x in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]


def described(kind: type[Any]) -> dict[str, str]:
    """Field -> what the docstring of a class says of it: after its name and a colon, up to the next field's."""
    names = "|".join(sorted(get_type_hints(kind), key=len, reverse=True))
    text = " ".join((kind.__doc__ or "").split())
    marks = list(re.finditer(rf"(?<!\S)((?:{names})(?:, (?:{names}))*): ", text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    said = {mark.group(1): text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=False)}
    return {name: what for together, what in said.items() for name in together.split(", ")}


def _keys(kind: type[BaseModel], prefix: str) -> Iterator[str]:
    hints, said = get_type_hints(kind, include_extras=True), described(kind)
    for name, field in kind.model_fields.items():
        if _is_table(field.annotation) or (not prefix and name == "transform"):
            continue
        yield _line(f"{prefix}{name}", hints[name], MISSING if field.default is PydanticUndefined else field.default, said[name])


def _settings(kinds: dict[str, type[Any]], prefix: str) -> Iterator[str]:
    """The fields of methods or transforms, those that have any, under their names."""
    for title, kind in kinds.items():
        hints, said = get_type_hints(kind, include_extras=True), described(kind)
        if fields(kind):
            yield from ("", f"### {title}", "")
        for field in fields(kind):
            yield _line(prefix + field.name, hints[field.name], field.default, said[field.name])


def _line(key: str, kind: Any, default: Any, what: str) -> str:
    value = default.value if isinstance(default, Enum) else default
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
    after = (
        "needed"
        if default is MISSING
        else "not set by default"
        if value is None
        else f"default {'empty' if value in ((), []) else shown}"
    )
    return f"- `{key}`: {what.rstrip('.')}. *{possible(kind)[0].upper()}{possible(kind)[1:]}; {after}.*"


def _about(kind: type[Any]) -> str:
    return " ".join((kind.__doc__ or "").partition("Attributes:")[0].split())


def _one_of(values: Any) -> str:
    return " or ".join(f"`{value}`" for value in values)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not TransformConfig


if __name__ == "__main__":
    print(reference(), end="")
