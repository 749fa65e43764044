"""The peers do the same work as ours: from the same start they end at the same factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RobertaConfig

from benchmarks import gpu, harness, ours, training
from benchmarks.peers import flower_sim, lora_a2_peft, peft_loop
from fedlora.runs.context import RunContext
from fedlora.types import SHARED, Factors


@pytest.fixture
def context(bert_folder: Path, csv_folder: Path) -> Any:
    def make(*tables: Mapping[str, Any]) -> RunContext:
        tiny = {
            "precision": "fp32",
            "model": {"source": str(bert_folder)},
            "data": {"source": str(csv_folder), "alpha": 1.0},
            "clients": {"count": 4, "rank": 2},
            "train": {"rounds": 2, "batch_size": 8, "lr": 5e-3, "weight_decay": 1.0},
        }
        return ours.context(tiny, *tables)

    return make


def apart(state: Mapping[str, Tensor], factors: Factors, start: Factors) -> float:
    """The distance of two adapters over how far ours moved."""
    own, first = peft_loop.as_state(factors), peft_loop.as_state(start)
    assert set(state) == set(own)
    gap, moved = (sum(float((x - y[n]).square().sum()) for n, x in own.items()) for y in (state, first))
    assert moved > 0
    return (gap / moved) ** 0.5


def last(context: RunContext) -> Factors:
    *_, (server, _) = ours.play(context)
    return context.method.deploy(server.state).slots[SHARED]


def test_the_peft_loop_is_fedit(context: Any) -> None:
    here = context()
    start = here.setup.fresh(2)
    loop, state = training.peft(here), peft_loop.as_state(start)
    for number in (1, 2):
        state, _ = loop.round(here.train, state, number)
    assert apart(state, last(here), start) < 1e-3


def test_the_accuracy_of_a_peer_is_that_of_ours(context: Any) -> None:
    here = context()
    loop = training.peft(here)
    assert loop.accuracy(peft_loop.as_state(last(here)), here.test) == pytest.approx(ours.accuracy(here))


@pytest.mark.parametrize("rounds", [1, 2], ids=["B", "B and A"])
def test_lora_a2_on_peft_is_lora_a2(context: Any, rounds: int) -> None:
    here = context({"method": {"name": "lora-a2", "global_rank": 4}, "clients": {"rank": 1}, "train": {"rounds": rounds}})
    start = here.setup.fresh(4)
    peer, state = lora_a2_peft.LoRAA2Loop(training.peft(here, rank=4), rank=1), peft_loop.as_state(start)
    for number in range(1, rounds + 1):
        state, _ = peer.round(here.train, state, number)
    assert apart(state, last(here), start) < 1e-3


def test_both_sides_count_the_same_work(context: Any) -> None:
    here = context()
    own, theirs = ours.side(here, rounds=1)(), training.peft_side(here)()
    assert (
        (own.examples, own.tokens)
        == (theirs.examples, theirs.tokens)
        == (90, sum(len(x) for d in here.train.values() for x in d.inputs))
    )


def test_what_flower_reads_is_what_we_have(context: Any, tmp_path: Path) -> None:
    here = context()
    job = flower_sim.describe(here, list(here.train.values()), tmp_path, sample=3)
    assert (job.clients, job.sample, job.files, job.num_labels, job.rank) == (4, 3, 4, 3, 2)
    for k, data in here.train.items():
        read = flower_sim._read(tmp_path / f"{k}.npz")
        assert [list(x) for x in read.inputs] == [list(x) for x in data.inputs]
        assert list(read.targets) == list(data.targets)


def test_gpu_bench_on_a_tiny_model() -> None:
    tiny = RobertaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=20,
        num_labels=3,
    )
    shape = gpu.Shape(clients=3, steps=2, batch=4, tokens=7)
    measured, setup = gpu.measure("cpu", tiny, shape, 1)
    assert len(setup.shapes) == 6
    for samples in measured.samples.values():
        assert [(s.examples, s.tokens) for s in samples] == [(24, 168)]


def test_gpu_bench_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with harness.console.capture() as said:
        gpu.main()
    assert "no GPU" in said.get()
