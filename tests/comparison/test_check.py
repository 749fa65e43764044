"""Cells are checked before the first one starts, without the model's weights."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from fedlora import methods
from fedlora.comparison import check
from fedlora.comparison.grid import Grid, expand
from fedlora.comparison.recipe import Header, Recipe
from fedlora.errors import BadInput


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    folder = tmp_path_factory.mktemp("outline")
    tiny.config("bert").save_pretrained(folder)
    return folder


@pytest.fixture
def base(outline: Path, csv_folder: Path) -> dict[str, Any]:
    return {
        "model": {"source": str(outline)},
        "data": {"source": str(csv_folder), "alpha": 1.0},
        "clients": {"count": 4, "rank": 2},
    }


def grid(base: dict[str, Any], **tables: Any) -> Grid:
    return expand(Recipe(Header(name="mine"), base | tables))


@pytest.mark.parametrize("rank", [2, [[1, 2, 4, 4]]], ids=["one rank", "mixed ranks"])
@pytest.mark.parametrize("name", methods.names())
def test_what_a_method_claims_is_what_the_check_finds(name: str, rank: Any, base: dict[str, Any]):
    found = grid(base, method={"name": name}, clients={"count": 4, "rank": rank})
    if rank == 2 or methods.find(name).FACTS.mixed_ranks:
        check.check(found, found.cells)
    else:
        with pytest.raises(BadInput, match=r"needs one rank for all clients, but clients\.rank gives 1, 2, 4"):
            check.check(found, found.cells)


def test_the_first_cell_that_cannot_run_is_named(base: dict[str, Any]):
    found = grid(base, method=[{"name": "lora-a2"}, {"name": "fedit"}], clients={"count": 4, "rank": [2, "tiers"]})
    with pytest.raises(BadInput, match=r"^fedit, rank tiers: FedIT"):
        check.check(found, found.cells)


@pytest.mark.parametrize(
    "tables, said",
    [
        ({"method": {"name": "lora-a3"}}, "did you mean lora-a2"),
        ({"method": {"name": "lora-a2", "globl_rank": 3}}, "did you mean method.global_rank"),
        ({"data": {"source": "nowhere.csv"}}, "nowhere.csv: no such file"),
        ({"clients": {"count": 400}}, "400 clients"),
        ({"clients": {"count": 4, "rank": [[1, 2]]}}, "lists 2 ranks for 4 clients"),
        ({"clients": {"count": 4, "rank": 99}}, "99 is above"),
        ({"model": {"source": "/nowhere"}}, "no such folder"),
        ({"transform": [{"name": "clap"}]}, "clap"),
    ],
)
def test_bad_input_is_one_line(tables: dict[str, Any], said: str, base: dict[str, Any]):
    found = grid(base, **tables)
    with pytest.raises(BadInput) as error:
        check.check(found, found.cells)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_target_is_found(base: dict[str, Any]):
    found = grid(base, model=base["model"] | {"target_modules": [["query"], ["nobody"]]})
    with pytest.raises(BadInput, match="'nobody' matches no linear layer"):
        check.check(found, found.cells)


def test_a_data_set_is_read_once(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    reads: list[int] = []
    load = check.load_data

    def count(task: Any, config: Any, seed: int) -> Any:
        reads.append(seed)
        return load(task, config, seed)

    monkeypatch.setattr(check, "load_data", count)
    found = grid(base, seed=[0, 1], data=base["data"] | {"alpha": [1.0, 5.0]}, clients={"count": [3, 4], "rank": [1, 2]})
    check.check(found, found.cells)
    assert len(found.cells) == 16 and sorted(reads) == [0, 1]
