"""Statistics of splits: what is written, what is said of numbers outside the band, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import load

from fedlora.comparison.splits import Measurement, exception, run
from fedlora.config import resolve
from fedlora.data.bands import Band
from fedlora.data.partition import split, statistics


def table(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"source": str(folder), "alpha": [0.05, 2.0], "clients": 4, "seeds": 12} | changes


def rows(out: Path) -> dict[tuple[float, str, str], dict[str, Any]]:
    return {(r["alpha"], r["part"], r["statistic"]): r for r in pq.read_table(out / "results.parquet").to_pylist()}


def test_bands_are_those_of_the_splits_of_the_seeds(csv_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    run(table(csv_folder), "mine", tmp_path / "out", tell=told.append)
    found = rows(tmp_path / "out")
    assert len(found) == 2 * 2 * 4 and len(told) == 2
    config = resolve({"data": {"source": str(csv_folder), "alpha": 0.05}})
    dataset = load(config.data, 0)
    sizes = [statistics(split(dataset, config.data, 4, seed), dataset).train.max_examples for seed in range(12)]
    row = found[0.05, "train", "max_examples"]
    assert (row["low"], row["median"], row["high"]) == (min(sizes), sorted(sizes)[5], max(sizes))
    assert row["published"] is None and row["inside"] is None and row["splits"] == 12


def test_published_numbers_are_held_against_the_bands(csv_folder: Path, tmp_path: Path) -> None:
    published = [{"alpha": 2.0, "train": {"max_examples": 89, "min_classes": 3}, "test": {"max_classes": 3}}]
    run(table(csv_folder, published=published), "mine", tmp_path, scale="small", title="Mine", about="About it.")
    found, text = rows(tmp_path), (tmp_path / "results.md").read_text()
    assert [found[2.0, part, name]["inside"] for part, name in (("train", "max_examples"), ("train", "min_classes"))] == [
        False,
        True,
    ]
    assert (
        text.startswith("# Mine\n\nAbout it.\n") and "90 training and 45 test examples of 3 classes, 4 clients, 12 splits" in text
    )
    assert "2 of 3 published numbers lie in the band." in text and "**89**" in text and "fedlora compare mine --scale small" in text
    assert "none of 12 splits had 89 or more" in text and text.count("\n- ") == 1
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Mine</h1>" in page and "none of 12 splits had 89 or more" in page and "89, outside (" in page


def test_the_same_table_gives_the_same_bytes_and_pictures(csv_folder: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        run(table(csv_folder), "mine", tmp_path / out)
    pictures = [f"figures/{name}.{kind}" for name in ("split", "bands") for kind in ("png", "svg")]
    files = ["results.md", "results.parquet", "report.html", *pictures]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_an_exception_says_which_side_and_how_rare() -> None:
    band = Band(np.arange(1, 101))  # 3 to 98
    low, high = (exception(Measurement(0.5, "test", "min_examples", band, number)) for number in (2, 250))
    assert low == ("Dir(0.5) test, fewest examples of a client: 2 is lower than the band, 3 to 98; 2 of 100 splits had 2 or less.")
    assert high.endswith("250 is higher than the band, 3 to 98; none of 100 splits had 250 or more.")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"alpah": [0.1]}, "splits.alpah"),
        ({"alpha": []}, "splits.alpha"),
        ({"alpha": [0.0]}, "splits.alpha"),
        ({"seeds": 0}, "splits.seeds"),
        ({"clients": 1000}, "1000 clients"),
        ({"source": "nowhere.csv"}, "nowhere.csv"),
        ({"published": [{"alpha": 0.3}]}, "0.3"),
        ({"published": [{"alpha": 2.0, "train": {"most": 3}}]}, "most"),
    ],
)
def test_bad_tables_are_refused_in_one_line_before_anything_is_written(csv_folder, tmp_path, changes, named) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=named) as error:
        run(table(csv_folder, **changes), "mine", out)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 and not out.exists()
