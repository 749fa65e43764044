"""A recipe for several runs: the tables of a configuration whose keys may hold lists, and what is said about them.

title, about, minutes     what the lists and the report show; the time that the runs take on two cores
[[method]]                the methods, each with its own fields; `with` holds tables for this method alone
[small], [paper]          tables laid over all others, chosen by --scale
[splits]                  instead of runs: the statistics of splits (see `compare.splits`)

published                 a CSV file beside the recipe (of a packaged recipe, NAME.csv without being said): dotted keys of the
                          configuration, then the score, in a column by the name of its metric, and its spread, shares in
                          percent, and upload_params. A row is that of every cell whose keys have its values; an empty key has
                          all
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedlora.config import TaskConfig, read_recipe
from fedlora.errors import BadInput
from fedlora.report.runs import read_published
from fedlora.settings import build
from fedlora.tables import merge
from fedlora.tasks.metrics import CLASSIFICATION


class Scale(Enum):
    """How large: an hour or so on two cores, or as the paper has it."""

    SMALL = "small"
    PAPER = "paper"


@dataclass(frozen=True)
class Header:
    """What a recipe says about itself. `name` and `scale` stand in the recipe that a comparison leaves in its folder."""

    title: str = ""
    about: str = ""
    minutes: float | None = None
    published: str = ""
    name: str = ""
    scale: str = ""


HEADER = tuple(Header.__dataclass_fields__)
ONLY_HERE = {"title", "about", "minutes", "published", "splits", *(scale.value for scale in Scale)}  # keys that no single run has
BESIDE = {"spread", "upload_params"}  # columns of published numbers that are no score


@dataclass(frozen=True)
class Recipe:
    """One scale of a recipe.

    Attributes:
        tables: the grid, without the header and the scales.
        splits: the table [splits] of a recipe without runs.
        csv: the published numbers, as their file has them.
    """

    header: Header
    tables: dict[str, Any]
    splits: dict[str, Any] | None = None
    csv: str = ""

    @property
    def published(self) -> tuple[dict[str, Any], ...]:
        """The published numbers, a row each, without their empty cells."""
        return read_published(self.csv)

    def to_toml(self) -> str:
        """A recipe that gives the same grid, the scale laid in; its published numbers are then in recipe.csv."""
        import tomli_w

        said = {key: value for key in HEADER if (value := getattr(self.header, key))}
        said |= {"published": "recipe.csv"} if self.csv else {}
        scale = f" --scale {self.header.scale}" if self.header.scale else ""
        splits = {} if self.splits is None else {"splits": self.splits}
        return f"# fedlora compare {self.header.name}{scale}\n" + tomli_w.dumps(said | self.tables | splits)


def read(name: str, scale: Scale | None, settings: Sequence[Mapping[str, Any]] = ()) -> Recipe:
    """A packaged recipe or a TOML file at one scale, with `settings` laid over it. Without a scale, the first that it has.

    Raises:
        BadInput: there is no such recipe or no such scale in it, or it says what no recipe can.
    """
    tables = read_recipe(name)
    there = [each for each in Scale if each.value in tables]
    if scale is not None and scale not in there:
        possible = f"possible: {', '.join(each.value for each in there)}" if there else "it has no scales"
        raise BadInput(f"--scale {scale.value}: {name} has no table [{scale.value}]; {possible}")
    chosen = scale or (there[0] if there else None)
    layers = [{key: value for key, value in tables.items() if key not in {each.value for each in Scale}}]
    if chosen is not None:
        layers.append(_table(name, chosen.value, tables[chosen.value]))
    whole = merge(*layers)
    for each in settings:
        if "method" in each and isinstance(whole.get("method"), list):
            raise BadInput(f"--set method: {name} lists its methods, each with its own fields; change a copy of the recipe instead")
    whole = merge(whole, *settings)
    header = {key: whole.pop(key) for key in HEADER if key in whole}
    header = {"name": Path(name).stem, "scale": chosen.value if chosen else ""} | header
    splits = whole.pop("splits", None)
    task, usual = whole.get("task"), TaskConfig().name
    try:
        said: Header = build(Header, header, "recipe key", "")
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    return Recipe(
        said,
        whole,
        None if splits is None else _table(name, "splits", splits),
        _published(name, said.published, not isinstance(task, dict) or task.get("name", usual) == usual),
    )


def scales(name: str) -> list[Scale | None]:
    """The scales of a recipe; [None] where it has none."""
    tables = read_recipe(name)
    return [scale for scale in Scale if scale.value in tables] or [None]


def packaged() -> list[str]:
    """The packaged recipes that compare something: those with a title."""
    names = sorted(f.name.removesuffix(".toml") for f in files("fedlora.recipes").iterdir() if f.name.endswith(".toml"))
    return [name for name in names if "title" in read_recipe(name)]


def is_comparison(tables: Mapping[str, Any]) -> bool:
    """Whether a recipe is one for several runs, by its keys."""
    return isinstance(tables.get("method"), list) or not ONLY_HERE.isdisjoint(tables)


def _published(name: str, file: str, usual: bool) -> str:
    """The text of a recipe's published numbers, "" where it has none; `usual`, whether its task is that of runs that name none."""
    path = Path(name)
    place = path.parent / file if path.suffix or path.exists() else files("fedlora.recipes") / (file or f"{name}.csv")
    if not place.is_file():
        if file:
            raise BadInput(f"{name}: published = '{file}': there is no such file beside the recipe")
        return ""
    text = place.read_text()
    rows, accuracy = read_published(text), CLASSIFICATION[0].name
    if usual and any(accuracy not in row for row in rows):
        raise BadInput(f"{place}: each row needs an '{accuracy}', in percent")
    if any(all("." in key or key in BESIDE for key in row) for row in rows):
        raise BadInput(f"{place}: each row needs a score, in a column by the name of its metric")
    return text


def _table(name: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{name}: {key} = {value!r} is no table")
    return value
