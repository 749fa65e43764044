"""Runs over Ray: run by `test_ray.py` where ray is."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
import ray
import torch
from cluster import METHODS, configured, rows, run, same_end

from fedlora.comparison import executor
from fedlora.comparison import run as run_module
from fedlora.comparison.recipe import Header, Recipe
from fedlora.comparison.run import play_recipe
from fedlora.config import as_tables
from fedlora.errors import BadInput
from fedlora.runs.worker import reaching
from fedlora.transports import ray as over

ONES = ("fedit", "lora-a2", "flora", "fedsa-lora", "pfedloru", "feddpa", "fl-tac")


@pytest.fixture(autouse=True, scope="session")
def _one_ray() -> None:
    """One Ray for all tests, which each of them joins as a cluster that is there."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined already, and left as it is."""
    real = ray.init
    monkeypatch.setattr(over.ray, "init", lambda *args, **more: None if ray.is_initialized() else real(*args, **more))
    monkeypatch.setattr(over.ray, "shutdown", lambda: None)
    torch.set_num_threads(1)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run in one process has: sums of several threads have other last bits."""
    monkeypatch.setattr(over, "shares", lambda wanted, *more: over.Share(wanted or 2, 1))


def over_ray(count: int):
    """As a configuration says it."""
    return {"transport": {"name": "ray", "workers": count, "address": "auto"}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ONES)
def test_so_many_workers_equal_one(name: str, count: int, world: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """Half of the clients a round."""
    config = configured(world, name, **over_ray(count))
    out = run(config, tmp_path / "run")
    assert rows(out) == rows(alone(name))
    same_end(out, alone(name), config)


def commands() -> dict[str, int]:
    """The command line of each other process, and its number."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with suppress(OSError):
                found[(entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()] = int(entry.name)
    return found


def running(name: str) -> list[int]:
    """The processes whose command begins so."""
    return [number for line, number in commands().items() if line.startswith(name)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["pfedloru", "flora"])
def test_workers_that_are_killed_change_nothing(name: str, world: Path, alone: Callable[[str], Path], tmp_path: Path) -> None:
    """What a new one is sent to be level again is more to download."""
    config = configured(world, name, **over_ray(2))
    killed, done = [], threading.Event()

    def kill() -> None:
        while not done.is_set() and len(killed) < 2:
            time.sleep(0.3)
            metrics = tmp_path / "run" / "metrics.jsonl"
            if running("ray::Host") and metrics.exists() and len(metrics.read_text().splitlines()) > len(killed):
                killed.append(running("ray::Host")[0])
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    out = run(config, tmp_path / "run")
    done.set()
    thread.join()
    assert killed
    assert rows(out, "download", "evaluate_bytes") == rows(alone(name), "download", "evaluate_bytes")
    same_end(out, alone(name), config)


def test_a_folder_that_is_not_shared(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on a machine that does not have the run's folder makes its own from what it is sent."""
    from fedlora import disk
    from fedlora.runs import worker

    config = configured(world, "fedit")
    out = run(config, tmp_path / "run")
    files = {name: (out / name).read_bytes() for name in worker.FILES}
    monkeypatch.setattr(disk, "gettempdir", lambda: str(tmp_path))
    with worker.made("/nowhere/run", files, 1, str(tmp_path)) as made:
        assert made.states.folder.parent.parent == tmp_path and made.states.folder.parent.name.startswith("fedlora-")
    with worker.made(str(out), files, 1, str(tmp_path)) as made:
        assert made.states.folder == out / "states"


def test_a_machine_without_the_model_fetches_it_once(
    world: Path, alone: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes do not find it where this one has it, for they begin elsewhere."""
    from fedlora.runs import worker

    config = configured(world, "fedit", **over_ray(2))
    shutil.copytree(config.model.source, tmp_path / "base-of-here")
    config = config.model_copy(update={"model": config.model.model_copy(update={"source": "base-of-here"})})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(over, "shares", lambda wanted, *more: over.Share(wanted or 2, 1))
    monkeypatch.setattr(worker.os, "getcwd", lambda: "/nowhere")
    with pytest.raises(BadInput, match=r"worker . cannot start: model\.source"):
        run(config, tmp_path / "lost")
    monkeypatch.setattr(over, "several", lambda: True)
    before = set(Path(gettempdir()).glob(f"fedlora-{os.getuid()}-*"))
    out = run(config, tmp_path / "run")
    assert rows(out) == rows(alone("fedit"))
    fetched = [
        place for place in set(Path(gettempdir()).glob(f"fedlora-{os.getuid()}-*")) - before if (place / "config.json").exists()
    ]
    assert len(fetched) == 1
    shutil.rmtree(fetched[0])


# ---- comparisons ---------------------------------------------------------------------------------------------------------


def recipe(world: Path, rounds: int, **transport: Any) -> Recipe:
    """Two methods."""
    config = as_tables(configured(world, "fedit", train={"rounds": rounds}, transport=transport))
    shared = {name: config[name] for name in ("precision", "model", "data", "clients", "train", "transport")}
    return Recipe(Header(name="two"), shared | {"method": [{"name": "fedit"}, {"name": "lora-a2"}]})


CLUSTER = {"name": "ray", "address": "auto"}


@pytest.fixture
def compared(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison on this machine alone, a thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert play_recipe(recipe(world, 4), tmp_path / "here", 2, True) == (0, 2)
    return tmp_path / "here"


def results(out: Path) -> bytes:
    return (out / "results.parquet").read_bytes()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seen", [True, False])
def test_cells_of_a_comparison_on_a_cluster(
    seen: bool, compared: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on machines that do not see its folder: what they have comes here, and does not stay there."""
    identity = os.urandom(8).hex()
    if not seen:
        monkeypatch.setattr(executor, "_identity", lambda folder: identity)
    assert play_recipe(recipe(world, 4, **CLUSTER), tmp_path / "out", 2, True) == (0, 2)
    assert results(tmp_path / "out") == results(compared)
    for ours, theirs in zip(sorted(compared.glob("cells/*")), sorted((tmp_path / "out").glob("cells/*")), strict=True):
        names = [{file.relative_to(place).as_posix() for file in place.rglob("*")} for place in (ours, theirs)]
        assert names[0] == names[1]
    assert not list((tmp_path / "out").glob(".*.part"))
    there = Path(gettempdir()) / f"fedlora-{os.getuid()}-{identity}"
    assert there.exists() != seen and not list(there.glob("cells/*"))
    shutil.rmtree(there, ignore_errors=True)


@pytest.mark.usefixtures("one_thread")
def test_a_cell_whose_process_is_lost_goes_on(compared: Path, world: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    killed = threading.Event()

    def kill() -> None:
        while not list((tmp_path / "out").glob("cells/*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(running("ray::played")[0], signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill).start()
    assert play_recipe(recipe(world, 4, **CLUSTER), tmp_path / "out", 2, True, notes.append) == (0, 2)
    assert killed.is_set() and any("another one goes on" in note for note in notes)
    assert results(tmp_path / "out") == results(compared)


@pytest.mark.usefixtures("one_thread")
def test_a_cell_that_cannot_be_says_why(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine does not see the folder either, so that the reason has to come here."""
    monkeypatch.setattr(executor, "_identity", lambda folder: "0" * 16)
    monkeypatch.setattr("fedlora.comparison.check.check", lambda *args: None)
    plan = recipe(world, 4, **CLUSTER)
    shutil.copytree(world / "bert", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"0" * 100)
    plan.tables["model"]["source"] = [str(tmp_path / "broken"), str(world / "bert")]
    assert play_recipe(plan, tmp_path / "out", 2, True) == (2, 4)
    reasons = [file.read_text().partition("\n")[0] for file in (tmp_path / "out" / "failed").glob("*")]
    assert len(reasons) == 2 and all("broken" in reason for reason in reasons)
    shutil.rmtree(Path(gettempdir()) / f"fedlora-{os.getuid()}-{'0' * 16}")


@pytest.mark.usefixtures("one_thread")
def test_what_is_stopped_goes_on_later(compared: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping leaves no process of a cell behind."""
    real = run_module.write_results

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_results", stop)
    with pytest.raises(KeyboardInterrupt):
        play_recipe(recipe(world, 4, **CLUSTER), tmp_path / "out", 1, True)
    monkeypatch.setattr(run_module, "write_results", real)
    end = time.monotonic() + 20
    while time.monotonic() < end and any("fedlora.comparison.child" in line for line in commands()):
        time.sleep(0.1)
    assert not any("fedlora.comparison.child" in line for line in commands())
    assert play_recipe(recipe(world, 4, **CLUSTER), tmp_path / "out", 2, True) == (0, 2)
    assert results(tmp_path / "out") == results(compared)


def test_what_cannot_be(world: Path) -> None:
    for more, said in (
        ({"name": "ray", "workers": 9}, "the cluster has 4 processors"),
        ({"name": "ray", "address": "127.0.0.1:9"}, "nobody answers there"),
        ({"workers": 2}, "give transport.name = 'processes' or 'ray', too"),
        ({"name": "processes", "address": "10.0.0.5:6379"}, "that is of a Ray cluster"),
    ):
        with pytest.raises(BadInput, match=said), reaching(configured(world, "fedit", transport=more)):
            pass
    assert set(ONES) <= set(METHODS)
