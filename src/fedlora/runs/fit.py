"""Whether a run fits into memory, found out before it trains: the estimate of `models.memory` for a run's clients and examples."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from fedlora.clients.worker import WAVE_BYTES
from fedlora.config import Config
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models import memory
from fedlora.models.heads import text_config
from fedlora.models.likelihood import at_once, words
from fedlora.models.memory import SURE, Part, Room, in_words
from fedlora.models.quiet import quiet
from fedlora.server.sampling import sampler
from fedlora.tasks.base import Task
from fedlora.training.batched import Trainer
from fedlora.training.learner import rows_of
from fedlora.training.precision import dtype_of, pick_device
from fedlora.types import FULL, Factors, Method, Setup, Train

SMALL = 0.25  # what is at most so much of what there is need not be counted


def refuse_base(config: Config, task: Task, schema: Schema, there: Room) -> None:
    """BadInput where the model alone is more than there is, before it is loaded."""
    device = pick_device(config.device)
    parts: list[Part] = []
    with suppress(Exception):  # what is wrong with a model, whoever loads it says
        outline = task.outline(config.model, schema)
        parts = list(memory.base_parts(list(outline.model.parameters()), device.type, dtype_of(config)))
    refuse(config, parts, there, device.type)


def refuse(config: Config, parts: Sequence[Part], there: Room, device: str) -> None:
    """BadInput where a run does not fit: what is sure is more than there is, or all together is more by far."""
    for computing, room in ((True, there.computing), (False, there.main)):
        whole = [part for part in parts if part.computing == computing]
        sure = [part for part in whole if part.sure]
        if room is None or (_sum(sure) <= room and _sum(whole) <= SURE * room):
            continue
        own, least = (sure, "at least") if _sum(sure) > room else (whole, "about")
        where = "main memory" if device == "cpu" or not computing else "the GPU's memory"
        largest = sorted((part for part in own if part.size), key=lambda part: -part.size)[:3]
        listed = ", ".join(f"{part.name} {in_words(part.size)}" for part in largest)
        raise BadInput(
            f"this run needs {least} {in_words(_sum(own))} of {where}, and {in_words(room)} are free ({listed}); "
            f"possible: {', '.join(_advice(config, own is sure))}"
        )


def _sum(parts: Sequence[Part]) -> int:
    return sum(part.size for part in parts)


def _advice(config: Config, base: bool) -> Iterator[str]:
    """What makes a run smaller: one whose base or adapters are too large, or one whose steps are."""
    if base:
        yield from ("a smaller model", "a smaller clients.rank")
        if config.precision != "bf16":
            yield 'precision = "bf16" for a model that is stored so'
        return
    yield f"train.batch_size below {config.train.batch_size}"
    yield "a smaller train.rows"
    yield f"data.max_length below {config.data.max_length}"
    if not config.train.checkpointing:
        yield "train.checkpointing = true"


def estimate(
    config: Config, method: Method, setup: Setup, trainer: Trainer, train: Encoded, whole: Sequence[int], exact: bool
) -> list[Part]:
    """What a run's training takes.

    Args:
        train: the training examples.
        whole: the numbers of examples of those who take part in a round.
        exact: count what a step keeps; otherwise only take a bound of it.
    """
    base, dtype, device = trainer.base, trainer.dtype, trainer.device.type
    asks = method.FACTS.asks
    sides = sum(map(sum, setup.shapes.values()))
    rank = max(client.rank for client in setup.clients)
    everything = sum(int(np.prod(shape)) for shape in setup.params.values())
    trained = everything if "full" in asks else rank * sides
    held = 0 if "full" in asks else trained * (2 if "slots" in asks else 1)
    size = min(config.train.batch_size, max(whole))
    batch = _typical(train, size)
    tokens = max(1, batch.tokens)
    together = min(len(whole), -(-trainer.rows // rows_of(tokens, trained))) if "full" not in asks else 1
    under_way = max(together, min(len(whole), WAVE_BYTES // max(1, 4 * trained) + 1))
    merged = sum(o * i for o, i in setup.shapes.values()) if "base" in asks else 0
    parts = list(memory.base_parts(list(base.pretrained.values()), device, dtype, merged))
    parts += memory.adapter_parts(trained, held, together, under_way, config.train.optimizer, dtype, device)
    kept, found = _most_kept(base.model, setup, tokens * together, int(batch.sizes.max()), dtype), "activations at most"
    if exact:
        kept, found = 0, "activations not known"
        ask = Train({}, FULL) if "full" in asks else Train({"": _shapes(setup, rank)}, frozenset({("", "A"), ("", "B")}))
        with suppress(Exception), quiet():  # a model that will not run without values
            model = _without_values(base.model)
            clients = [batch.inputs] * together
            kept = memory.kept(model, list(setup.shapes), trainer.forward.form, ask, clients, dtype, config.train.checkpointing)
            found = "activations"
    parts.append(Part(found, kept, sure=False))
    if trainer.forward.form.tokens:
        parts.append(Part("head", memory.head_bytes(words(base.model), at_once(base.model, device), dtype), sure=False))
    parts.append(Part("work", memory.work(setup.shapes, tokens * together, dtype), sure=False))
    return parts


def _typical(train: Encoded, count: int) -> Encoded:
    """So many examples, from the shortest to the longest, evenly."""
    order = np.argsort(train.sizes, kind="stable")
    return train.take(order[np.linspace(0, len(order) - 1, count).round().astype(int)])


def _shapes(setup: Setup, rank: int) -> Factors:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    A, B = ({m: empty(rank, i) for m, (_, i) in setup.shapes.items()}, {m: empty(o, rank) for m, (o, _) in setup.shapes.items()})
    return Factors(A, B, 1.0)


def _without_values(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _most_kept(model: Any, setup: Setup, tokens: int, longest: int, dtype: torch.dtype) -> int:
    config = text_config(model)
    heads, layers = (int(getattr(config, key, None) or 1) for key in ("num_attention_heads", "num_hidden_layers"))
    return memory.most_kept(setup.shapes, heads, layers, tokens, longest, dtype)


def check(config: Config, method: Method, setup: Setup, trainer: Trainer, train: Encoded, there: Room) -> None:
    """BadInput where a run does not fit into what was free before its model was loaded. What a step keeps is counted only where a
    bound of it does not settle the question."""
    present = sampler(setup.clients, setup.seed, config.clients.sample)(1)
    sizes = [client.num_examples for client in present]
    if not sizes:
        return
    device = trainer.device.type
    parts = estimate(config, method, setup, trainer, train, sizes, exact=False)
    free = [room for room in (there.computing, there.main) if room is not None]
    if free and _sum(parts) > SMALL * min(free):
        parts = estimate(config, method, setup, trainer, train, sizes, exact=True)
    refuse(config, parts, there, device)


def table(config: Config, method: Method, setup: Setup, trainer: Trainer, train: Encoded) -> list[tuple[str, str]]:
    """The estimate for people: what, and how much."""
    present = sampler(setup.clients, setup.seed, config.clients.sample)(1)
    parts = estimate(config, method, setup, trainer, train, [client.num_examples for client in present], exact=True)
    total = ("together", in_words(_sum(parts)))
    return [*((part.name, in_words(part.size)) for part in parts), total]
