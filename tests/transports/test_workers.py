"""Clients that are played elsewhere: by one, two or three workers, which idle, forget, die and answer late, twice or not at all."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import METHODS, Cluster, Trouble, configured, learned, rows, run, same_end
from safetensors.torch import load_file
from tiny import Silent

from fedlora.config import resolve
from fedlora.runs import play, prepare
from fedlora.runs.connect import Connect
from fedlora.summary import read_rows
from fedlora.types import Factors, Setup

FAST = {("feddpa", 3), ("flora", 2)}


def cluster(count: int, trouble: Trouble | None = None) -> Connect:
    """So many workers, the same ones for every server that is connected so."""
    workers: Any = ({}, {}, [])
    met = trouble or Trouble(0)
    return lambda context, worker, out, listener: Cluster(context, out, count, met, *workers)


def test_another_place_has_none_of_the_settings_of_the_one_before() -> None:
    """A run over Ray can go on in one process; how long is waited stays."""
    before = {"transport": {"name": "ray", "workers": 2, "address": "10.0.0.5:6379", "timeout": 5.0}}
    after = resolve(before, {"transport": {"name": "in_process"}}).transport
    assert (after.workers, after.address, after.timeout) == (None, None, 5.0)
    same = resolve(before, {"transport": {"name": "ray"}}).transport
    assert (same.workers, same.address) == (2, "10.0.0.5:6379")


@pytest.mark.parametrize(
    ("name", "count"),
    [pytest.param(n, k, marks=() if (n, k) in FAST else pytest.mark.slow) for n in METHODS for k in (1, 2, 3)],
)
def test_so_many_workers_equal_one(name: str, count: int, world: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    config = configured(world, name)
    out = run(config, tmp_path / "run", cluster(count))
    assert rows(out) == rows(alone(name))
    same_end(out, alone(name), config)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "flora" else pytest.mark.slow) for n in METHODS])
def test_replies_late_doubled_and_lost_change_nothing(name: str, world: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    config = configured(world, name)
    trouble = Trouble(1, lost=0.2, late=0.2, doubled=0.3)
    out = run(config, tmp_path / "run", cluster(2, trouble))
    assert min(trouble.met[kind] for kind in ("lost", "late", "doubled")) > 0
    assert rows(out) == rows(alone(name))
    same_end(out, alone(name), config)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "fedit" else pytest.mark.slow) for n in METHODS])
def test_killed_workers_and_servers_change_nothing(name: str, world: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """A worker that is new has the pre-trained base, and a server that is new may find workers whose base is ahead of it: what they
    are sent to be level again is more to download, and nothing else differs."""
    config = configured(world, name)
    trouble = Trouble(3, dies=0.3, stops=0.1, late=0.1)
    out = run(config, tmp_path / "run", cluster(2, trouble))
    assert trouble.met["dies"] > 3 and trouble.met["stops"] > 0
    assert rows(out, "download") == rows(alone(name), "download")
    same_end(out, alone(name), config)


@pytest.mark.parametrize("name", ["flora", pytest.param("feddpa", marks=pytest.mark.slow)])
def test_a_worker_that_lost_what_clients_keep_says_so_and_they_start_anew(
    name: str, world: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of a method whose clients keep nothing, nothing is lost."""
    config, out = configured(world, name), tmp_path / "run"

    class Forgetful(Cluster):
        def exchange(self, asks: Any) -> Any:
            if asks[0].round == 4:
                shutil.rmtree(out / "states", ignore_errors=True)
                self.workers.clear()
            return super().exchange(asks)

    play.execute(
        config,
        out,
        False,
        Silent(),
        connect=lambda context, worker, to, listener: Forgetful(context, to, 2, Trouble(0), {}, {}, []),
    )
    found = read_rows(out)
    forgotten = {t: row["forgotten"] for t, row in enumerate(found, start=1) if "forgotten" in row}
    assert 4 in forgotten
    if name == "flora":
        assert rows(out, "download", "forgotten") == rows(alone(name), "download")
        a, b = (load_file(next(each.glob("*/*model.safetensors"))) for each in (out, alone(name)))
        assert all(torch.equal(a[key], b[key]) for key in a)
    else:
        assert rows(out, "forgotten") != rows(alone(name)) and all(row["failed"] == 0 for row in found)


def test_personal_scores_of_workers_elsewhere_are_those_of_one_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with as many clients a step as there is room for: who trains beside whom differs."""
    make = prepare.make_setup

    def double(*args: Any) -> Setup:
        setup = make(*args)

        def fresh(rank: int) -> Factors:
            f = setup.fresh(rank)
            return Factors({m: x.double() for m, x in f.A.items()}, {m: x.double() for m, x in f.B.items()}, f.scale)

        return replace(setup, fresh=fresh, base=lambda m: setup.base(m).double(), dtype=torch.float64)

    monkeypatch.setattr(prepare, "dtype_of", lambda _: torch.float64)
    monkeypatch.setattr(prepare, "make_setup", double)
    config = configured(world, "feddpa", train={"rows": 2048, "rounds": 3}, clients={"sample": 1.0})
    one, two = run(config, tmp_path / "one"), run(config, tmp_path / "two", cluster(2))
    for a, b in zip(rows(one, "loss"), rows(two, "loss"), strict=True):
        assert a == b and a["clients_scored"] == len(a["client_accuracy"]) == 5
    a, b = learned(one, config), learned(two, config)
    assert sum(x.dtype == torch.float64 for x in a) > len(a) // 2  # features of texts are in float32
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= 1e-9 * max(1.0, float(x.abs().max()))
