"""The estimate of memory: its parts by hand, what a step keeps against a real step, what there is from files of Linux."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models import memory
from fedlora.models.load import from_config
from fedlora.models.memory import Room
from fedlora.models.slots import find_targets
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job
from fedlora.types import FULL, Factors, Train

CPU = torch.device("cpu")
LORA = frozenset({("shared", "A"), ("shared", "B")})


def sizes(parts: Any) -> dict[str, int]:
    return {part.name: part.size for part in parts}


def test_the_base_by_hand() -> None:
    """100 numbers read in fp32 are 400 bytes; computing in bf16 they are 200 more. Of them 60 are merged into, in fp32."""
    parameters = [torch.empty(10, 8, device="meta"), torch.empty(20, device="meta")]
    base = lambda *args: sizes(memory.base_parts(parameters, *args))  # noqa: E731
    assert base("cpu", torch.float32) == {"base as it was read": 400}
    assert base("cpu", torch.bfloat16) == {"base as it was read": 400, "base in bf16": 200}
    assert base("cuda", torch.float32) == {"base as it was read": 400, "base in fp32": 400}
    assert base("cpu", torch.float32, 60) == {
        "base as it was read": 400,
        "what is merged into it": 240,
        "base with what is merged": 240,
    }
    assert base("cpu", torch.bfloat16, 60)["what is merged into it"] == 240
    stored = [x.bfloat16() for x in parameters]
    assert sizes(memory.base_parts(stored, "cpu", torch.bfloat16)) == {"base as it was read": 200}
    where = {part.name: part.computing for part in memory.base_parts(parameters, "cuda", torch.bfloat16)}
    assert where == {"base as it was read": False, "base in bf16": True}


def test_adapters_by_hand() -> None:
    """Ten trained of twelve. A client in a step: 10 * (4 + 4 + 8) + 12 * 4 = 208 in fp32, with bf16
    160 + 12 * 2 + 10 * 2 = 204; with SGD 10 * 8 + 48 = 128. Under way: 4 * (12 + 10) = 88."""
    found = sizes(memory.adapter_parts(10, 12, 3, 5, "adamw", torch.float32, "cpu"))
    assert found == {"adapters and optimiser": 3 * 208, "what clients were sent and learned": 5 * 88}
    assert sizes(memory.adapter_parts(10, 12, 1, 1, "adamw", torch.bfloat16, "cpu"))["adapters and optimiser"] == 204
    assert sizes(memory.adapter_parts(10, 12, 1, 1, "sgd", torch.float32, "cpu"))["adapters and optimiser"] == 128


def test_the_rest_by_hand() -> None:
    assert memory.head_bytes(1000, 7, torch.float32) == 1000 * 7 * 8
    assert memory.head_bytes(1000, 7, torch.bfloat16) == 1000 * 7 * 12
    assert memory.work({"a": (3, 5), "b": (9, 2)}, 10, torch.bfloat16) == 3 * 10 * 9 * 2
    assert memory.most_kept({"a": (3, 5)}, 2, 4, 10, 6, torch.float32) == 10 * (6 * 8 + 4 * 2 * 4 * 6) * 4


def trainer(kind: str, **settings: Any) -> Trainer:
    pretrained = from_config(tiny.config(kind), None, 3)
    targets = find_targets(pretrained.model, "all-linear")
    train = TrainConfig(batch_size=8, rows=1000, **settings)
    return Trainer(pretrained, targets, train, CPU, torch.float32, tiny.objective())


def data(seed: int, count: int = 8) -> Encoded:
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(4, 60, rng.integers(20, 40)).astype(np.int32) for _ in range(count))
    return Encoded(rows, rng.integers(0, 3, count), np.array([len(row) for row in rows]))


def request(own: Trainer, what: str) -> Train:
    if what == "full":
        return Train({}, FULL)
    A = {m: torch.randn(3, i) for m, (_, i) in own.shapes.items()}
    B = {m: torch.randn(o, 3) for m, (o, _) in own.shapes.items()}
    return Train({"shared": Factors(A, B, 2.0)}, LORA)


@pytest.mark.parametrize(
    "kind, what, clients", [("bert", "lora", 2), ("llama", "lora", 2), ("gpt2", "lora", 1), ("bert", "full", 1)]
)
def test_what_a_step_keeps_is_what_a_real_one_keeps(kind: str, what: str, clients: int) -> None:
    """A real step on numbers: bytes of the storages that autograd keeps, but for those of parameters and of factors. The head, the
    loss and what makes a mask or positions are beside the estimate: a twentieth at most, here."""
    own = trainer(kind)
    learners = [own._begin(Job(request(own, what), data(i), i, {})) for i in range(clients)]
    mine = {p.untyped_storage().data_ptr() for p in own.base.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    for learner in learners:
        mine |= {x.untyped_storage().data_ptr() for x in learner.flats.values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        own._step(learners)
    real = sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in mine)
    with torch.device("meta"):
        outline = from_config(tiny.config(kind), None, 0).model
    batches = [learner.job.data.inputs for learner in learners]
    found = memory.kept(outline, list(own.shapes), own.forward.form, learners[0].job.ask, batches, torch.float32)
    assert found == pytest.approx(real, rel=0.05)


def test_checkpointing_keeps_what_enters_the_blocks_and_one_of_them() -> None:
    own = trainer("llama")
    found = {}
    for on in (False, True):
        with torch.device("meta"):
            outline = from_config(tiny.config("llama"), None, 0).model
        found[on] = memory.kept(
            outline, list(own.shapes), own.forward.form, request(own, "lora"), [data(0).inputs], torch.float32, on
        )
    tokens = int(data(0).sizes.sum())
    assert found[False] / 2 < found[True] < found[False] / 2 + 6 * tokens * 16 * 4 + 1000  # two blocks; hidden states of 16


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000 kB\nMemAvailable:   8000 kB\n"}
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, None),
        (MEMINFO, 8000 * 1024),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"}, 8000 * 1024),
        (
            MEMINFO | {"proc/self/cgroup": "0::/a/b\n", f"{V2}a/b/memory.max": "max\n", f"{V2}a/b/memory.current": "5\n"},
            8000 * 1024,
        ),
        (  # the group around it has a limit: 1,000,000 - 400,000, of which 100,000 are files that can be dropped
            MEMINFO
            | {"proc/self/cgroup": "0::/a/b\n", f"{V2}a/memory.max": "1000000\n", f"{V2}a/memory.current": "400000\n"}
            | {f"{V2}a/memory.stat": "anon 300000\ninactive_file 100000\n"},
            700_000,
        ),
        (  # the path is the host's, the files are those of the container
            MEMINFO
            | {"proc/self/cgroup": "4:memory:/host/x\n", f"{V1}memory.limit_in_bytes": "900\n"}
            | {f"{V1}memory.usage_in_bytes": "1000"},
            0,
        ),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "4:memory:/\n",
                f"{V1}memory.limit_in_bytes": str(2**63 - 4096),
                f"{V1}memory.usage_in_bytes": "1000",
            },
            8000 * 1024,
        ),
    ],
)
def test_what_there_is(files: dict[str, str], free: int | None, tmp_path: Path) -> None:
    assert memory.room(CPU, tree(tmp_path, files)) == Room(free)


PEAK = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import test_memory as t
import numpy as np, torch, transformers
from collections import deque
from fedlora.models import memory
from fedlora.models.load import from_config
from fedlora.training.learner import Job

torch.set_num_threads(1)
big = dict(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024)
big |= dict(vocab_size=20000, num_labels=3, pad_token_id=0)
kinds = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}
t.tiny.config = lambda kind: kinds[kind](**big)
kind = sys.argv[2]
own = t.trainer(kind, max_steps=1)
jobs = [Job(t.request(own, "lora"), t.data(i), i, {}) for i in range(2)]
list(own.train(deque([Job(jobs[0].ask, jobs[0].data.take(np.arange(1)), 0, {})])))  # what libraries keep once and for all

def used():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before, peak, ended = used(), [0], threading.Event()
def watch():
    while not ended.is_set():
        peak[0] = max(peak[0], used())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
list(own.train(deque(jobs)))
ended.set()
thread.join()
with torch.device("meta"):
    outline = from_config(t.tiny.config(kind), None, 0).model
kept = memory.kept(outline, list(own.shapes), own.forward.form, jobs[0].ask, [job.data.inputs for job in jobs], torch.float32)
n = memory.numbers_of(jobs[0].ask.slots)
adapters = sum(part.size for part in memory.adapter_parts(n, n, 2, 2, "adamw", torch.float32, "cpu"))
work = memory.work(own.shapes, sum(int(job.data.sizes.sum()) for job in jobs), torch.float32)
print((kept + adapters + work) / (peak[0] - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_estimate_against_the_peak_of_a_process(kind: str) -> None:
    """With an allocator that gives back at once what is freed: C's own keeps some of it."""
    own = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", PEAK, here, kind], env=own | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.8 < float(done.stdout.splitlines()[-1]) < 1.5
