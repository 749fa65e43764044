"""Language models: steps of SmolLM2 on GSM8K's rows, rank 8 on all linear layers, batch 8, ours against PEFT's loop.

Every side runs in a process of its own, which says how long its steps took and the most memory that it held at once; the sides
take turns. PEFT pads a batch to its longest row and has the logits of all of it; ours packs, and its head meets the trained tokens
alone. Where the CPU has no bf16 arithmetic, the sides in bf16 are left out.
"""

import json
import resource
import subprocess
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import against, harness
from benchmarks.harness import Sample
from benchmarks.peers import peft_lm, peft_loop
from fedlora.config import Config, resolve
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.data.load import load as load_data
from fedlora.models.heads import padding
from fedlora.models.load import Pretrained
from fedlora.models.slots import find_targets
from fedlora.runs.prepare import fresh_adapter, load_pretrained, make_task, make_trainer, try_pretrained
from fedlora.tasks import defaults
from fedlora.training.learner import Job
from fedlora.training.precision import dtype_of
from fedlora.types import Train

AB = frozenset({("shared", "A"), ("shared", "B")})
RANK, BATCH = 8, 8
AT_ONCE = {"fedlora, a client a step": 1, "fedlora, 4 clients a step": 4}
PIECE = 2048  # tokens of a step that pass at once, in which the gradients of a larger one add up
FP32, BF16 = torch.float32, torch.bfloat16
PEFT: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # of the weights, and of autocast
    "PEFT fp32": (FP32, None),
    "PEFT bf16 autocast": (FP32, BF16),
    "PEFT bf16 weights": (BF16, None),
}
TARGETS = dict.fromkeys(PEFT, 3.0)


@dataclass(frozen=True)
class Work:
    """The model and the examples of a side."""

    config: Config
    pretrained: Pretrained
    schema: Schema
    data: Encoded


def prepared(side: str, source: str, data: str, steps: int) -> Work:
    """So many batches of examples, the same for every side; the model as the side has it."""
    tables: dict[str, Any] = {
        "task": {"name": "causal_lm"},
        "model": {"source": source},
        "data": {"source": data, "limit": 2 * steps * BATCH, "test_limit": BATCH},
        "train": {"batch_size": BATCH, "rows": 1 << 20, "micro_tokens": PIECE},  # as many clients a step as there are
    }
    config = resolve(defaults(tables), tables)
    task = make_task(config)
    read = load_data(task, config.data, config.seed)
    if side in PEFT:
        pretrained = Pretrained(*peft_lm.load(source, PEFT[side][0]), source, keeps_head=True)
    else:
        pretrained = load_pretrained(config, read.schema, dtype=dtype_of(config))
    fit = task.fitting(read, pretrained, config.data.max_length).train.take(np.arange(steps * BATCH))
    return Work(config, pretrained, read.schema, task.encode(pretrained, fit, config.data.max_length))


def ours(work: Work, at_once: int) -> float:
    """The seconds of the steps of one client, or of several side by side, each of as many fewer."""
    config = work.config
    findings = try_pretrained(config, work.pretrained)
    trainer = make_trainer(config, work.pretrained, findings, make_task(config).bind(work.schema, work.pretrained))
    start = fresh_adapter(trainer.shapes, config.seed, {RANK: config.model.lora_alpha / RANK}, RANK)

    def train(clients: list[Encoded]) -> None:
        list(trainer.train(deque(Job(Train({"shared": start}, AB, epochs=1), own, config.seed, {}) for own in clients)))

    train([work.data.take(np.arange(BATCH))])  # warms up
    parts = [work.data.take(where) for where in np.array_split(np.arange(len(work.data)), at_once)]
    begun = time.perf_counter()
    train(parts)
    return time.perf_counter() - begun


def peft(work: Work, autocast: torch.dtype | None) -> float:
    """The seconds of the same steps under PEFT."""
    kinds = sorted({path.rpartition(".")[2] for path in find_targets(work.pretrained.model, "all-linear")})
    model = peft_loop.adapted(work.pretrained.model, RANK, work.config.model.lora_alpha, kinds)
    loop = peft_lm.LanguageLoop(model, work.config.train, padding(work.pretrained.model), work.config.seed, autocast=autocast)
    batches = np.split(np.arange(len(work.data)), len(work.data) // BATCH)
    loop.train(work.data, iter(batches[:1]), {})
    begun = time.perf_counter()
    loop.train(work.data, iter(batches), {})
    return time.perf_counter() - begun


def play(side: str, source: str, data: str, steps: int) -> dict[str, float]:
    """One repetition of a side, in this process."""
    work = prepared(side, source, data, steps)
    model = work.pretrained.model
    weights = sum(model.get_submodule(path).weight.numel() for path in find_targets(model, "all-linear"))
    seconds = ours(work, AT_ONCE[side]) if side in AT_ONCE else peft(work, PEFT[side][1])
    return {
        "seconds": seconds,
        "examples": len(work.data),
        "tokens": int(work.data.sizes.sum()),
        "trained": int(work.data.targets.sum()),
        "weights": weights,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def apart(side: str, source: str, data: str, steps: int, src: Path = against.ROOT / "src") -> dict[str, float]:
    """The same in a process of its own, which imports the package from `src`."""
    command = [sys.executable, "-m", "benchmarks.lm", "--side", side, "--model", source, "--data", data, "--steps", str(steps)]
    done = subprocess.run(command, env=against.environment(src), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    quick: bool = False,
    repetitions: int = 3,
    steps: int = 4,
    model: str = "smollm2",
    data: Annotated[str, typer.Option(help="gsm8k, where FEDLORA_DATA or the Hub has it, or arithmetic.")] = "gsm8k",
    side: Annotated[str, typer.Option(help="Play one side once, and print what it took.")] = "",
    commit: Annotated[
        str, typer.Option("--against", metavar="COMMIT", help="An earlier version of ours beside it, not PEFT.")
    ] = "",
) -> None:
    """Tokens a second, peak memory and share of the matrix peak, ours against PEFT."""
    if side:
        print(json.dumps(play(side, model, data, steps)))
        return
    repetitions, steps = (1, 4) if quick else (repetitions, steps)
    peak, here = harness.peak(), against.ROOT / "src"
    with against.source(commit) if commit else nullcontext(here) as earlier:
        sides = {name: (name, here) for name in AT_ONCE}
        if commit:
            sides |= {f"{name}, {commit}": (name, earlier) for name in AT_ONCE}
        else:
            sides |= {name: (name, here) for name, kinds in PEFT.items() if BF16 not in kinds or peak["bf16"] > peak["fp32"]}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}

        def once(name: str) -> Sample:
            own = apart(sides[name][0], model, data, steps, sides[name][1])
            found[name].append(own)
            return Sample(own["seconds"], int(own["examples"]), int(own["tokens"]))

        measured = harness.interleave({name: partial(once, name) for name in sides}, repetitions)
    first = next(iter(found.values()))[0]
    rows = harness.speeds(measured, int(first["weights"]), TARGETS)
    for row in rows:
        row["peak, GB"] = max(own["peak"] for own in found[row["side"]])
    facts = {
        "model": model,
        "data": data,
        "steps": steps,
        "tokens, and trained ones": [first["tokens"], first["trained"]],
        "frozen weights adapted": first["weights"],
        "peak GFLOP/s": {name: round(x / 1e9) for name, x in measured.peak.items()},
    }
    harness.finish(
        "lm-against" if commit else "lm",
        f"lm: {model} on {data}, rank {RANK} on all linear layers, batch {BATCH}",
        rows,
        facts,
        quick,
    )


if __name__ == "__main__":
    harness.command(main)
