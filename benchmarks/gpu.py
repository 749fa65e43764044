"""On a GPU: RoBERTa-base's shape with random weights, 30 clients, batch 32 of 32 tokens, rank 8 on all linear layers."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, RobertaConfig

from benchmarks import harness, ours
from benchmarks.harness import Measured, Side
from benchmarks.peers import peft_loop
from fedlora import seeds
from fedlora.clients.worker import Examples, Worker
from fedlora.config import Config, HeadMode
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.gather.mean import Mean
from fedlora.models.load import from_config
from fedlora.runs.prepare import make_method, make_setup, make_task, make_trainer, try_pretrained
from fedlora.server.loop import Federation, Server, play_round
from fedlora.server.sampling import sampler
from fedlora.transports.inprocess import InProcess
from fedlora.types import Client, Factors, Setup

PEER = "PEFT bf16"
TARGETS = {PEER: 15.0}
SHARE = 0.35  # the target: of the GPU's dense bf16 peak


@dataclass(frozen=True)
class Shape:
    """The work: so many clients, each of so many steps of a full batch, every text of exactly so many tokens."""

    clients: int = 30
    steps: int = 10
    batch: int = 32
    tokens: int = 32

    def data(self, vocabulary: int, classes: int, seed: int) -> dict[int, Encoded]:
        """Random texts of random classes; ids from 4 on, past RoBERTa's special ones."""
        count = self.steps * self.batch
        out = {}
        for k in range(self.clients):
            draw = seeds.generator(seed, "bench", k)
            ids = draw.integers(4, vocabulary, (count, self.tokens), dtype=np.int32)
            out[k] = Encoded(tuple(ids), draw.integers(0, classes, count), np.full(count, self.tokens))
        return out


def fedlora(config: Config, model: PretrainedConfig, data: Mapping[int, Encoded]) -> tuple[Side, Setup]:
    """Our rounds over a random model."""
    pretrained = from_config(model, None, config.seed)
    schema = Schema(tuple(map(str, range(model.num_labels))))
    trainer = make_trainer(config, pretrained, try_pretrained(config, pretrained), make_task(config).bind(schema))
    rank = config.clients.rank
    assert isinstance(rank, int)
    setup = make_setup(config, trainer, [Client(k, rank, len(own)) for k, own in data.items()])
    method = make_method(config)
    worker = Worker(method, setup, trainer, {id: Examples(own) for id, own in data.items()}, HeadMode.FROZEN)
    participants = sampler(setup.clients, setup.seed, 1.0)
    federation = Federation(method, setup, InProcess(worker), Mean(method, setup), participants)
    servers = [Server(0, method.init(setup))]

    def run() -> harness.Sample:
        server, counts, _ = play_round(federation, servers.pop())
        servers.append(server)
        return ours.work(counts.exchange_s, list(data.values()), 1)

    return run, setup


def peft(config: Config, model: PretrainedConfig, data: Mapping[int, Encoded], setup: Setup, device: torch.device) -> Side:
    """PEFT's rounds: frozen weights in bf16, adapters in fp32 under autocast."""
    start: Factors = setup.fresh(setup.clients[0].rank)
    base = AutoModelForSequenceClassification.from_config(model, dtype=torch.bfloat16).eval()
    adapted = peft_loop.adapted(base, setup.clients[0].rank, config.model.lora_alpha, list(setup.shapes)).to(device)
    loop = peft_loop.Loop(adapted, config.train, model.pad_token_id or 0, config.seed, device, torch.bfloat16)
    return peft_loop.side(loop, data, peft_loop.as_state(start))


def measure(device: str, model: PretrainedConfig, shape: Shape, repetitions: int) -> tuple[Measured, Setup]:
    """A round a repetition of each; the first repetition of all warms up."""
    config = ours.configured(
        {"device": device, "clients": {"count": shape.clients}, "train": {"rounds": repetitions + 1, "batch_size": shape.batch}}
    )
    data = shape.data(model.vocab_size, model.num_labels, config.seed)
    own, setup = fedlora(config, deepcopy(model), data)  # a model writes its choice of attention into its configuration
    sides = {"fedlora": own, PEER: peft(config, model, data, setup, torch.device(device))}
    for side in sides.values():
        side()
    return harness.interleave(sides, repetitions, device), setup


def main(quick: bool = False, repetitions: int = 5, steps: int = 10) -> None:
    """Examples a second and share of the dense bf16 peak, ours against PEFT, on one GPU."""
    if not torch.cuda.is_available():
        harness.console.print("gpu: torch sees no GPU here, so nothing is measured and nothing is written")
        return
    shape = Shape(steps=2 if quick else steps)
    model = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=77)
    measured, setup = measure("cuda", model, shape, 1 if quick else repetitions)
    weights = sum(d_out * d_in for d_out, d_in in setup.shapes.values())
    rows = harness.speeds(measured, weights, TARGETS)
    facts = {
        "work": vars(shape),
        "frozen weights adapted": weights,
        "peak TFLOP/s": {name: round(x / 1e12, 1) for name, x in measured.peak.items()},
        "target share of peak": SHARE,
        "gpu memory, GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }
    harness.finish("gpu", "gpu: RoBERTa-base's shape, 30 clients, batch 32 of 32 tokens, rank 8", rows, facts, quick)


if __name__ == "__main__":
    harness.command(main)
