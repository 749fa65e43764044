"""Whole runs whose length is counted in steps, and whose learning rate follows a schedule."""

from itertools import islice
from pathlib import Path

import pytest
import tiny

from fedlora.config import Config, resolve
from fedlora.runs import play
from fedlora.runs.costs import made_up_rounds
from fedlora.runs.dry import _mean_examples
from fedlora.runs.prepare import prepare
from fedlora.summary import read_rows

TIMES = ("wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s")


@pytest.fixture
def base(bert_folder: Path, csv_folder: Path) -> dict:
    return {
        "precision": "fp32",
        "model": {"source": str(bert_folder)},
        "method": {"name": "fedit"},
        "data": {"source": str(csv_folder), "alpha": 1.0},
        "clients": {"count": 3, "rank": 2},
        "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3, "evaluate_every": 3},
    }


def configure(base: dict, **tables: dict) -> Config:
    return resolve(base, tables)


def rows_of(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)]


def test_a_run_with_a_schedule_goes_on_as_if_never_stopped(base: dict, tmp_path: Path) -> None:
    """Linear to a half, of two rounds: 1 - (1/2)(1/2), 1/2."""
    config = configure(base, train={"schedule": "linear", "floor": 0.5})
    play.execute(config, tmp_path / "whole", False, tiny.Silent())
    with pytest.raises(KeyboardInterrupt):
        play.execute(config, tmp_path / "cut", False, tiny.Silent(stop_after=1))
    play.execute(config, tmp_path / "cut", True, tiny.Silent())
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "cut")
    assert [row["lr"] for row in rows] == pytest.approx([5e-3 * 3 / 4, 5e-3 / 2])


def test_the_rate_of_the_row_is_the_one_that_clients_train_at(base: dict, tmp_path: Path) -> None:
    """The first round of a warm-up of two is that of a run at half the rate; a run at one rate does not say it."""
    play.execute(configure(base, train={"warmup": 2}), tmp_path / "warm", False, tiny.Silent())
    play.execute(configure(base, train={"lr": 2.5e-3}), tmp_path / "half", False, tiny.Silent())
    warm, half = rows_of(tmp_path / "warm"), rows_of(tmp_path / "half")
    assert [row["lr"] for row in warm] == [2.5e-3, 5e-3] and not any("lr" in row for row in half)
    assert {k: v for k, v in warm[0].items() if k != "lr"} == half[0]
    assert warm[1]["loss"] != half[1]["loss"]


@pytest.mark.slow
def test_more_rounds_mean_the_schedule_of_so_many(base: dict, tmp_path: Path) -> None:
    tables = {"schedule": "linear", "floor": 0.5}
    play.execute(configure(base, train={**tables, "rounds": 1}), tmp_path / "run", False, tiny.Silent())
    play.execute(configure(base, train={**tables, "rounds": 2}), tmp_path / "run", True, tiny.Silent())
    assert [row["lr"] for row in rows_of(tmp_path / "run")] == [2.5e-3, 2.5e-3]  # 1/2 of one round; 1/2 of two


class Counting(tiny.Silent):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.rounds = 0, list[int]()

    def examples(self, count: int) -> None:
        self.seen += count

    def round(self, row: dict) -> None:
        self.rounds.append(self.seen)
        self.seen = 0


@pytest.mark.parametrize(
    "method, train",
    [
        pytest.param({"name": "fedit"}, {"epochs": 2}, marks=pytest.mark.slow),
        ({"name": "fedit"}, {"max_steps": 9}),  # more than the data of a client
        ({"name": "lora-a2", "probe_counts": True}, {"epochs": 3, "max_steps": 6}),
        pytest.param({"name": "fed-sb", "first_steps": 2}, {"max_steps": 3}, marks=pytest.mark.slow),
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_a_dry_run_counts_the_examples_that_the_run_trains_on(method: dict, train: dict, base: dict, tmp_path: Path) -> None:
    config = configure(base, method=method, train=train)
    heard = Counting()
    play.execute(config, tmp_path / "run", False, heard)
    context = prepare(config, tiny.Silent())
    played = made_up_rounds(context.method, context.setup, lambda setup, t: setup.clients, examples=_mean_examples(context))
    assert [each.examples for each in islice(played, 2)] == pytest.approx(heard.rounds)
