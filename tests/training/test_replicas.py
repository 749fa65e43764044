"""Clients of a step in threads of their own."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.load import from_config
from fedlora.models.slots import find_targets
from fedlora.training.batched import Trainer, rows_of_step
from fedlora.training.learner import Job, Outcome
from fedlora.training.replicas import Replicas, spread
from fedlora.types import BaseUpdate, Factors, Train

AB = frozenset({("shared", "A"), ("shared", "B")})


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("sizes", "threads", "groups"),
    [
        ([4, 3, 2, 1], 2, [[0, 3], [1, 2]]),  # 5 and 5
        ([1, 2, 3, 4], 2, [[0, 3], [1, 2]]),
        ([10, 1], 2, [[0, 1]]),  # the second thread would wait for the first
        ([57, 43], 2, [[0], [1]]),  # 1.14 of its share
        ([58, 42], 2, [[0, 1]]),  # 1.16
        ([5, 5], 4, [[0], [1]]),  # two threads each
        ([5, 5], 3, [[0, 1]]),  # no even share of the threads
        ([5, 5, 5], 3, [[0], [1], [2]]),
        ([5, 5, 5], 4, [[0, 1, 2]]),  # two groups would be 10 and 5, three have no even share
        ([7], 8, [[0]]),
        ([3, 3], 1, [[0, 1]]),
    ],
)
def test_who_shares_a_thread(sizes: list[int], threads: int, groups: list[list[int]]) -> None:
    assert spread(sizes, threads) == groups


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 64))
def test_everybody_is_in_one_group_and_no_group_is_much_above_its_share(sizes: list[int], threads: int) -> None:
    groups = spread(sizes, threads)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert threads % len(groups) == 0 or len(groups) == 1
    assert max(sum(sizes[i] for i in group) for group in groups) * len(groups) <= 1.15 * sum(sizes)


def test_parts_run_at_the_same_time_each_with_its_share_of_the_threads_and_in_a_place_of_its_own(two_threads: None) -> None:
    made = iter(["second"])
    replicas = Replicas("first", lambda: next(made))
    assert replicas.spread([5, 7]) == [[0, 1]] and replicas.spread([6, 7]) == [[1], [0]]
    meet = threading.Barrier(2, timeout=60)  # neither goes on before the other is there
    for _ in range(3):

        def work(place: str, part: int) -> tuple[str, int, int]:
            meet.wait()
            return place, part, torch.get_num_threads()

        assert replicas.run(work, [5, 7]) == [("first", 5, 1), ("second", 7, 1)]
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), other) == (2, [2])
    here = replicas.run(lambda place, part: (place, part, torch.get_num_threads(), threading.current_thread()), [9])
    assert here == [("first", 9, 2, threading.main_thread())]


def test_what_fails_in_a_replica_fails_here_once_all_have_ended(two_threads: None) -> None:
    ended: list[int] = []

    def work(place: int, part: int) -> None:
        if part == 0:
            raise ValueError("of a replica")
        threading.Event().wait(0.2)
        ended.append(part)

    with pytest.raises(ValueError, match="of a replica"):
        replicas = Replicas(0, lambda: 1)
        replicas.run(work, [i for (i,) in replicas.spread([1, 1])])
    assert ended == [1] and torch.get_num_threads() == 2


# ---- a trainer ---------------------------------------------------------------------------------------------------------------


def trainer(change: Callable[[Any], None] = lambda model: None, **settings: object) -> Trainer:
    pretrained = from_config(tiny.config("bert"), None, 3)
    pretrained.model.double()
    change(pretrained.model)
    train = TrainConfig(batch_size=4, lr=5e-3, epochs=2).model_copy(update=settings)
    targets = find_targets(pretrained.model, "all-linear")
    return Trainer(pretrained, targets, train, torch.device("cpu"), torch.float64, tiny.objective())


def data(seed: int, count: int = 8) -> Encoded:
    rng = np.random.default_rng(seed)
    rows = tuple(rng.integers(4, 60, 7).astype(np.int32) for _ in range(count))
    return Encoded(rows, rng.integers(0, 3, count), np.full(count, 7))


def adapter(own: Trainer, seed: int, rank: int = 3) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, i, generator=g, dtype=torch.float64) / 4 for m, (_, i) in own.shapes.items()}
    B = {m: torch.randn(o, rank, generator=g, dtype=torch.float64) / 4 for m, (o, _) in own.shapes.items()}
    return Factors(A, B, 2.0)


def trained(own: Trainer, ask: Train, at_once: bool) -> list[Outcome]:
    jobs = [Job(ask, data(i), i, own.head) for i in range(4)]
    if not at_once:
        return [tiny.train_one(own, job) for job in jobs]
    found = dict(own.train(deque(jobs)))
    return [found[job] for job in jobs]


def tensors(outcome: Outcome) -> dict[str, torch.Tensor]:
    slot = outcome.trained.slots["shared"]
    return {f"A {m}": x for m, x in slot.A.items()} | {f"B {m}": x for m, x in slot.B.items()} | dict(outcome.head)


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"micro_tokens": 56}], ids=["plain", "checkpointing", "micro"])
def test_clients_in_two_threads_learn_what_they_learn_alone(
    settings: dict[str, object], two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head of their own, and also once something has been merged into the base: the threads share its weights."""
    own = trainer(**settings)
    seen: set[str] = set()
    losses = type(own.objective).losses

    def watched(*args: object) -> torch.Tensor:
        seen.add(threading.current_thread().name)
        return losses(*args)

    monkeypatch.setattr(type(own.objective), "losses", watched)
    g = torch.Generator().manual_seed(1)
    merged = Factors(
        {m: torch.randn(2, i, generator=g) / 4 for m, (_, i) in own.shapes.items()},
        {m: torch.randn(o, 2, generator=g) / 4 for m, (o, _) in own.shapes.items()},
        1.0,
    )
    before: list[dict[str, torch.Tensor]] = []
    for base in (BaseUpdate(0, 0), BaseUpdate(0, 1, (merged,))):
        ask = Train({"shared": adapter(own, 5)}, AB, base=base)
        seen.clear()
        alone = list(map(tensors, trained(own, ask, at_once=False)))
        assert seen == {"MainThread"}
        seen.clear()
        together = list(map(tensors, trained(own, ask, at_once=True)))
        assert len(seen - {"MainThread"}) == 2
        again = list(map(tensors, trained(own, ask, at_once=True)))
        for one, two, three in zip(alone, together, again, strict=True):
            for name, x in one.items():
                torch.testing.assert_close(two[name], x, atol=1e-12, rtol=1e-9)
                assert torch.equal(two[name], three[name])
        assert not before or not torch.equal(before[0]["B " + next(iter(own.shapes))], alone[0]["B " + next(iter(own.shapes))])
        before = alone


def test_where_there_is_no_other_place_all_share_the_one_there_is(two_threads: None) -> None:
    asked: list[int] = []
    replicas = Replicas(0, lambda: asked.append(1))
    assert [replicas.spread([6, 6]) for _ in range(3)] == [[[0, 1]]] * 3 and asked == [1]


def closure(model: Any) -> None:
    """A hook that calls a layer by a closure, which is not copied."""
    attention = model.bert.encoder.layer[0].attention.self
    attention.key.register_forward_hook(lambda module, args, out, query=attention.query: out + 0.1 * query(args[0]))


def no_leaf(model: Any) -> None:
    model.bert.cached = model.classifier.weight.requires_grad_() * 2


def lock(model: Any) -> None:
    model.bert.lock = threading.Lock()


@pytest.mark.parametrize("change", [closure, no_leaf, lock])
def test_a_model_that_can_have_no_replica_trains_its_clients_together(change: Any, two_threads: None) -> None:
    own = trainer(optimizer="sgd", change=change)
    adapted = own.base.adapted
    before = [module.__dict__["forward"] for module in adapted.modules.values()]
    assert own.forward.replica() is None
    ask = Train({"shared": adapter(own, 5)}, AB)
    for one, two in zip(trained(own, ask, at_once=False), trained(own, ask, at_once=True), strict=True):
        for name, x in tensors(one).items():
            torch.testing.assert_close(tensors(two)[name], x, atol=1e-12, rtol=1e-9)
    assert [module.__dict__["forward"].args for module in adapted.modules.values()] == [each.args for each in before]
    assert not any("forward" in module.__dict__ for module in own.base.model.modules() if module not in adapted.modules.values())


def test_the_threads_share_the_models_parameters_and_nothing_that_a_pass_changes(two_threads: None) -> None:
    """A second model in memory would be a second model too much."""
    own = trainer()
    replica = own.forward.replica()
    assert replica is not None
    assert not {*own.base.model.modules()} & {*replica.adapted.model.modules()}
    buffers = zip(own.base.model.buffers(), replica.adapted.model.buffers(), strict=True)
    assert all(a is not b and torch.equal(a, b) for a, b in buffers)
    mine, other = dict(own.base.model.named_parameters()), dict(replica.adapted.model.named_parameters())
    assert mine.keys() == other.keys() and all(mine[name] is other[name] for name in mine)
    assert replica.adapted.model is not own.base.model
    assert all("forward" in module.__dict__ for module in own.base.adapted.modules.values())


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (transformers.BertConfig(hidden_size=384, num_hidden_layers=6), 4096),  # MiniLM, 2,304 numbers a token
        (transformers.BertConfig(), 4096),  # 9,216
        (transformers.DistilBertConfig(), 4096),  # 4,608, by other names
        (transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16), 2048),  # 24,576
        (transformers.AlbertConfig(), 2048),  # one layer, twelve times: 49,152
        (transformers.ViTConfig(), 4096),
        (transformers.ResNetConfig(), 2048),  # does not say
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "to_dict") else str(x),
)
def test_a_step_of_a_wide_model_has_fewer_tokens_unless_the_run_says(config: Any, rows: int) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert rows_of_step(model, torch.device("cpu")) == rows
    assert rows_of_step(model, torch.device("cuda")) == 32768
    assert trainer(rows=77).rows == 77
