"""Clients played by Ray, in an environment beside `.venv` that has it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import hosts
import pytest
import side
import tiny
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def python() -> Path:
    return side.python("ray", side.extra("ray"))


def test_runs_over_ray(python: Path) -> None:
    """The cases of `over_ray.py`."""
    side.passes(python, HERE / "over_ray.py")


def processes_of_ray() -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"/ray/" in line or line.startswith(b"ray::"):  # its servers, and what watches their logs
                found.add(int(entry.name))
    return found


def test_ctrl_c_leaves_nothing_of_ray_and_the_run_goes_on(python: Path, tmp_path: Path) -> None:
    tiny.save_model("bert", tmp_path / "base")
    tiny.save_data(tmp_path)
    before = processes_of_ray()
    command = [python, "-m", "fedlora", "run", "--model", "base", "--data", str(tmp_path), "--clients", "4", "--rounds", "200"]
    command += ["--out", "run", "--set", "transport.name=ray", "--set", "transport.workers=2"]
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=side.environment(),
            stdout=said,
            stderr=said,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
            assert time.monotonic() < end and process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert "--resume" in (tmp_path / "said").read_text()
    end = time.monotonic() + 30
    while processes_of_ray() - before and time.monotonic() < end:
        time.sleep(0.5)
    assert not processes_of_ray() - before
    again = [*command, "--resume"]
    done = subprocess.run(again, cwd=tmp_path, env=side.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after 200 rounds" in done.stdout


# ---- two machines --------------------------------------------------------------------------------------------------------

HEAD, ADDRESS = "north", "10.99.0.2:6379"
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


class Machines:
    """Two of them: the head of a Ray cluster and another node. Each has a folder for Ray of its own, as it would have."""

    def __init__(self, python: Path, folder: Path, found: hosts.Hosts) -> None:
        self.python, self.folder, self.found = python, folder, found

    def on(self, host: str, *words: str) -> list[str]:
        own = self.folder / f"ray-{host}"
        own.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        return [*self.found.on(host), "sh", "-c", 'mount --bind "$0" /tmp/ray && exec "$@"', str(own), *words]

    def ray(self, host: str, *words: str) -> None:
        command = self.on(host, str(self.python.with_name("ray")), *words)
        done = subprocess.run(command, env=side.environment() | TOKEN, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def fedlora(self, host: str, token: Mapping[str, str] = TOKEN) -> subprocess.Popen[bytes]:
        """A run of two workers, one on each machine."""
        words = ["run", "--model", "base", "--data", str(self.folder), "--clients", "4", "--rounds", "60", "--out", "run"]
        for each in ("name=ray", "workers=2", f"address={ADDRESS}"):
            words += ["--set", f"transport.{each}"]
        with open(self.folder / "said", "ab") as said:
            command = self.on(host, str(self.python), "-m", "fedlora", *words)
            return subprocess.Popen(command, cwd=self.folder, env=side.environment() | token, stdout=said, stderr=said)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def rounds(self) -> int:
        file = self.folder / "run" / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def machines(python: Path, tmp_path: Path) -> Iterator[Machines]:
    tiny.save_model("bert", tmp_path / "base")
    tiny.save_data(tmp_path)
    before = processes_of_ray()
    with hosts.hosts(("north", "south")) as found:
        machines = Machines(python, tmp_path, found)
        common = ("--num-cpus", "2", "--disable-usage-stats")
        try:
            head = ("--head", "--port", "6379", "--include-dashboard", "false", "--node-ip-address", "10.99.0.2")
            machines.ray(HEAD, "start", *head, *common)
            machines.ray("south", "start", "--address", ADDRESS, "--node-ip-address", "10.99.0.3", *common)
            yield machines
        finally:
            for number in processes_of_ray() - before:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def cut_in_the_middle(machines: Machines, host: str) -> int:
    """How a run on a host ends when the second machine is cut off after two rounds."""
    run = machines.fedlora(host)
    end = time.monotonic() + 120
    while machines.rounds() < 2:
        assert time.monotonic() < end and run.poll() is None, machines.said()
        time.sleep(0.1)
    machines.found.cut("south")
    return run.wait(400)


@pytest.mark.skipif(not hosts.HERE, reason="needs root and ip")
@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "disabled"}])
def test_who_has_no_token_is_told_so(machines: Machines, given: dict[str, str]) -> None:
    assert machines.fedlora(HEAD, given).wait(120) == 2
    assert f"error: transport.address = '{ADDRESS}': it wants a token; set RAY_AUTH_MODE=token" in machines.said()
    assert not (machines.folder / "run").exists()


@pytest.mark.skipif(not hosts.HERE, reason="needs root and ip")
def test_a_machine_that_is_cut_off(machines: Machines) -> None:
    """The head's run goes on without it, and says so."""
    assert cut_in_the_middle(machines, HEAD) == 0, machines.said()
    assert "1 of 2 workers: they play all clients" in machines.said() and "after 60 rounds" in machines.said()
    assert "worker 1 died" in machines.said() or "worker 2 died" in machines.said()


@pytest.mark.skipif(not hosts.HERE, reason="needs root and ip")
def test_a_run_that_is_cut_off_from_the_head_stops_and_goes_on_later(machines: Machines, python: Path) -> None:
    """Ray ends the process itself, with a line that says why."""
    assert cut_in_the_middle(machines, "south") != 0
    assert "Failed to connect to GCS" in machines.said()
    played = machines.rounds()
    assert 2 <= played < 60
    done = subprocess.run(
        [python, "-m", "fedlora", "run", "--resume", "--out", "run", "--set", "transport.name=in_process"],
        cwd=machines.folder,
        env=side.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and f"round {played + 1:2}/60" in done.stdout, done.stdout + done.stderr


def test_the_commands_of_the_page(python: Path, tmp_path: Path) -> None:
    tiny.save_model("bert", tmp_path / "base")
    tiny.save_data(tmp_path)
    (tmp_path / "letters.csv").write_text((tmp_path / "train.csv").read_text())
    commands = re.findall(r"^\$ (fedlora .*)$", (side.ROOT / "docs" / "workers.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = [str(python), "-m", *command.split(), "--model", "base", "--set", "precision=fp32", "--set", "train.rows=1"]
        done = subprocess.run(words, cwd=tmp_path, env=side.environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "after 3 rounds" in done.stdout, done.stdout + done.stderr
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "ray"))
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
