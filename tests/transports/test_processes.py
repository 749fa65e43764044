"""Workers that are processes of their own, and signals that kill them and their server at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import configured, rows, run, same_end

from fedlora.config import to_toml
from fedlora.runs.worker import processes
from fedlora.summary import read

KILLS = 30
SERVE = """
import sys
from pathlib import Path
from fedlora.config import read_recipe, resolve
from fedlora.listener import Quiet
from fedlora.runs.play import execute
from fedlora.runs.worker import processes
out = Path(sys.argv[2])
execute(resolve(read_recipe(sys.argv[1])), out, out.exists(), Quiet(), connect=processes(2, retries=50))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("fedit", 1), ("flora", 2), ("pfedloru", 3)])
def test_processes_equal_one(
    name: str,
    count: int,
    world: Path,
    alone: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    config = configured(world, name)
    out = run(config, tmp_path / "run", processes(count))
    assert rows(out) == rows(alone(name))
    same_end(out, alone(name), config)


def workers(out: Path) -> list[int]:
    """The processes that play clients of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                said = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"fedlora.runs.worker" in said and str(out).encode() in said:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_thirty_kills_of_workers_and_of_the_server_change_nothing(world: Path, tmp_path: Path) -> None:
    """Clients with heads of their own, merges into the base, half of the clients a round. What workers are sent to be level again
    is more to download; nothing else differs."""
    config = configured(world, "pfedloru", train={"rounds": 250, "evaluate_every": 25})
    whole = run(config, tmp_path / "whole")
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(to_toml(config))
    draw, killed, servers = random.Random(0), 0, 0

    def serve() -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", SERVE, str(recipe), str(out)], stderr=subprocess.DEVNULL)

    server = serve()
    while killed < KILLS and server.poll() is None:
        time.sleep(draw.choice([draw.uniform(0.1, 1.0), draw.uniform(4.0, 8.0)]))  # while they start, and while they work
        playing = workers(out)
        if draw.random() < 0.3 and out.exists():
            server.send_signal(signal.SIGKILL)
            server.wait()
            server, servers = serve(), servers + 1
        elif playing:
            os.kill(draw.choice(playing), signal.SIGKILL)
        else:
            continue
        killed += 1
    assert server.wait() == 0 and read(out) is not None
    assert killed == KILLS and servers > 2, f"the run ended after {killed} kills, {servers} of them of its server"
    assert rows(out, "download", "evaluate_bytes") == rows(whole, "download", "evaluate_bytes")
    same_end(out, whole, config)
    assert not workers(out)
