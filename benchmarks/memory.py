"""How much memory a run of many personal clients takes: 1,000 of them, each with an adapter of its own of rank 8 on MiniLM.

A whole `fedlora run` of FedDPA in a process of its own, which keeps both factors of every client, from reading the data to the
exported adapters; the peak is the operating system's own count of what that process held at once.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import harness

LIMIT_GB = 3.0  # the target


def main(quick: bool = False, clients: int = 1000, method: str = "feddpa") -> None:
    """Peak memory of one round in which every client trains, and of the evaluation of every client's own model after it."""
    count, each = (20, 2) if quick else (clients, 2)
    tables = {
        "data.limit": count * each,
        "data.partition": '"iid"',
        "data.source": '"banking77"',
        "clients.count": count,
        "clients.rank": 8,
        "method.name": f'"{method}"',
        "train.rounds": 1,
        "model.source": '"minilm"',
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as temp:
        out = Path(temp) / "run"
        settings = [word for key, value in tables.items() for word in ("--set", f"{key}={value}")]
        start = time.perf_counter()
        command = [sys.executable, "-c", "from fedlora.cli import main; main()", "run", "--out", str(out), "--quiet", *settings]
        with harness.console.status(f"a round of {count:,} clients"):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        kept = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        row = {
            "clients": f"{count:,}",
            "method": method,
            "peak, GB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
            "target": f"{LIMIT_GB:g}",
            "on disk, GB": kept / 1e9,
            "whole run, s": time.perf_counter() - start,
        }
    harness.finish("memory", "memory: personal clients of MiniLM, rank 8", [row], {"settings": tables}, quick)


if __name__ == "__main__":
    harness.command(main)
