"""From a recipe to its cells: every combination of the values that its keys list, in an order that tells most first."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import count, product, zip_longest
from typing import Any

from fedlora import methods as known
from fedlora.comparison.recipe import Recipe
from fedlora.config import Config, as_tables, decisive, resolve
from fedlora.errors import BadInput
from fedlora.names import short
from fedlora.tables import OLD, merge, renamed
from fedlora.tasks import defaults

SEED, METHOD = "seed", "method.name"
BARE = {METHOD, "data.source", "model.source"}  # values that say by themselves what they are
LATER = {
    "data.validation": 0.0,
    "data.strata": "label",
    "data.image": "image",
    "train.schedule": "constant",
    "train.warmup": 0,
    "train.floor": 0.02,
    "train.checkpointing": False,
}  # keys younger than the first results, with their defaults

LISTS = {"track.to"}  # keys of which a list is one value

Flat = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a comparison; `place` is its place in the recipe's own order, the last key running fastest."""

    config: Config
    place: int

    @cached_property
    def flat(self) -> Flat:
        """Dotted key -> value, of every key that is set and decides something."""
        return dict(_leaves(decisive(self.config)))

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of the resolved configuration, its keys by their first names: the cell's folder. What follows a run
        is no part of it."""
        tables = renamed(decisive(self.config), {new: old for old, new in OLD.items()})
        for key, default in LATER.items():  # or results of before would not be found again
            table, _, name = key.partition(".")
            if tables[table][name] == default:
                del tables[table][name]
        if tables["task"] == as_tables(Config())["task"]:
            del tables["task"]
        return blake2b(json.dumps(tables, sort_keys=True).encode(), digest_size=6).hexdigest()


@dataclass(frozen=True)
class Grid:
    """The cells of a recipe in the order in which they run, and the keys in which they differ: the method's name always and
    first, the seed last."""

    cells: tuple[Cell, ...]
    varied: tuple[str, ...]

    @cached_property
    def own(self) -> tuple[str, ...]:
        """The varied keys that a method's name settles: its own learning rate, say."""
        names = {cell.flat[METHOD] for cell in self.cells}
        pairs = {key: {(cell.flat[METHOD], json.dumps(cell.flat.get(key))) for cell in self.cells} for key in self.varied}
        return tuple(key for key in self.varied if key != METHOD and len(pairs[key]) == len(names) > 1)

    def label(self, cell: Cell) -> str:
        """What tells a cell from the others: "lora-a2, alpha 0.01, rank 1"."""
        shown = [key for key in self.varied if key not in self.own and key in cell.flat]
        return ", ".join(said(cell.flat[k]) if k in BARE else f"{k.rpartition('.')[2]} {said(cell.flat[k])}" for k in shown)


def expand(recipe: Recipe) -> Grid:
    """The grid of a recipe. Methods alternate, each starting with its first point and going on where it has been least; all cells
    of the first seed come before those of the second. A configuration that occurs twice is one cell.

    Raises:
        BadInput: a key that does not exist, a value that cannot be, or a list without values.
    """
    name, place = recipe.header.name, count()
    methods: list[list[Cell]] = []
    for tables in _by_method(recipe):
        try:
            points = [_with(tables, point) for point in _points(tables)]
            methods.append([Cell(resolve(defaults(each), each), next(place)) for each in points])
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    cells: dict[str, Cell] = {}
    for seed in dict.fromkeys(cell.config.seed for own in methods for cell in own):
        for cell in _alternate([_evenly([cell for cell in own if cell.config.seed == seed]) for own in methods]):
            cells.setdefault(cell.hash, cell)
    return Grid(tuple(cells.values()), _varied(list(cells.values())))


def said(value: Any) -> str:
    """A value as people write it: strings bare, a file or folder by its last name."""
    if isinstance(value, str):
        return short(value)
    return "-" if value is None else json.dumps(value)


def _by_method(recipe: Recipe) -> list[dict[str, Any]]:
    """The tables of each method, `with` laid over those of all. The name "*" stands for every method of the package that the list
    does not name."""
    listed = recipe.tables.get("method")
    if not isinstance(listed, list):
        return [recipe.tables]
    if not listed:
        raise BadInput(f"{recipe.header.name}: method = [] is an empty list, so the grid has no cells")
    found = []
    for method in listed:
        if not isinstance(method, dict) or "name" not in method:
            raise BadInput(f'{recipe.header.name}: each [[method]] is a table with a name, as in name = "lora-a2", not {method!r}')
        own = method.get("with", {})
        if not isinstance(own, dict):
            raise BadInput(f"{recipe.header.name}: `with` of method {method['name']} is {own!r}, not tables")
        common = {key: value for key, value in recipe.tables.items() if key != "method"}
        fields = {key: value for key, value in method.items() if key != "with"}
        for name in _unnamed(listed) if method["name"] == "*" else [method["name"]]:
            found.append(merge(common, own, {"method": fields | {"name": name}}))
    return found


def _unnamed(listed: Sequence[Any]) -> list[str]:
    """The methods of the package that a list of methods does not name."""
    names = [method.get("name") for method in listed if isinstance(method, dict)]
    return [name for name in known.names() if name not in names]


def _points(tables: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values that the keys list, the last key running fastest, and the seed faster than all."""
    axes = {key: value for key, value in _leaves(tables) if _is_axis(value) and key not in LISTS}
    for key, values in axes.items():
        if not values:
            raise BadInput(f"{key} = [] is an empty list, so the grid has no cells")
    axes = {key: axes[key] for key in sorted(axes, key=lambda key: key == SEED)}
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _is_axis(value: Any) -> bool:
    """A list is a grid; a list of tables, as [[transform]] is, is one value."""
    return isinstance(value, list) and not (value and all(isinstance(each, dict) for each in value))


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with(tables: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with the listed keys set to one value each."""

    def put(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        return {
            key: put(value, f"{prefix}{key}.") if isinstance(value, Mapping) else point.get(f"{prefix}{key}", value)
            for key, value in table.items()
        }

    return put(tables)


def _evenly(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell, then always the one whose values have occurred least so far: no value waits for all of another's cells."""
    values = {cell: [(key, json.dumps(value)) for key, value in cell.flat.items()] for cell in cells}
    seen: Counter[tuple[str, str]] = Counter()
    ordered = []
    while values:
        best = min(values, key=lambda cell: sum(seen[value] for value in values[cell]))
        seen.update(values.pop(best))
        ordered.append(best)
    return ordered


def _alternate(columns: Sequence[Sequence[Cell]]) -> Iterator[Cell]:
    for row in zip_longest(*columns):
        yield from (cell for cell in row if cell is not None)


def _varied(cells: Sequence[Cell]) -> tuple[str, ...]:
    keys = sorted(dict.fromkeys(key for cell in cells for key in cell.flat if key != METHOD), key=lambda key: key == SEED)
    return (METHOD, *(key for key in keys if len({json.dumps(cell.flat.get(key)) for cell in cells}) > 1))
