"""Law 8: clients trained together learn what each would learn alone.

Two rounds of every method on a small transformer, clients of uneven sizes, two local epochs. At every request that the clients'
procedures make, all of them are trained one by one, then together in several ways; the procedures go on from what was learned
alone, so that a choice of ranks cannot turn a last digit into another run.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from architectures import ARCHITECTURES
from cases import ROWS, Row
from laws import law, long_row

from fedlora.config import ModelConfig, TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models import packing, vision
from fedlora.models.slots import find_targets
from fedlora.runs.prepare import fresh_adapter
from fedlora.tasks.texts import encode
from fedlora.training import forward, replicas
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, Outcome
from fedlora.types import Client, Factors, Observe, Reply, Setup

SIZES = (1, 12, 9, 5)
ONE_A_METHOD = list({row.method: row for row in reversed(ROWS)}.values())
ALL = 10**6
SLOW = pytest.mark.slow
QUICK = {  # on images: one slot, a router, features, a gate by likeness
    ("mlp", "fedit"),
    ("mlp", "fedlease"),
    ("mlp", "ce-lora"),
    ("vit-tiny", "fedit"),
    ("vit-tiny", "feddpa"),
}
ON_IMAGES = [
    pytest.param(row, model, id=f"{row}, {model}", marks=() if (model, row.method) in QUICK else SLOW)
    for row in ONE_A_METHOD
    for model in ("mlp", "vit-tiny")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model("bert", tmp_path_factory.mktemp("bert"))


def make(folder: Path, dtype: torch.dtype, tasks: Sequence[str] = (), wanted: Any = "all-linear", **settings: Any) -> Trainer:
    pretrained = tiny.load_model(ModelConfig(source=str(folder)), tiny.CLASSES, seed=5)
    ranges = {task: range(i, i + 1) for i, task in enumerate(tasks[:-1])} | {task: range(len(tasks) - 1, 3) for task in tasks[-1:]}
    targets = find_targets(pretrained.model, wanted)
    train = TrainConfig(batch_size=8, epochs=2, **{"lr": 5e-3, **settings})
    return Trainer(pretrained, targets, train, torch.device("cpu"), dtype, tiny.objective(**(ranges or {})))


def dealt(pretrained: Any, row: Row) -> tuple[list[Client], dict[int, Encoded]]:
    """Four clients, their ranks from the row, and their examples; of a run of tasks each example has one of its client's."""
    names = sorted({task for own in row.tasks for task in own})
    clients, data = [], {}
    for k, (rank, size) in enumerate(zip(row.ranks, SIZES, strict=False)):
        texts, labels = tiny.examples(size * (4 if names else 1), 10 + k)
        tasks = np.array(
            [names.index(row.tasks[k % len(row.tasks)][i % len(row.tasks[k % len(row.tasks)])]) for i in range(len(texts))]
            if names
            else []
        )
        classes = np.array([tiny.CLASSES.index(label) for label in labels])
        classes = np.minimum(tasks, 2).astype(np.int64) if names else classes
        data[k] = replace(encode(pretrained, texts, classes, 64), domains=tasks.astype(np.int64))
        counts = {name: int((tasks == i).sum()) for i, name in enumerate(names) if (tasks == i).any()}
        clients.append(Client(k, rank, len(texts), counts))
    return clients, data


def make_setup(trainer: Trainer, clients: Sequence[Client], dtype: torch.dtype) -> Setup:
    def fresh(rank: int) -> Factors:
        f = fresh_adapter(trainer.shapes, 0, {rank: setup.scaling(rank)}, rank)
        return replace(f, A={m: x.to(dtype) for m, x in f.A.items()}, B={m: x.to(dtype) for m, x in f.B.items()})

    shared = {"rounds": 2, "epochs": 2, "seed": 0, "lora_alpha": 4.0, "rslora": False}
    base = lambda m: trainer.base_weight(m).to(dtype)  # noqa: E731
    setup = Setup(
        trainer.shapes, trainer.params, tuple(clients), **shared, fresh=fresh, base=base, transposed=trainer.transposed, dtype=dtype
    )
    return setup


def tensors(x: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a message, by path."""
    if isinstance(x, torch.Tensor):
        return {name: x}
    if isinstance(x, Mapping):
        return {k: v for key, part in x.items() for k, v in tensors(part, f"{name}.{key}").items()}
    if is_dataclass(x):
        return {k: v for f in fields(x) for k, v in tensors(getattr(x, f.name), f"{name}.{f.name}").items()}
    return {}


def together(trainer: Trainer, jobs: Sequence[Job], rows: int, backwards: bool = False) -> list[Outcome]:
    trainer.rows = rows
    queue = deque(reversed(jobs) if backwards else jobs)
    found = dict(trainer.train(queue))
    return [found[job] for job in jobs]


def in_threads(trainer: Trainer, jobs: Sequence[Job], rows: int) -> list[Outcome]:
    """Half of the clients of a step in a thread each, however uneven the halves are."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "EVEN", 2.0)
        torch.set_num_threads(2)
        try:
            return together(trainer, jobs, rows)
        finally:
            torch.set_num_threads(threads)


def assert_each_close(one: Sequence[Outcome], other: Sequence[Outcome], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        want, got = tensors(a), tensors(b)
        assert want.keys() == got.keys() and a.trained.num_steps == b.trained.num_steps
        for name, x in want.items():
            assert (x - got[name]).abs().max() <= tolerance * max(1.0, float(x.abs().max())), name
        assert b.trained.loss == pytest.approx(a.trained.loss, rel=max(tolerance, 1e-9))


def assert_close_over_the_whole_adapter(one: Sequence[Outcome], other: Sequence[Outcome], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        x, y = (torch.cat([t.double().flatten() for t in tensors(o).values()]) for o in (a, b))
        assert (x - y).norm() <= tolerance * x.norm()


def play(row: Row, folder: Path, dtype: torch.dtype, check: Any, **settings: Any) -> None:
    names = sorted({task for own in row.tasks for task in own})
    play_on(row, make(folder, dtype, names, **settings), *dealt(tiny.tokenizer(), row), check)


def play_on(row: Row, trainer: Trainer, clients: Sequence[Client], data: Mapping[int, Encoded], check: Any) -> None:
    setup = make_setup(trainer, clients, trainer.dtype)
    method = row.make()
    state = method.init(setup)
    held = {c.id: method.hold(setup, c) for c in clients}
    for t in (1, 2):
        runs = {c.id: method.local(method.send(state, c, t), held[c.id], c, t) for c in clients}
        asks: dict[int, Any] = {i: next(run) for i, run in runs.items()}
        replies: list[Reply] = []
        stage = 0
        while asks:
            stage += 1
            answers: dict[int, Any] = {}
            jobs = {i: Job(a, data[i], 100 * t + 10 * stage + i, {}) for i, a in asks.items() if not isinstance(a, Observe)}
            if jobs:
                alone = [tiny.train_one(trainer, job) for job in jobs.values()]
                check(trainer, list(jobs.values()), alone)
                answers = {i: outcome.trained for i, outcome in zip(jobs, alone, strict=True)}
            for i, a in asks.items():
                if isinstance(a, Observe):
                    answers[i] = trainer.observe(a, data[i], 7)
            asks = {}
            for i, answer in answers.items():
                try:
                    asks[i] = runs[i].send(answer)
                except StopIteration as end:
                    up, held[i] = end.value
                    replies.append(Reply(clients[i], up))
        state, _ = method.aggregate(state, iter(sorted(replies, key=lambda r: r.client.id)), t)


@long_row
@law(8)
def test_law_8_in_float64_together_is_alone(row: Row, folder: Path) -> None:
    def check(trainer: Trainer, jobs: list[Job], alone: list[Outcome]) -> None:
        assert_each_close(alone, together(trainer, jobs, ALL), 1e-9)
        assert_each_close(alone, together(trainer, jobs, 100, backwards=True), 1e-9)
        assert_each_close(alone, in_threads(trainer, jobs, ALL), 1e-9)

    play(row, folder, torch.float64, check)


@long_row
@law(8)
def test_law_8_in_float64_filled_up_to_few_sizes_is_as_it_is(row: Row, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As half precision is computed on a CPU: rows that nobody asked for, and copies of sequences, reach nobody."""

    def check(trainer: Trainer, jobs: list[Job], alone: list[Outcome]) -> None:
        with monkeypatch.context() as patch:
            for module in (packing, forward):
                patch.setattr(module, "by_size", lambda *args: True)
            assert_each_close(alone, together(trainer, jobs, ALL), 1e-9)
            assert_each_close(alone, together(trainer, jobs, 100, backwards=True), 1e-9)
            assert_each_close(alone, in_threads(trainer, jobs, ALL), 1e-9)

    play(row, folder, torch.float64, check)


@pytest.mark.parametrize("method", ["fedit", *(pytest.param(m, marks=SLOW) for m in ("fedlease", "lora-a2", "feddpa", "fl-tac"))])
@pytest.mark.parametrize("shape", ["DeBERTa's", "a pooler's", "a decoder's, whose padding ends its texts"])
def test_law_8_together_is_alone_on_odd_shapes(shape: str, method: str, tmp_path: Path) -> None:
    """Layers that see a table of positions, or one row a text; texts that end with the padding token."""
    row = next(row for row in ROWS if row.method == method)
    changes: dict[str, Any] = {}
    if shape == "DeBERTa's":
        folder = save(ARCHITECTURES["deberta-v2/shared"].config(), tmp_path)
    elif shape == "a pooler's":
        folder, changes = tiny.save_model("bert", tmp_path), {"wanted": ["query", "pooler.dense", "output.dense"]}
    else:
        config = tiny.config("llama")
        config.pad_token_id = config.eos_token_id = 3  # [SEP], with which the tokenizer ends each text
        folder = save(config, tmp_path)
    seen: list[bool] = []

    def check(trainer: Trainer, jobs: list[Job], alone: list[Outcome]) -> None:
        seen.append(trainer.forward.form.apart)
        assert_each_close(alone, together(trainer, jobs, ALL), 1e-9)
        assert_each_close(alone, together(trainer, jobs, 100, backwards=True), 1e-9)
        assert_each_close(alone, in_threads(trainer, jobs, ALL), 1e-9)

    play(row, folder, torch.float64, check, **changes)
    assert set(seen) == {"decoder" not in shape}


@pytest.mark.parametrize(("row", "model"), ON_IMAGES)
@law(8)
def test_law_8_together_is_alone_on_images(row: Row, model: str) -> None:
    names = sorted({task for own in row.tasks for task in own})
    pretrained = vision.load(ModelConfig(source=model), tiny.CLASSES, (1, 4, 4), 5, None)
    found = vision.try_model(pretrained.model, find_targets(pretrained.model, "all-linear"), (1, 4, 4))
    assert not found.form.apart and found.form.split
    ranges = {task: range(i, i + 1) for i, task in enumerate(names[:-1])} | {task: range(len(names) - 1, 3) for task in names[-1:]}
    settings = TrainConfig(batch_size=8, epochs=2, lr=5e-3)
    objective = tiny.objective(**(ranges or {}))
    trainer = Trainer(pretrained, found.targets, settings, torch.device("cpu"), torch.float64, objective, form=found.form)
    clients, texts = dealt(tiny.tokenizer(), row)
    rng = np.random.default_rng(0)

    def drawn(data: Encoded) -> Encoded:
        images = rng.standard_normal((len(data), 1, 4, 4)).astype(np.float32)
        return replace(data, inputs=tuple(images), sizes=np.full(len(data), found.limit))

    def check(trainer: Trainer, jobs: list[Job], alone: list[Outcome]) -> None:
        assert_each_close(alone, together(trainer, jobs, ALL), 1e-9)
        assert_each_close(alone, together(trainer, jobs, 20, backwards=True), 1e-9)
        assert_each_close(alone, in_threads(trainer, jobs, ALL), 1e-9)

    play_on(row, trainer, clients, {id: drawn(each) for id, each in texts.items()}, check)


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("row", ONE_A_METHOD, ids=str)
@law(8)
def test_law_8_in_float32_together_is_alone_up_to_rounding(row: Row, folder: Path) -> None:
    def check(trainer: Trainer, jobs: list[Job], alone: list[Outcome]) -> None:
        assert_close_over_the_whole_adapter(alone, together(trainer, jobs, ALL), 1e-4)

    play(row, folder, torch.float32, check, lr=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("row", ONE_A_METHOD, ids=str)
@law(8)
def test_law_8_in_float32_with_sgd_together_is_alone(row: Row, folder: Path) -> None:
    def check(trainer: Trainer, jobs: list[Job], alone: list[Outcome]) -> None:
        assert_each_close(alone, together(trainer, jobs, ALL), 1e-5)

    play(row, folder, torch.float32, check, lr=1e-2, optimizer="sgd")
