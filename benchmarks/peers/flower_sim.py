"""Flower's simulation with a PEFT client, as FlowerTune writes it: FedAvg over the PEFT state dict, one client a Ray task, and the
client builds its model for every message. Runs in a process of its own, so that no part of Ray is there while others are measured.

    python -m benchmarks.peers.flower_sim JOB.json      prints one JSON line a round, on the last lines

Rounds after the first count: the first, one step of a few clients, starts Ray and imports torch in its workers.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded

ROOT = Path(__file__).parents[2]
WARM = 4  # clients of the first round
ALONE = {  # nothing leaves this machine, and nothing is written outside the temporary folder
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Job:
    """What to simulate. A client's data is DATA/I.npz, where I is its number modulo `files`."""

    data: str
    files: int
    clients: int  # of the federation
    sample: int  # that take part in a round
    rounds: int  # that count
    source: str
    modules: list[str]
    num_labels: int
    rank: int
    alpha: float
    seed: int
    batch_size: int
    lr: float
    weight_decay: float
    pad: int
    cpus: int  # of this machine; a worker has one
    keep_model: bool = False  # a worker builds its model once, and not for every message


@dataclass(frozen=True)
class Round:
    """Seconds of a round: between sending its messages and having all replies, from its start to the next one's, and, summed over
    its clients, of training and of building models."""

    exchange_s: float
    whole_s: float
    train_s: float
    load_s: float
    examples: int
    tokens: int


def installed() -> bool:
    """Whether the extra "bench" is."""
    return find_spec("flwr") is not None and find_spec("ray") is not None


def describe(context: Any, pool: Sequence[Encoded], folder: Path, **how: Any) -> Job:
    """The job of a run like `context`'s; writes the clients' examples, one file each, to `folder`."""
    for i, data in enumerate(pool):
        lengths = [len(ids) for ids in data.inputs]
        np.savez(folder / f"{i}.npz", ids=np.concatenate(data.inputs), lengths=lengths, labels=data.targets)
    config = context.config
    common = {
        "data": str(folder),
        "files": len(pool),
        "clients": len(pool),
        "sample": len(pool),
        "rounds": 1,
        "source": config.model.source,
        "modules": list(context.setup.shapes),
        "num_labels": len(context.roster.schema.label_names),
        "rank": config.clients.rank,
        "alpha": config.model.lora_alpha,
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "lr": config.train.lr,
        "weight_decay": config.train.weight_decay,
        "pad": context.trainer.pad,
        "cpus": os.cpu_count() or 1,
    }
    return Job(**(common | how))


def play(job: Job, timeout: float = 1800) -> list[Round]:
    """Simulate in a fresh process; the rounds that count."""
    with tempfile.TemporaryDirectory(prefix="flwr-") as temp:
        file = Path(temp) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        env = (
            os.environ
            | ALONE
            | {"FLWR_HOME": temp, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        )
        env.pop("OMP_NUM_THREADS", None)  # Ray gives each worker as many threads as it has CPUs
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers.flower_sim", str(file)],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"exchange_s"')]
    if done.returncode or len(lines) != job.rounds:
        raise RuntimeError(f"the simulation failed:\n{done.stderr[-4000:]}")
    return [Round(**json.loads(line)) for line in lines]


# ---- inside the simulation ---------------------------------------------------------------------------------------------------


def train(message: Any, context: Any) -> Any:
    """The client: build the model, load what came, train, send it back."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    from benchmarks.peers.peft_loop import Loop, get_state, orders, set_state

    config = message.content["config"]
    job = Job(**json.loads(config["job"]))
    client = int(context.node_config["partition-id"])
    data = _read(Path(job.data) / f"{client % job.files}.npz")
    begun = time.perf_counter()
    model = _kept_model(config["job"]) if job.keep_model else _build(job)
    loaded = time.perf_counter()
    settings = TrainConfig(batch_size=job.batch_size, lr=job.lr, weight_decay=job.weight_decay)
    loop = Loop(model, settings, job.pad, job.seed)
    number = int(config["server-round"]) - 1
    batches = orders(job.seed, number, client, len(data), settings)
    set_state(model, message.content["arrays"].to_torch_state_dict())
    loop.train(data, islice(batches, 1) if number == 0 else batches, {})
    state = get_state(model)
    done = time.perf_counter()
    metrics = {
        "num-examples": len(data),
        "train_s": done - loaded,
        "load_s": loaded - begun,
        "tokens": sum(map(len, data.inputs)),
        "pid": os.getpid(),
    }
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


def _build(job: Job) -> Any:
    from benchmarks.peers.peft_loop import adapted, load

    return adapted(load(job.source, job.num_labels, job.seed), job.rank, job.alpha, job.modules)


@cache
def _kept_model(job: str) -> Any:
    return _build(Job(**json.loads(job)))


def _read(file: Path) -> Encoded:
    found = np.load(file)
    return Encoded(tuple(np.split(found["ids"], np.cumsum(found["lengths"])[:-1])), found["labels"], found["lengths"])


def main(file: str) -> None:
    """Play a job's rounds and print them."""
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from benchmarks.peers.peft_loop import get_state

    text = Path(file).read_text()
    job = Job(**json.loads(text))
    starts: list[float] = []
    rounds: list[Round] = []
    workers: set[int] = set()

    class Timed(FedAvg):  # type: ignore[misc]
        """Flower's FedAvg, with a clock."""

        def configure_train(self, server_round: int, *args: Any) -> Iterable[Any]:
            starts.append(time.perf_counter())
            first = server_round == 1
            self.min_train_nodes = min(WARM, job.sample) if first else job.sample
            self.fraction_train = self.min_train_nodes / job.clients
            messages = list(super().configure_train(server_round, *args))
            self.sent = time.perf_counter()
            return messages

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            got = list(replies)
            came = time.perf_counter()
            if len(got) != self.min_train_nodes or any(reply.has_error() for reply in got):
                raise RuntimeError(f"round {server_round}: {len(got)} of {self.min_train_nodes} replies, or errors among them")
            mean = super().aggregate_train(server_round, got)
            own = [reply.content["metrics"] for reply in got]
            workers.update(int(m["pid"]) for m in own)
            sums = {name: sum(m[name] for m in own) for name in ("train_s", "load_s", "tokens", "num-examples")}
            rounds.append(
                Round(came - self.sent, 0.0, sums["train_s"], sums["load_s"], int(sums["num-examples"]), int(sums["tokens"]))
            )
            return mean

    server, client = ServerApp(), ClientApp()
    client.train()(train)

    @server.main()  # type: ignore[untyped-decorator]
    def serve(grid: Any, context: Any) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_available_nodes=job.clients)
        arrays = ArrayRecord(get_state(_build(job)))
        strategy.start(grid, arrays, num_rounds=1 + job.rounds, train_config=ConfigRecord({"job": text}))
        starts.append(time.perf_counter())

    ray = {"num_cpus": job.cpus, "include_dashboard": False, "log_to_driver": False, "_temp_dir": str(Path(file).parent)}
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, job.clients, backend_config={"client_resources": resources, "init_args": ray})
    _end(workers)
    for row in _counted(rounds, starts):
        print(json.dumps(row))


def _end(workers: Iterable[int], patience: float = 5.0) -> None:
    """Ray's workers can outlive it by a minute, busy: whoever is measured next shall not share the machine with them."""
    deadline = time.monotonic() + patience
    for pid in workers:
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.kill(pid, 0)
                time.sleep(0.05)
            os.kill(pid, signal.SIGKILL)


def _counted(rounds: Sequence[Round], starts: Sequence[float]) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rounds):
        if i:
            yield asdict(row) | {"whole_s": starts[i + 1] - starts[i]}


if __name__ == "__main__":
    # Under its own name, not as __main__: Ray's workers then import the client from here.
    from benchmarks.peers import flower_sim

    flower_sim.main(sys.argv[1])
