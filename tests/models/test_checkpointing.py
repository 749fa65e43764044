"""Gradient checkpointing changes memory, and nothing else."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models.load import Pretrained, from_config
from fedlora.models.slots import find_targets
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job
from fedlora.types import FULL, Factors, Router, Train

LORA = frozenset({("shared", "A"), ("shared", "B")})
SETTINGS = TrainConfig(batch_size=4, lr=1e-2, max_steps=3, rows=1000)


def trainer(kind: str, **settings: Any) -> Trainer:
    pretrained = from_config(tiny.config(kind), None, 3)
    pretrained.model.double()
    targets = find_targets(pretrained.model, "all-linear")
    train = SETTINGS.model_copy(update=settings)
    return Trainer(pretrained, targets, train, torch.device("cpu"), torch.float64, tiny.objective())


def data(seed: int, count: int = 8) -> Encoded:
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(4, 60, rng.integers(3, 12)).astype(np.int32) for _ in range(count))
    return Encoded(rows, rng.integers(0, 3, count), np.array([len(row) for row in rows]))


def adapter(shapes: dict[str, tuple[int, int]], seed: int, rank: int = 3) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=g, dtype=torch.float64) / 4 for m, (_, i) in shapes.items()}
    B = {m: torch.randn(o, rank, generator=g, dtype=torch.float64) / 4 for m, (o, _) in shapes.items()}
    return Factors(A, B, 2.0)


def trained(own: Trainer, ask: Callable[[Trainer, int], Train]) -> list[dict[str, Tensor]]:
    """Of three clients that share steps: the mean gradient, and what full fine-tuning changed."""
    head = own.head
    jobs = deque(Job(ask(own, i), data(i), i, head) for i in range(3))
    found = {}
    for job, outcome in own.train(jobs):
        grads = {f"{role} {name}": x for role, each in outcome.trained.grad.items() for name, x in each.items()}
        found[job.seed] = grads | {f"full {n}": x for n, x in outcome.trained.full.items()} | dict(outcome.head)
    return [found[i] for i in range(3)]


def plain(own: Trainer, i: int) -> Train:
    return Train({"shared": adapter(own.shapes, i)}, LORA, want_grad=True)


def gated(own: Trainer, i: int) -> Train:
    slots = {"one": adapter(own.shapes, i), "two": adapter(own.shapes, i + 10)}
    g = torch.Generator().manual_seed(i)
    router = Router({m: torch.randn(3, d, generator=g) for m, (_, d) in own.shapes.items()}, "one", ("two",))
    return Train(slots, frozenset({("one", "A"), ("one", "B"), ("gate", "G")}), gate=router, want_grad=True)


def full(own: Trainer, i: int) -> Train:
    return Train({}, FULL, want_grad=True)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("ask", [plain, full, gated], ids=["plain", "full", "gated"])
def test_gradients_and_results_are_those_without_it(kind: str, ask: Callable[[Trainer, int], Train]) -> None:
    ours, theirs = (trained(trainer(kind, checkpointing=on), ask) for on in (True, False))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() and any(key.startswith(("(", "full")) for key in mine)
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], atol=1e-12, rtol=1e-9)
            assert other[key].abs().max() > 0 or "score" in key


@pytest.mark.parametrize("kind", ["zamba", "zamba2"])
def test_of_blocks_within_blocks_the_outer_ones_are_computed_again(kind: str) -> None:
    """Recomputed by itself, an inner one would find what the outer one has kept in another order."""
    found = {}
    for on in (True, False):
        pretrained = from_config(ARCHITECTURES[kind].config(), None, 3)
        own = Trainer(
            pretrained,
            find_targets(pretrained.model, "all-linear"),
            SETTINGS.model_copy(update={"checkpointing": on}),
            torch.device("cpu"),
            torch.float32,
            tiny.objective(),
        )
        nested = [m for m in own.base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert len({inner for m in nested for inner in m.modules() if inner is not m}.intersection(nested)) > 0
        start = {m: adapter(own.shapes, 7).A[m].float() for m in own.shapes}
        slot = Factors(start, {m: adapter(own.shapes, 7).B[m].float() for m in own.shapes}, 2.0)
        found[on] = tiny.train_one(own, Job(Train({"shared": slot}, LORA, want_grad=True), data(3), 3, own.head)).trained.grad
    for role, own_role in found[False].items():
        for name, x in own_role.items():
            torch.testing.assert_close(found[True][role][name], x, atol=1e-5 * float(x.abs().max()) + 1e-9, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_what_is_kept_for_the_backward_pass_is_what_enters_the_blocks(kind: str) -> None:
    """Bytes of the tensors that are saved while a step goes forward, each storage once, but for the model's own: a block keeps
    what enters it, which is a small part of what it would keep else."""
    kept = {}
    for on in (True, False):
        own = trainer(kind, checkpointing=on)
        mine = {p.untyped_storage().data_ptr() for p in own.base.model.parameters()}
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved, mine: set[int] = mine) -> Tensor:
            if x.untyped_storage().data_ptr() not in mine:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            forward = own._step
            learner = own._begin(Job(plain(own, 0), data(0, 64), 0, {}))
            learner.where = np.arange(64)
            forward([learner])
        kept[on] = sum(saved.values())
    assert kept[True] < kept[False] / 3


def test_blocks_are_in_training_mode_while_a_step_goes_forward_and_nothing_else_ever_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some blocks (OPT's) do their own dropout by their own mode."""
    own = trainer("llama", checkpointing=True)
    inside: list[bool] = []
    block = own.base.model.model.layers[0]
    plain_attention = block.self_attn.forward

    def attention(*args: Any, **kwargs: Any) -> Any:
        inside.extend(module.training for module in own.base.model.modules())
        return plain_attention(*args, **kwargs)

    block.self_attn.forward = attention
    assert sum(getattr(m, "gradient_checkpointing", False) is True for m in own.base.model.model.layers) == 2
    trained(own, plain)
    others = len(list(own.base.model.modules()))
    for start in range(0, len(inside), others):  # the block that works is not, and of the rest only the other block
        assert sum(inside[start : start + others]) in (0, 1)
    assert not any(module.training for module in own.base.model.modules())


def test_a_model_whose_blocks_transformers_cannot_checkpoint_is_refused() -> None:
    class Plain(transformers.PreTrainedModel):
        config_class, base_model_prefix = transformers.BertConfig, "body"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.body = nn.ModuleList([nn.Linear(4, 4)])
            self.head = nn.Linear(4, 3)

    model = Plain(tiny.config("bert"))
    with pytest.raises(BadInput, match=r"train\.checkpointing = true: transformers cannot checkpoint Plain; leave it out"):
        Trainer(
            Pretrained(model, None, ""),
            ["body.0"],
            SETTINGS.model_copy(update={"checkpointing": True}),
            torch.device("meta"),
            torch.float32,
            tiny.objective(),
        )
