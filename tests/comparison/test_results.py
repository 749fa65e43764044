"""results.parquet and results.md of a comparison whose runs were written by hand."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedlora.comparison.folder import Folder, begin
from fedlora.comparison.grid import Cell, Grid, expand
from fedlora.comparison.markdown import to_markdown
from fedlora.comparison.recipe import Header, Recipe
from fedlora.comparison.results import rows, write
from fedlora.comparison.run import write_report
from fedlora.errors import BadInput

PUBLISHED = """method.name,data.alpha,accuracy,spread,upload_params
fedit,0.5,90.0,1.5,4000
fedavg,,70.0,,
"""


@pytest.fixture
def recipe() -> Recipe:
    tables = {"seed": [0, 1], "method": [{"name": "fedit"}, {"name": "fedavg"}], "data": {"alpha": [0.5, 0.1]}}
    return Recipe(Header(title="By hand", about="Two methods.", name="hand", scale="small"), tables, None, PUBLISHED)


def finish(folder: Folder, cell: Cell, accuracy: float, **more: Any) -> None:
    """A summary as a run leaves it."""
    totals = {"upload_params": 1000, "upload_bytes": 4100, "download_params": 2000, "download_bytes": 8200, "wall_s": 3.0}
    summary = {
        "rounds": cell.config.train.rounds,
        "final": {"accuracy": accuracy, "macro_f1": 0.5, "loss": 1.25},
        "totals": totals | {"wall_s": accuracy},
    } | more
    folder.run(cell).mkdir(parents=True)
    (folder.run(cell) / "summary.json").write_text(json.dumps(summary))


def cell_of(grid: Grid, name: str, alpha: float, seed: int) -> Cell:
    (found,) = [c for c in grid.cells if (c.config.method.name, c.config.data.alpha, c.config.seed) == (name, alpha, seed)]
    return found


def test_a_row_a_cell_ours_beside_the_published(recipe: Recipe, tmp_path: Path):
    grid, folder = expand(recipe), Folder(tmp_path)
    finish(folder, cell_of(grid, "fedavg", 0.1, 1), 0.75, clients={"mean": 0.7, "worst_tenth": 0.25})
    finish(folder, cell_of(grid, "fedit", 0.1, 0), 0.5)
    finish(folder, cell_of(grid, "fedit", 0.5, 0), 0.8)
    folder.failed(cell_of(grid, "fedit", 0.5, 1), "RuntimeError: no memory")
    found = rows(grid, recipe, folder)
    write(found, grid.varied, tmp_path / "results.parquet")
    table = pq.read_table(tmp_path / "results.parquet")
    assert found == table.to_pylist()
    assert [(r["method.name"], r["data.alpha"], r["seed"], r["status"]) for r in found] == [
        ("fedit", 0.5, 0, "done"),
        ("fedit", 0.5, 1, "failed"),
        ("fedit", 0.1, 0, "done"),
        ("fedavg", 0.1, 1, "done"),
    ]
    best, failed, unpublished, full = found
    assert (best["accuracy"], best["published_accuracy"], best["published_spread"]) == (0.8, 0.9, 0.015)
    assert best["difference"] == pytest.approx(-0.1) and best["published_upload_params"] == 4000
    assert best["hash"] == cell_of(grid, "fedit", 0.5, 0).hash and best["error"] is None and best["worst_tenth"] is None
    assert failed["error"] == "RuntimeError: no memory" and failed["accuracy"] is None and failed["difference"] is None
    assert unpublished["published_accuracy"] is None
    assert full["difference"] == pytest.approx(0.05) and full["worst_tenth"] == 0.25 and full["upload_bytes"] == 4100
    assert not [name for name in table.column_names if name.endswith("_s")]


def test_personal_models_lost_clients_and_the_commonest_class(tmp_path: Path):
    """Of 3 seeds; client replies that counted for nothing are added up over them."""
    recipe = Recipe(Header(name="kinds"), {"seed": [0, 1, 2], "method": [{"name": "fedit"}, {"name": "feddpa"}]})
    grid, folder = expand(recipe), Folder(tmp_path)
    for cell in grid.cells:
        own = cell.config.method.name == "feddpa"
        final = {"accuracy": 0.75 if own else 0.25, "macro_f1": 0.125, "loss": 1.0, "commonest_accuracy": 0.5 if own else 0.25}
        totals = {"upload_params": 1000, "upload_bytes": 4100, "failed": 0 if own else cell.config.seed}
        finish(folder, cell, 0.0, final=final, totals=totals, **({"clients": {"mean": 0.7, "worst_tenth": 0.25}} if own else {}))
    found = rows(grid, recipe, folder)
    write(found, grid.varied, tmp_path / "results.parquet")
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == found
    assert [(r["method.name"], r["personal"], r["commonest_accuracy"]) for r in found[::3]] == [
        ("fedit", False, 0.25),
        ("feddpa", True, 0.5),
    ]
    common, personal = to_markdown(grid, recipe, found).split("Personal models, each scored on its client's own test examples")
    assert "| fedit | 25.0 ± 0.0 | 1,000 | 0.004 |" in common and "feddpa" not in common
    assert "| always the commonest class | 25.0 |  |  |" in common
    assert "**No method does better than always answering the commonest training class.**" in common
    assert "| method | macro F1 |" in common and "| fedit | 12.5 ± 0.0 |" in common
    assert "| feddpa | 75.0 ± 0.0 |" in personal and "| always the commonest class | 50.0 |" in personal
    assert "No method" not in personal
    lost = personal.partition("## Clients that failed")[2]
    assert "| fedit | 3 |" in lost and "feddpa" not in lost


def test_what_validation_chose_and_stopped_early(tmp_path: Path):
    recipe = Recipe(Header(name="early"), {"method": [{"name": "fedit"}], "train": {"patience": 3}})
    grid, folder = expand(recipe), Folder(tmp_path)
    final = {"accuracy": 0.5, "macro_f1": 0.25, "loss": 1.0, "validation_accuracy": 0.75}
    finish(folder, grid.cells[0], 0.0, rounds=7, final=final, written={"round": 4, "by": "validation"}, stopped_early=True)
    (row,) = found = rows(grid, recipe, folder)
    assert (row["accuracy"], row["validation_accuracy"], row["round"]) == (0.5, 0.75, 4)
    page = to_markdown(grid, recipe, found)
    assert "Accuracy in %, of the round that validation chose." in page and "| fedit | 75.0 |" in page


def test_what_diverged_has_failed(recipe: Recipe, tmp_path: Path):
    """JSON has no nan, so a loss that is no number is null."""
    grid, folder = expand(recipe), Folder(tmp_path)
    finish(folder, grid.cells[0], 0.0, final={"accuracy": 0.99, "macro_f1": 0.9, "loss": None})
    (row,) = rows(grid, recipe, folder)
    assert (row["status"], row["accuracy"]) == ("failed", None) and row["error"].startswith("it diverged")
    assert "99.0" not in to_markdown(grid, recipe, [row])


def test_a_comparison_of_failures_says_why_there_is_no_page(recipe: Recipe, tmp_path: Path):
    grid, folder = expand(recipe), Folder(tmp_path)
    begin(folder, recipe)
    folder.failed(grid.cells[0], "RuntimeError: no memory")
    with pytest.raises(BadInput, match=f"nothing to report; 1 failed, {grid.label(grid.cells[0])}: RuntimeError: no memory"):
        write_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_equal_results_are_equal_bytes_whatever_the_times_and_the_order(recipe: Recipe, tmp_path: Path):
    grid = expand(recipe)
    for place, cells in (("one", grid.cells), ("two", grid.cells[::-1])):
        folder = Folder(tmp_path / place)
        for i, cell in enumerate(cells):
            finish(
                folder, cell, 0.1 * cell.place, totals=dict.fromkeys(("upload_params", "upload_bytes"), 5) | {"wall_s": float(i)}
            )
        write(rows(grid, recipe, folder), grid.varied, tmp_path / place / "results.parquet")
    assert (tmp_path / "one" / "results.parquet").read_bytes() == (tmp_path / "two" / "results.parquet").read_bytes()


def test_a_run_that_is_not_complete_does_not_count(recipe: Recipe, tmp_path: Path):
    grid, folder = expand(recipe), Folder(tmp_path)
    finish(folder, grid.cells[0], 0.8, rounds=9)  # of 10
    folder.run(grid.cells[1]).mkdir(parents=True)
    assert rows(grid, recipe, folder) == []
    assert "0 of 8 runs done, 8 to go" in to_markdown(grid, recipe, [])


def test_columns_take_the_type_of_their_values(tmp_path: Path):
    tables = {
        "method": [{"name": "lora-a2", "global_rank": 8}, {"name": "fedavg"}],
        "clients": {"count": 2, "rank": [2, "tiers", [1, 2]]},
        "data": {"alpha": [1, 0.5]},
        "model": {"rslora": [True, False]},
    }
    recipe = Recipe(Header(name="types"), tables)
    grid, folder = expand(recipe), Folder(tmp_path)
    for cell in grid.cells:
        finish(folder, cell, 0.5)
    write(rows(grid, recipe, folder), grid.varied, tmp_path / "results.parquet")
    table = pq.read_table(tmp_path / "results.parquet")
    types = {name: str(table.schema.field(name).type) for name in grid.varied}
    assert types == {
        "method.name": "string",
        "method.global_rank": "int64",
        "model.rslora": "bool",
        "data.alpha": "double",
        "clients.rank": "string",
    }
    assert set(table["clients.rank"].to_pylist()) == {"2", "tiers", "[1, 2]"}
    assert set(table["method.global_rank"].to_pylist()) == {8, None}


def test_the_page_averages_over_seeds_and_says_how_far_ours_are(recipe: Recipe, tmp_path: Path):
    grid, folder = expand(recipe), Folder(tmp_path)
    ours = {("fedit", 0.5): (0.8, 0.9), ("fedit", 0.1): (0.5, 0.5), ("fedavg", 0.5): (0.72, 0.76), ("fedavg", 0.1): (0.6, 0.6)}
    for (name, alpha), accuracies in ours.items():
        for seed, accuracy in enumerate(accuracies):
            finish(folder, cell_of(grid, name, alpha, seed), accuracy)
    page = to_markdown(grid, recipe, rows(grid, recipe, folder))
    # Sample standard deviations by hand: |0.9 - 0.8| / sqrt(2) = 7.07 points, |0.76 - 0.72| / sqrt(2) = 2.83 points.
    assert "| method | alpha 0.5 | alpha 0.1 | parameters up | MB up |" in page
    assert "| fedit | 85.0 ± 7.1 | 50.0 ± 0.0 | 1,000 | 0.004 |" in page
    assert "| fedavg | 74.0 ± 2.8 | 60.0 ± 0.0 | 1,000 | 0.004 |" in page
    # Differences: fedit 85 - 90 = -5; fedavg 74 - 70 = 4 and 60 - 70 = -10; their mean size 19 / 3.
    assert "between -10.0 and +4.0 points from the published, 6.3 on average, over 3 settings: 1 above, 2 below" in page
    lines = page.splitlines()
    start = lines.index("| method | alpha | ours | published | difference |")
    assert lines[start + 2 : start + 5] == [
        "| fedavg | 0.1 | 60.0 ± 0.0 | 70.0 | -10.0 |",
        "| fedit | 0.5 | 85.0 ± 7.1 | 90.0 ± 1.5 | -5.0 |",
        "| fedavg | 0.5 | 74.0 ± 2.8 | 70.0 | +4.0 |",
    ]
    assert "8 of 8 runs done at scale small." in page and "Failed" not in page


def test_the_page_names_what_failed_and_what_goes_with_a_method(tmp_path: Path):
    recipe = Recipe(Header(name="own"), {"method": [{"name": "fedit"}, {"name": "fedavg", "with": {"train": {"lr": 1e-4}}}]})
    grid, folder = expand(recipe), Folder(tmp_path)
    finish(folder, grid.cells[0], 0.8)
    folder.failed(grid.cells[1], "BadInput: one | two")
    page = to_markdown(grid, recipe, rows(grid, recipe, folder))
    assert "# own\n" in page and "1 of 2 runs done, 1 failed" in page
    assert "| method | accuracy | parameters up | MB up |" in page and "| fedit | 80.0 |" in page
    assert "Settings that go with the method: fedavg: train.lr = 0.0001; fedit: train.lr = 0.0005." in page
    assert "- fedavg, 0.0001: BadInput: one | two" in page
