"""The LoRA-A² paper's column of communicated parameters, from one client's real message on RoBERTa-base's shape.

30 clients, 50 rounds; expected numbers are the paper's Table 1 (uploads), with 0.995 for its misprinted 0.991.
"""

from typing import Any

import pytest
import torch
import transformers

from fedlora import methods, wire
from fedlora.check import refuse
from fedlora.models.slots import find_targets, layer_shape
from fedlora.runs.prepare import fresh_adapter
from fedlora.types import BASE, Client, Setup, Train, Trained


@pytest.fixture(scope="module")
def roberta() -> Any:
    with torch.device("meta"):
        config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        return transformers.RobertaForSequenceClassification(config)


def setup_of(model: Any, rank: int) -> Setup:
    shapes = {m: layer_shape(model.get_submodule(m)) for m in find_targets(model, "all-linear")}
    params = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("roberta.")}
    clients = tuple(Client(i, rank, 333) for i in range(30))
    scaling = {r: 16 / r for r in range(1, 33)}
    return Setup(
        shapes, params, clients, 50, 5, 0, 16.0, False, lambda r: fresh_adapter(shapes, 0, scaling, r), lambda m: torch.zeros(0)
    )


def fake_training(ask: Train, setup: Setup, seed: int) -> Trained:
    """What training would return: every trained entry moved a little, at random."""
    g = torch.Generator().manual_seed(seed)
    slots = dict(ask.slots)
    for slot, role in ask.roles:
        if slot == BASE:
            return Trained({}, 0.0, 1, full={n: torch.zeros(()).expand(shape) for n, shape in setup.params.items()})
        from dataclasses import replace

        moved = {m: x + 1e-3 * torch.randn(x.shape, generator=g) for m, x in getattr(slots[slot], role).items()}
        slots[slot] = replace(slots[slot], **{role: moved})
    return Trained(slots, 0.0, 1)


def uploads(name: str, model: Any, rank: int) -> list[int]:
    """Parameters that one client sends in two rounds, an odd and an even one."""
    setup = setup_of(model, rank)
    method = methods.make(name, {})
    state, client, counts = method.init(setup), setup.clients[0], []
    held = method.hold(setup, client)
    from fedlora.types import Reply

    for round in (1, 2):
        local = method.local(method.send(state, client, round), held, client, round)
        ask = next(local)
        try:
            while True:
                ask = local.send(fake_training(ask, setup, round))
        except StopIteration as end:
            up, held = end.value
        assert name == "fedavg" or refuse(up, method, setup, client) is None
        counts.append(wire.measure(up).numbers)
        if name != "fedavg":
            state, _ = method.aggregate(state, iter([Reply(client, up)]), round)
    return counts


def billions(counts: list[int]) -> float:
    return sum(counts) / 2 * 30 * 50 / 1e9


PAPER = [("fedit", 8, 1.99), ("flexlora", 8, 1.99), ("fedit", 1, 0.249), ("ffa-lora", 8, 0.995), ("ffa-lora", 1, 0.124)]


@pytest.mark.parametrize(("name", "rank", "paper"), PAPER)
def test_lora_uploads(name: str, rank: int, paper: float, roberta: Any) -> None:
    assert billions(uploads(name, roberta, rank)) == pytest.approx(paper, rel=5e-3)


def test_full_fine_tuning_uploads(roberta: Any) -> None:
    counts = uploads("fedavg", roberta, 8)
    assert counts == [124_055_040] * 2  # the encoder without pooler and head
    assert billions(counts) == pytest.approx(186, rel=5e-3)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_lora_a2_uploads_lie_within_their_bounds(rank: int, roberta: Any) -> None:
    """card(R_k) = r N vectors: at least 768 long each; at most the 3072-long ones (16 ranks of 12 modules) first."""
    chosen = rank * 72
    most = 3072 * min(chosen, 16 * 12) + 768 * max(0, chosen - 16 * 12)
    for count in uploads("lora-a2", roberta, rank):
        assert 768 * chosen <= count <= most
