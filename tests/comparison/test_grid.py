"""From recipes to cells: which there are, in which order, and what they are called."""

from itertools import combinations
from typing import Any

import pytest

from fedlora.comparison.grid import Grid, expand
from fedlora.comparison.recipe import Header, Recipe
from fedlora.config import resolve
from fedlora.errors import BadInput


def grid(**tables: Any) -> Grid:
    return expand(Recipe(Header(name="mine"), tables))


def points(found: Grid, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(cell.flat.get(key) for key in keys) for cell in found.cells]


def test_every_combination_is_one_cell_and_the_config_of_a_run():
    found = grid(seed=[0, 1], method={"name": "fedit"}, data={"alpha": [0.5, 0.1]}, train={"rounds": 3})
    assert set(points(found, "seed", "data.alpha")) == {(0, 0.5), (0, 0.1), (1, 0.5), (1, 0.1)}
    assert found.varied == ("method.name", "data.alpha", "seed")
    want = resolve({"seed": 1, "method": {"name": "fedit"}, "data": {"alpha": 0.1}, "train": {"rounds": 3}})
    assert found.cells[-1].config == want


def test_each_method_comes_once_before_any_comes_twice_and_seeds_come_last():
    found = grid(
        seed=[3, 4],
        method=[{"name": "fedit"}, {"name": "lora-a2"}, {"name": "fedavg", "with": {"clients": {"rank": 1}}}],
        data={"alpha": [0.5, 0.1]},
        clients={"rank": [8, 1]},
    )
    first = points(found, "seed", "method.name", "data.alpha", "clients.rank")[:10]
    assert first == [  # by hand: alpha and rank change together, so that two rows have seen every value once
        (3, "fedit", 0.5, 8),
        (3, "lora-a2", 0.5, 8),
        (3, "fedavg", 0.5, 1),
        (3, "fedit", 0.1, 1),
        (3, "lora-a2", 0.1, 1),
        (3, "fedavg", 0.1, 1),
        (3, "fedit", 0.5, 1),
        (3, "lora-a2", 0.5, 1),
        (3, "fedit", 0.1, 8),
        (3, "lora-a2", 0.1, 8),
    ]
    assert [seed for (seed,) in points(found, "seed")] == [3] * 10 + [4] * 10


def test_every_prefix_is_even():
    found = grid(
        method=[{"name": name} for name in ("fedit", "ffa-lora", "flexlora", "lora-a2")],
        data={"source": ["a", "b"], "alpha": [0.5, 0.1, 0.01]},
        clients={"rank": [8, 4, 2, 1]},
    )
    assert len(found.cells) == 4 * 2 * 3 * 4
    for length in range(1, len(found.cells) + 1):
        for key, most in (("method.name", 1), ("data.source", 4), ("data.alpha", 8), ("clients.rank", 8)):
            values = [cell.flat[key] for cell in found.cells[:length]]
            counts = [values.count(value) for value in {cell.flat[key] for cell in found.cells}]
            assert max(counts) - min(counts) <= most, f"{key} after {length} cells: {counts}"


def test_a_key_that_is_a_list_is_listed_in_a_list():
    found = grid(
        model={"target_modules": [["query", "value"], ["dense"], "all-linear"]}, clients={"count": 2, "rank": [[1, 2], [4, 4]]}
    )
    assert len(found.cells) == 6
    assert {tuple(c.config.clients.rank) for c in found.cells} == {(1, 2), (4, 4)}
    assert [c.config.model.target_modules for c in found.cells].count(["query", "value"]) == 2


def test_a_list_of_tables_is_one_value():
    (cell,) = grid(transform=[{"name": "clip", "norm": 1.0}, {"name": "gaussian"}]).cells
    assert [each.name for each in cell.config.transform] == ["clip", "gaussian"]
    found = grid(transform=[[], [{"name": "clip", "norm": 1.0}]])
    assert [len(cell.config.transform) for cell in found.cells] == [0, 1]


def test_a_methods_own_fields_and_tables_are_its_alone():
    found = grid(
        method=[
            {"name": "lora-a2", "global_rank": [4, 8]},
            {"name": "fedavg", "with": {"clients": {"rank": 1}, "train": {"lr": 1e-4}}},
        ],
        clients={"rank": [2, 4]},
    )
    assert sorted(points(found, "method.name", "method.global_rank", "clients.rank", "train.lr"), key=str) == [
        ("fedavg", None, 1, 1e-4),
        ("lora-a2", 4, 2, 5e-4),
        ("lora-a2", 4, 4, 5e-4),
        ("lora-a2", 8, 2, 5e-4),
        ("lora-a2", 8, 4, 5e-4),
    ]
    assert found.own == ("train.lr",)
    assert found.label(found.cells[0]) == "lora-a2, global_rank 4, rank 2"
    assert found.label(found.cells[1]) == "fedavg, rank 1"


def test_the_hash_is_that_of_the_whole_configuration():
    one, again = grid(method=[{"name": "fedit"}]), grid(method={"name": "fedit"}, train={"lr": 5e-4})
    assert [cell.hash for cell in one.cells] == [cell.hash for cell in again.cells]  # defaults count as if they were said
    assert len(one.cells[0].hash) == 12
    fields = {"global_rank": 4, "probe_epochs": 1}
    there, back = ({"name": "lora-a2"} | dict(order) for order in (fields.items(), reversed(fields.items())))
    assert grid(method=there).cells[0].hash == grid(method=back).cells[0].hash  # whatever their order
    others = [grid(seed=1), grid(train={"rounds": 11}), grid(method={"name": "fedavg"}), grid(data={"alpha": 0.4}), one]
    assert all(a.cells[0].hash != b.cells[0].hash for a, b in combinations(others, 2))


def test_what_occurs_twice_is_one_cell():
    found = grid(method=[{"name": "fedavg"}, {"name": "fedavg"}], data={"alpha": [0.5, 0.5, 0.1]})
    assert points(found, "data.alpha") == [(0.5,), (0.1,)]


@pytest.mark.parametrize(
    "tables, said",
    [
        ({"data": {"alpha": []}}, "mine: data.alpha = [] is an empty list, so the grid has no cells"),
        ({"method": []}, "mine: method = [] is an empty list, so the grid has no cells"),
        ({"trian": {"lr": 1}}, "mine: unknown config key 'trian'"),
        ({"train": {"lr": [1e-3, -1]}}, "mine: train.lr = -1"),
        ({"method": ["lora-a2"]}, "each [[method]] is a table with a name"),
        ({"method": [{"name": "fedit", "with": 3}]}, "`with` of method fedit is 3, not tables"),
        ({"method": [{"name": "fedit", "with": {"trane": {}}}]}, "mine: unknown config key 'trane'"),
    ],
)
def test_bad_input_is_one_line(tables: dict[str, Any], said: str):
    with pytest.raises(BadInput) as error:
        grid(**tables)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_hash_is_that_of_results_made_before_a_key_came():
    """Values written down before data.validation was a key: its default is left out, so results are found again."""
    assert grid(method={"name": "lora-a2"}).cells[0].hash == "9a0809987643"
    old = {"seed": 3, "method": {"name": "fedit"}, "train": {"lr": 1e-3}, "data": {"source": "a.csv", "limit": 7}}
    assert grid(**old).cells[0].hash == "de01a5275f26"
    hashes = {grid(data={"validation": share}).cells[0].hash for share in (0, 0.0, 0.1, 0.2)}
    assert len(hashes) == 3


@pytest.mark.parametrize("key", ["tasks", "domains"])
def test_a_key_of_an_earlier_version_gives_the_cells_that_it_gave(key: str):
    """Hashes written down when clients.domains was clients.tasks."""
    tables = {"method": {"name": "fl-tac"}, "clients": {"count": 4, key: 1}, "data": {"source": "a.csv"}, "seed": [0, 1]}
    assert [cell.hash for cell in grid(**tables).cells] == ["851cd0deb627", "624d19c3858e"]
    own = [{"name": "fl-tac", "with": {"clients": {key: [1]}}}]
    assert [cell.hash for cell in grid(**tables | {"method": own, "clients": {"count": 4}, "seed": 0}).cells] == ["851cd0deb627"]
