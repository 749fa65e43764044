"""Clients played by Ray, in an environment beside `.venv` that has it."""

import re
import signal
import subprocess
import time
from pathlib import Path

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
            if b"raylet" in line or b"gcs_server" in line or line.startswith(b"ray::"):
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
