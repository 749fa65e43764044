"""What a federation over Flower costs beside training: a server and three nodes on this machine, over TLS, each node with its key.

MiniLM with adapters of rank 32, one step a round, so that a round is nearly all overhead. Every node reaches the server through a
relay that counts what passes. What an idle node sends and receives (polls and heartbeats) is counted while the third one is not
there yet, and taken off what passes in rounds before that is held against the payloads that the rows count (`transport_up_bytes`,
`transport_down_bytes`: messages of training and of evaluation, compressed where that pays).
"""

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row
from fedlora.runs.federation.processes import free_port

NAMES = ("north", "south", "west")
RANK, EVERY = 32, 3  # rounds between evaluations
FLOOR = "3 to 6"  # seconds of a round of Flower's own
PATIENCE = 600.0  # seconds for anything to happen
KINDS = {  # words of a process's command -> what it is
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "server's app",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "app of a message",
    "federation.node": "client's worker",
}


@dataclass
class Relay:
    """Passes connections on, and counts bytes to the server and from it."""

    target: int
    up: int = 0
    down: int = 0
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    def __post_init__(self) -> None:
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                node, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            threading.Thread(target=self._pass, args=(node, server, "up"), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, node, "down"), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            each.close()


@contextmanager
def watched(root: Path) -> Iterator[dict[str, float]]:
    """The most memory, GB, of a process of each kind whose command names `root`."""
    most: dict[str, float] = defaultdict(float)
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            for entry in Path("/proc").iterdir():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    kinds = [kind for words, kind in KINDS.items() if words in line]
                    if entry.name.isdigit() and kinds and str(root) in line + (entry / "environ").read_text("utf-8", "replace"):
                        peak = next(x for x in (entry / "status").read_text().splitlines() if x.startswith("VmHWM"))
                        most[kinds[0]] = max(most[kinds[0]], int(peak.split()[1]) / 1e6)
                except (OSError, StopIteration):
                    continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def save_texts(root: Path) -> None:
    """Some made-up texts for each client."""
    draw = random.Random(0)
    for name in NAMES:
        (root / name).mkdir()
        for part in ("train", "test"):
            with open(root / name / f"{part}.csv", "w", newline="") as file:
                rows = [(" ".join(draw.choices("abcdefgh", k=12)), draw.choice(("left", "right"))) for _ in range(16)]
                csv.writer(file).writerows([("text", "label"), *rows])


class Federation:
    """A folder of a federation and the processes in it."""

    def __init__(self, root: Path, rounds: int, stack: ExitStack) -> None:
        self.root, self.rounds, self.stack = root, rounds, stack
        self.port = free_port()
        save_texts(root)
        keys = {"train.max_steps": 1, "train.evaluate_every": EVERY, "train.rows": 1, "precision": '"fp32"'}
        sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        words = ["--method", "fedit", "--rank", RANK, "--rounds", rounds, "--model", "minilm", "--labels", "left,right"]
        self.do("init", "fed", "--clients", ",".join(NAMES), *words, "--server", f"127.0.0.1:{self.port}", *sets)
        for script in (("make-certificates.sh", "127.0.0.1"), *(("make-key.sh", name) for name in NAMES)):
            subprocess.run(["sh", f"fed/{script[0]}", script[1]], cwd=root, check=True, capture_output=True)
        self.relays = {name: Relay(self.port) for name in NAMES}

    def _command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "fedlora", "federate", *map(str, words)]

    def do(self, *words: object) -> None:
        """A command to its end."""
        subprocess.run(self._command(*words), cwd=self.root, check=True, stdout=subprocess.DEVNULL)

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        """A command that goes on until the benchmark ends."""
        with open(self.root / "log.txt", "ab") as log:
            process = subprocess.Popen(self._command(*words), cwd=self.root, stdout=log, stderr=log, start_new_session=True)
        self.stack.callback(_stop, process)
        return process

    def client(self, name: str) -> None:
        """Start a client behind its relay."""
        where = f"127.0.0.1:{self.relays[name].port}"
        self.start("client", "fed", "--name", name, "--data", name, "--server", where, "--threads", 1)

    @property
    def rows(self) -> list[Row]:
        """Of the rounds so far."""
        file = self.root / "fed/server/run/metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def there(self, name: str) -> bool:
        """Whether the server has met a client."""
        file = self.root / "fed/server/status.json"
        said = json.loads(file.read_text()).get("clients", {}) if file.exists() else {}
        return said.get(name) not in (None, "not seen yet")

    def until(self, what: Callable[[], Any]) -> None:
        """Wait for something."""
        end = time.monotonic() + PATIENCE
        while not what():
            if time.monotonic() > end:
                raise SystemExit((self.root / "log.txt").read_text()[-3000:])
            time.sleep(0.1)

    def passed(self) -> dict[str, tuple[int, int]]:
        """Bytes up and down so far, by node."""
        return {name: (relay.up, relay.down) for name, relay in self.relays.items()}


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def main(quick: bool = False, rounds: int = 12, idle: float = 60.0) -> None:
    """Seconds of a round, bytes on the wire against the rows' own count, memory of each process."""
    rounds, idle = (EVERY, 5.0) if quick else (rounds, idle)
    with tempfile.TemporaryDirectory(prefix="bench-") as temp, ExitStack() as stack:
        root = Path(temp).resolve()
        most = stack.enter_context(watched(root))
        fed = Federation(root, rounds, stack)
        with harness.console.status("starting"):
            server = fed.start("server", "fed", "--port", fed.port)
            fed.until(lambda: "listening" in (root / "log.txt").read_text())
            for name in NAMES[:2]:
                fed.client(name)
            fed.until(lambda: all(map(fed.there, NAMES[:2])))
        with harness.console.status(f"two idle nodes for {idle:g} s"):
            time.sleep(5)
            before = fed.passed()
            time.sleep(idle)
            after = fed.passed()
        quiet = [median(after[name][way] - before[name][way] for name in NAMES[:2]) / idle for way in (0, 1)]  # bytes a second
        with harness.console.status(f"{rounds} rounds"):
            fed.client(NAMES[2])
            fed.until(lambda: fed.rows)
            begun, first = time.monotonic(), fed.passed()
            fed.until(lambda: len(fed.rows) >= rounds)
            seconds, last = time.monotonic() - begun, fed.passed()
            fed.until(lambda: server.poll() is not None)
        rows = fed.rows[1:]  # the first round also waits for weights
    alone = [row["wall_s"] for row in rows if not row.get("evaluate_s")]
    scored = [row["wall_s"] for row in rows if row.get("evaluate_s")]
    passed = [sum(last[name][way] - first[name][way] for name in NAMES) - len(NAMES) * quiet[way] * seconds for way in (0, 1)]
    counted = sum(row["upload_bytes"] for row in rows)
    sent = [sum(row[f"transport_{way}_bytes"] for row in rows) for way in ("up", "down")]
    table: list[Row] = [
        {"what": "seconds of a round of one step", "measured": median(alone), "target": f"{FLOOR} (Flower's own)"},
        {"what": "the same with an evaluation", "measured": median(scored)},
        {"what": "bytes of a client's update, MB", "measured": counted / len(rows) / len(NAMES) / 1e6},
        {"what": "bytes to the server / payloads' own", "measured": passed[0] / sent[0], "target": "1.02"},
        {"what": "bytes from the server / payloads' own", "measured": passed[1] / sent[1], "target": "1.02"},
        {"what": "payloads to the server, compressed / upload_bytes", "measured": sent[0] / counted},
        {"what": "an idle node's kB a minute, to the server", "measured": quiet[0] * 60 / 1e3},
        {"what": "an idle node's kB a minute, from the server", "measured": quiet[1] * 60 / 1e3},
        *({"what": f"most memory, GB: {kind}", "measured": most[kind]} for kind in KINDS.values() if kind in most),
    ]
    facts = {"rounds": rounds, "clients": len(NAMES), "rank": RANK, "seconds by round": [row["wall_s"] for row in rows]}
    harness.finish("federation", "federation: three nodes over Flower, MiniLM, one step a round", table, facts, quick)


if __name__ == "__main__":
    harness.command(main)
