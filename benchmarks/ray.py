"""What Ray costs and gives on one machine: two workers beside one process of two threads, and what a client costs beside training.

Each run is a process of its own, so that its most memory is its own: the driver's, for workers are other processes. Populations
share 10,000 short texts, one percent of the clients take part in a round, and each has a single step.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness, ours
from benchmarks.harness import Row

POPULATIONS = (100, 1_000, 10_000)
ROUNDS = 12  # of a run, the first of which starts the workers
ROUND_MS, EACH_MS = 50.0, 1.0  # the target: a round, and a client


def played(tables: dict[str, Any]) -> Row:
    """A run in this process, from nothing to its summary."""
    from fedlora.listener import Quiet
    from fedlora.runs.play import execute
    from fedlora.summary import read_rows

    with tempfile.TemporaryDirectory(prefix="bench-") as temp:
        out = Path(temp) / "run"
        begun = time.perf_counter()
        execute(ours.configured(tables), out, False, Quiet())
        whole = time.perf_counter() - begun
        rows = read_rows(out)
        examples = sum(client["num_examples"] for client in json.loads((out / "federation.json").read_text())["clients"])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": rows[0]["train_s"], "train": [row["train_s"] for row in rows[1:]], "whole": whole, "memory": most} | {
        "clients": rows[-1]["clients"],
        "examples": examples,
    }


def apart(*tables: dict[str, Any]) -> Row:
    """The same in a process of its own."""
    merged: dict[str, Any] = {}
    for each in tables:
        for name, table in each.items():
            merged[name] = {**merged.get(name, {}), **table}
    code = "import json, sys; from benchmarks import ray; print(json.dumps(ray.played(json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(merged)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def main(quick: bool = False) -> None:
    """Examples a second with two workers and with none, start-up, milliseconds a client, and the driver's memory."""
    over = {"transport": {"name": "ray", "workers": 2}}
    short = {"data": {"limit": 120 if quick else 1500}, "train": {"rounds": 2 if quick else 7, "evaluate_every": 1000}}
    rows: list[Row] = []
    speed = {}
    for name, more in (("one process", {}), ("Ray, 2 workers", over)):
        with harness.console.status(f"train-short, {name}"):
            found = apart(short, more)
        speed[name] = found["examples"] / median(found["train"])
        rows.append({"run": "train-short", "side": name, "examples/s": speed[name], "first round, s": found["first"]})
    rows[-1]["ratio"] = speed["Ray, 2 workers"] / speed["one process"]
    for count in POPULATIONS[:1] if quick else POPULATIONS:
        sizes = {
            "data": {"limit": 10_000, "partition": "iid", "min_size": 1},
            "clients": {"count": count, "sample": max(1, count // 100)},
        }
        length = {"train": {"rounds": 3 if quick else ROUNDS, "evaluate_every": 1000, "max_steps": 1, "batch_size": 1}}
        sides = {}
        for name, more in (("one process", {}), ("Ray, 2 workers", over)):
            with harness.console.status(f"{count:,} clients, {name}"):
                found = sides[name] = apart(sizes, length, more)
            took = median(found["train"])
            rows.append(
                {
                    "run": f"{count:,} clients, {found['clients']} a round",
                    "side": name,
                    "round, ms": 1000 * took,
                    "ms a client": 1000 * took / found["clients"],
                    "first round, s": found["first"],
                    "driver, GB": found["memory"] / 1e9,
                }
            )
        beside = 1000 * (median(sides["Ray, 2 workers"]["train"]) - median(sides["one process"]["train"]))
        rows[-1] |= {"more than in one process, ms": beside, "target": f"{ROUND_MS + EACH_MS * found['clients']:g} ms"}
    facts = {"model": "minilm", "method": "fedit", "rounds": ROUNDS}
    harness.finish("ray", "ray: clients over Ray beside one process (MiniLM, rank 8)", rows, facts, quick)


if __name__ == "__main__":
    harness.command(main)
