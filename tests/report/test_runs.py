"""A report reads run folders as they are, whole or not, and finds what differs between them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.report.runs import as_text, comparison, cumulative, published_row, read, read_published

Write = Callable[..., Path]


def test_a_run_is_read(write: Write, tmp_path: Path) -> None:
    chosen = np.ones((4, 6, 2), dtype=bool)
    run = read(write(tmp_path / "run", {"seed": 3}, [0.1, None, 0.5], 100, arrays={2: {"ranks_chosen": chosen}}))
    assert (run.config.seed, len(run.rows), len(run.clients), len(run.modules)) == (3, 3, 4, 6)
    assert [row["round"] for row in run.scored] == [1, 3]
    assert run.rounds_with_arrays == (2,)
    assert np.array_equal(run.arrays(2)["ranks_chosen"], chosen)
    assert run.arrays(1) == {}
    assert cumulative(run, "upload_bytes").tolist() == [100, 200, 300]


def test_a_row_cut_off_by_a_kill_does_not_count(write: Write, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {}, [0.1, 0.2])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 3, "accu')
    assert [row["round"] for row in read(folder).rows] == [1, 2]


def test_arrays_of_a_round_that_is_not_in_the_metrics_do_not_count(write: Write, tmp_path: Path) -> None:
    run = read(write(tmp_path / "run", {}, [0.1], arrays={1: {"x": np.zeros(1)}, 2: {"x": np.zeros(1)}}))
    assert run.rounds_with_arrays == (1,)


@pytest.mark.parametrize(("file", "text"), [("config.toml", "nonsense"), ("federation.json", "{"), ("federation.json", "{}")])
def test_a_damaged_folder_is_refused_in_one_line(write: Write, tmp_path: Path, file: str, text: str) -> None:
    folder = write(tmp_path / "run", {}, [0.1])
    (folder / file).write_text(text)
    with pytest.raises(BadInput, match="damaged run folder") as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no run folder"):
        read(tmp_path)


def test_what_varies_and_what_does_not(write: Write, tmp_path: Path) -> None:
    tables = [
        {"seed": s, "method": {"name": m}, "data": {"alpha": a}} for s in (0, 1) for m in ("fedit", "fedavg") for a in (0.5, 0.1)
    ]
    found = comparison([read(write(tmp_path / str(i), table, [0.1])) for i, table in enumerate(tables)], "title")
    assert set(found.varied) == {"method.name", "data.alpha", "seed"}
    assert found.varied[-1] == "seed"
    assert found.fixed["train.rounds"] == 1
    assert not set(found.varied) & set(found.fixed)


def test_runs_without_a_round_are_left_out(write: Write, tmp_path: Path) -> None:
    empty, one = read(write(tmp_path / "empty", {"train": {"rounds": 2}}, [])), read(write(tmp_path / "one", {}, [0.5]))
    assert comparison([empty, one]).runs == (one,)
    with pytest.raises(BadInput, match="no run has finished a round"):
        comparison([empty])


def test_published_rows_are_found_by_their_dotted_keys() -> None:
    rows = read_published(
        "method.name,data.alpha,clients.rank,accuracy,spread,upload_params\nfedit,0.50,8,91.2,0.4,1000\nfedit,0.1,8,80,,\n"
    )
    config = resolve({"method": {"name": "fedit"}, "data": {"alpha": 0.5}, "clients": {"rank": 8}})
    assert published_row(rows, config) == {
        "method.name": "fedit",
        "data.alpha": 0.5,
        "clients.rank": 8,
        "accuracy": 91.2,
        "spread": 0.4,
        "upload_params": 1000,
    }
    assert "spread" not in rows[1]
    assert published_row(rows, resolve({"method": {"name": "lora-a2"}})) is None
    assert published_row([{"accuracy": 3.0}], config) is None


def test_values_as_text() -> None:
    assert [as_text(x) for x in (None, True, 8, 5e-4, ["a", 2], "x", {"a": 1})] == [
        "not set",
        "yes",
        "8",
        "0.0005",
        "a, 2",
        "x",
        "a = 1",
    ]


def test_federation_without_module_names(write: Write, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {}, [0.1])
    federation = json.loads((folder / "federation.json").read_text())
    del federation["modules"]
    (folder / "federation.json").write_text(json.dumps(federation))
    assert read(folder).modules == ()
