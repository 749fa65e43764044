"""Clients of a step in threads of their own."""

import threading
from collections import deque

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
from fedlora.training.lanes import Lanes, spread
from fedlora.training.learner import Job, Outcome
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
    lanes = Lanes("first", lambda: next(made))
    meet = threading.Barrier(2, timeout=60)  # neither goes on before the other is there
    for _ in range(3):

        def work(place: str, part: int) -> tuple[str, int, int]:
            meet.wait()
            return place, part, torch.get_num_threads()

        assert lanes.run(work, [5, 7]) == [("first", 5, 1), ("second", 7, 1)]
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), other) == (2, [2])
    here = lanes.run(lambda place, part: (place, part, torch.get_num_threads(), threading.current_thread()), [9])
    assert here == [("first", 9, 2, threading.main_thread())]


def test_what_fails_in_a_lane_fails_here_once_all_have_ended(two_threads: None) -> None:
    ended: list[int] = []

    def work(place: int, part: int) -> None:
        if part == 0:
            raise ValueError("of a lane")
        threading.Event().wait(0.2)
        ended.append(part)

    with pytest.raises(ValueError, match="of a lane"):
        Lanes(0, lambda: 1).run(work, [0, 1])
    assert ended == [1] and torch.get_num_threads() == 2


# ---- a trainer ---------------------------------------------------------------------------------------------------------------


def trainer(**settings: object) -> Trainer:
    pretrained = from_config(tiny.config("bert"), None, 3)
    pretrained.model.double()
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


def test_the_threads_share_the_models_parameters(two_threads: None) -> None:
    """A second model in memory would be a second model too much."""
    own = trainer()
    twin = own.forward.twin()
    mine, other = dict(own.base.model.named_parameters()), dict(twin.adapted.model.named_parameters())
    assert mine.keys() == other.keys() and all(mine[name] is other[name] for name in mine)
    assert twin.adapted.model is not own.base.model
    assert all("forward" in module.__dict__ for module in own.base.adapted.modules.values())


@pytest.mark.parametrize(
    ("hidden", "layers", "wide", "rows"),
    [(384, 6, 42_240, 4096), (768, 12, 167_424, 4096), (1024, 24, 444_416, 2048)],  # MiniLM, BERT-base and BERT-large
)
def test_a_step_of_a_model_of_many_numbers_has_fewer_tokens_unless_the_run_says(
    hidden: int, layers: int, wide: int, rows: int
) -> None:
    """Four layers hidden to hidden, one to four times as many, one back; and the pooler's."""
    assert layers * (4 * 2 * hidden + 2 * 5 * hidden) + 2 * hidden == wide
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden, num_attention_heads=4
    )
    with torch.device("meta"):
        model = transformers.BertModel(config)
    assert rows_of_step(model, torch.device("cpu")) == rows
    assert rows_of_step(model, torch.device("cuda")) == 32768
    assert trainer(rows=77).rows == 77
