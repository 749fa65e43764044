"""Runs over Ray: run by `test_ray.py` where ray is."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from cluster import METHODS, configured, rows, run, same_end

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
    monkeypatch.setattr(over, "shares", lambda wanted: over.Share(wanted, 1))


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


def actors() -> list[int]:
    """The processes of workers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::Host"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


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
            if actors() and metrics.exists() and len(metrics.read_text().splitlines()) > len(killed):
                killed.append(actors()[0])
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
    from fedlora.runs import worker

    config = configured(world, "fedit")
    out = run(config, tmp_path / "run")
    files = {name: (out / name).read_bytes() for name in worker.FILES}
    monkeypatch.setattr(worker, "gettempdir", lambda: str(tmp_path))
    made = worker.made("/nowhere/run", files, 1, str(tmp_path))
    assert made.states.folder.parent.parent == tmp_path and made.states.folder.parent.name.startswith("fedlora-")
    assert worker.made(str(out), files, 1, str(tmp_path)).states.folder == out / "states"


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
