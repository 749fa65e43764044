"""From rows to points, by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlora.config import resolve
from fedlora.tasks.metrics import CLASSIFICATION, Metric
from fedlora.track.base import Run
from fedlora.track.mlflow import named
from fedlora.track.series import of_round, of_summary

ROW: dict[str, Any] = {"round": 2, "loss": 0.5, "failed": 0}


def run(folder: Path, clients: int = 3, metrics: tuple[Metric, ...] = CLASSIFICATION) -> Run:
    return Run(folder, resolve({}), tuple(f"site {i}" for i in range(clients)), ("a.0.query", "a.1.query"), metrics)


def test_numbers_by_kind(tmp_path: Path) -> None:
    row = ROW | {
        "accuracy": 0.25,
        "macro_f1": None,  # not a number, as JSON has it
        "validation_accuracy": 0.75,
        "commonest_accuracy": 0.1,
        "metric": "accuracy",
        "score": 0.25,
        "upload_bytes": 3,
        "upload_params": 4,
        "wire_s": 0.125,
        "discordance": 0.01,
        "energy": [0.5, 0.5],
        "skipped": [1],
        "domain_accuracy": {"news": 0.5, "mail": None},
    }
    point = of_round(row, run(tmp_path))
    assert point.step == 2 and point.texts == {}
    assert point.numbers == {
        "loss": 0.5,
        "round/failed": 0,
        "score/accuracy": 0.25,
        "score/validation_accuracy": 0.75,
        "score/commonest_accuracy": 0.1,
        "score/score": 0.25,
        "bytes/upload_bytes": 3,
        "params/upload_params": 4,
        "seconds/wire_s": 0.125,
        "round/discordance": 0.01,
        "score/domain_accuracy/news": 0.5,
    }
    assert of_round(ROW | {"loss": None}, run(tmp_path)).numbers == {"round/failed": 0}


@pytest.mark.parametrize(("better", "worst"), [("higher", 0.0), ("lower", 1.0)])
def test_clients_have_a_series_each_where_they_are_few(better: Any, worst: float, tmp_path: Path) -> None:
    metric = Metric("f", "F", better=better)
    scores = {"0": 0.0, "2": 0.5, "1": 1.0, "3": None}
    found = of_round(ROW | {"client_f": scores}, run(tmp_path, 4, (metric,))).numbers
    assert {name: x for name, x in found.items() if "client" in name} == {
        "score/client_f_mean": 0.5,
        "score/client_f_worst": worst,
        "client_f/site 0": 0.0,
        "client_f/site 1": 1.0,
        "client_f/site 2": 0.5,
    }
    for count, series in ((32, 34), (33, 2)):
        many = ROW | {"client_f": {str(i): 0.5 for i in range(count)}}
        assert sum("client" in name for name in of_round(many, run(tmp_path, count, (metric,))).numbers) == series


def test_ranks_are_means_over_clients(tmp_path: Path) -> None:
    chosen = np.array([[[True, True], [False, True]], [[False, True], [False, False]]])  # 2 clients, 2 modules, 2 ranks
    (tmp_path / "arrays").mkdir()
    save_file({"ranks_chosen": chosen}, tmp_path / "arrays" / "round-00002.safetensors")
    found = of_round(ROW, run(tmp_path)).numbers
    assert found == {"loss": 0.5, "round/failed": 0, "ranks/a.0.query": 1.5, "ranks/a.1.query": 0.5}
    save_file({"similarity": np.eye(2)}, tmp_path / "arrays" / "round-00002.safetensors")
    assert of_round(ROW, run(tmp_path)).numbers == {"loss": 0.5, "round/failed": 0}


def test_failures_are_said_by_name(tmp_path: Path) -> None:
    row = ROW | {"failed": 2, "failures": {"0": "no answer", "2": "not finite"}}
    assert of_round(row, run(tmp_path)).texts == {"failures": "site 0: no answer\nsite 2: not finite"}


def test_a_summary_has_the_written_rounds_scores_and_the_totals() -> None:
    summary = {
        "rounds": 7,
        "final": {"metric": "accuracy", "accuracy": 0.5, "loss": None},
        "held_out": {"clients": 2, "accuracy": 0.25, "client_accuracy": {"x": 0.25}},
        "totals": {"upload_bytes": 9},
        "stopped_early": False,
    }
    point = of_summary(summary)
    expected = {"final/accuracy": 0.5, "held_out/clients": 2, "held_out/accuracy": 0.25, "totals/upload_bytes": 9}
    assert point.step == 7 and point.numbers == expected and set(point.texts) == {"summary"}


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("score/accuracy", "score/accuracy"),
        ("client_f/Klinik Süd #3", "client_f/Klinik Süd _3"),
        ("client_f/../x", "client_f/_/x"),
        ("client_f/a//b", "client_f/a/_/b"),
        ("client_f/", "client_f/_"),
    ],
)
def test_names_that_mlflow_takes(name: str, taken: str) -> None:
    assert named(name) == taken
