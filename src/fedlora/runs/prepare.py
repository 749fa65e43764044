"""From a configuration to everything a run needs: method, clients, data, model. Also the parts that a finished run needs again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from fedlora import methods, seeds
from fedlora.algebra.tensors import flat
from fedlora.config import Config, HeadMode
from fedlora.data.dataset import Dataset, Domain, Split
from fedlora.data.domains import deal
from fedlora.data.load import load as load_data
from fedlora.errors import BadInput, some
from fedlora.listener import Listener
from fedlora.models.load import Pretrained
from fedlora.models.load import load as load_model
from fedlora.models.peft import held_by_peft, rehearse
from fedlora.models.quiet import uncollected
from fedlora.models.slots import find_targets
from fedlora.models.trial import Findings, try_model
from fedlora.runs.context import RunContext
from fedlora.runs.packages import require
from fedlora.runs.roster import Roster, make_clients, make_held_out
from fedlora.training.batched import Trainer
from fedlora.training.encode import Encoded, encode
from fedlora.training.precision import pick_device, pick_dtype
from fedlora.transforms import pipeline
from fedlora.types import Client, Factors, Method, Setup


def fresh_adapter(shapes: Mapping[str, tuple[int, int]], seed: int, scaling: Mapping[int, float], rank: int) -> Factors:
    """The starting adapter (Hu et al. 2021): A uniform in +-1/sqrt(d_in), which is Kaiming's with a = sqrt(5); B zero."""
    A = {
        m: seeds.generator(seed, "fresh", m).uniform(-(d**-0.5), d**-0.5, (rank, d)).astype(np.float32)
        for m, (_, d) in shapes.items()
    }
    B = {m: torch.zeros(o, rank) for m, (o, _) in shapes.items()}
    return Factors(flat({m: torch.from_numpy(a) for m, a in A.items()}), flat(B), scaling[rank])


def require_validation(config: Config, dataset: Dataset) -> None:
    """BadInput where the run shall stop by a validation part that there is not."""
    if config.train.patience is not None and dataset.validation is None:
        raise BadInput(
            f"train.patience = {config.train.patience} needs a validation part: data.validation = 0.1 holds one out of the "
            "training examples, or the data set has a file of its own for it"
        )


def make_setup(config: Config, trainer: Trainer, clients: Sequence[Client]) -> Setup:
    """What the seed and the run give everybody."""

    @cache
    def fresh(rank: int) -> Factors:
        return fresh_adapter(trainer.shapes, config.seed, {rank: setup.scaling(rank)}, rank)

    smallest, module = min((min(shape), m) for m, shape in trainer.shapes.items())
    largest = max(clients, key=lambda c: c.rank)
    if largest.rank > smallest:
        raise BadInput(f"clients.rank: {largest.rank} is above {smallest}, the smaller side of {module} {trainer.shapes[module]}")
    setup = Setup(
        shapes=trainer.shapes,
        params=trainer.params,
        clients=tuple(clients),
        rounds=config.train.rounds,
        epochs=config.train.epochs,
        seed=config.seed,
        lora_alpha=config.model.lora_alpha,
        rslora=config.model.rslora,
        fresh=fresh,
        base=trainer.base_weight,
        transposed=trainer.transposed,
    )
    return setup


def make_method(config: Config) -> Method:
    """The configured method."""
    return methods.make(config.method.name, config.method.settings)


def has_own_models(config: Config) -> bool:
    """Whether clients end with models of their own, so that each is scored on its own test part, and no common one is."""
    personal: bool = methods.find(config.method.name).FACTS.personal
    return personal or config.model.head is HeadMode.PERSONAL


def load_pretrained(config: Config, roster: Roster) -> Pretrained:
    """The configured model with the data's classes."""
    return load_model(config.model, roster.label_names, config.seed)


def try_pretrained(config: Config, pretrained: Pretrained) -> Findings:
    """How the configured model is run, on the configured device; `models.trial` says what is tried."""
    targets = find_targets(pretrained.model, config.model.target_modules)
    tokenizer = pretrained.tokenizer
    limit, known = config.data.max_length, dict[str, Any]()
    if tokenizer is not None:
        limit = min(limit, tokenizer.model_max_length)
        known = {"words": len(tokenizer), "specials": tokenizer.all_special_ids}
        known["fewest"] = max(1, tokenizer.num_special_tokens_to_add())
    device = pick_device(config.device)
    pretrained.model.to(device)
    findings = try_model(pretrained.model, targets, limit, **known)
    pretrained.model.to("cpu")
    if limit < config.data.max_length:
        cut = f"data.max_length = {config.data.max_length} is above the {limit} tokens that the tokenizer allows; using {limit}"
        findings = replace(findings, notes=(cut, *findings.notes))
    return replace(findings, notes=(*pretrained.notes, *findings.notes))


def rehearsed(config: Config, pretrained: Pretrained, findings: Findings) -> Findings:
    """The findings after a rehearsal of the adapter's way through PEFT. Of "all-linear", what PEFT cannot hold is left out.

    Raises:
        BadInput: PEFT cannot hold an adapter on the layers that were asked for.
    """
    if config.model.target_modules != "all-linear":
        rehearse(pretrained, findings.targets, findings.form)
        return findings
    held = held_by_peft(pretrained, findings.targets, findings.form)
    if len(held) == len(findings.targets):
        return findings
    lost = [m for m in findings.targets if m not in held]
    note = f"PEFT cannot hold an adapter on {some(lost)}, so there is none"
    return replace(findings, targets=tuple(held), notes=(*findings.notes, note))


def make_trainer(config: Config, pretrained: Pretrained, findings: Findings, tasks: Sequence[Domain] = ()) -> Trainer:
    """The trainer on the configured device and in the configured precision."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    ranges = {task.name: range(task.first, task.first + task.count) for task in tasks}
    return Trainer(pretrained, findings.targets, config.train, device, dtype, ranges, form=findings.form)


def versions() -> dict[str, Any]:
    """The versions that numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("fedlora", "torch", "transformers", "peft", "numpy")}


@uncollected()
def prepare(config: Config, listener: Listener) -> RunContext:
    """Load data and model, deal the data to the clients. Checks everything that can be wrong before training starts."""
    require(config)
    method = make_method(config)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    listener.stage(f"reading {config.data.title}")
    dataset = load_data(config.data, config.seed)
    for note in dataset.notes:
        listener.note(note)
    require_validation(config, dataset)
    parts = deal(dataset, config.data, config.clients, config.seed)
    clients = make_clients(config.clients, dataset, parts)
    aside = make_held_out(config.clients, parts)
    num_test = tuple(len(where) for where in parts.test[: len(clients)])
    names = parts.names[: len(clients)]
    roster = Roster(dataset.label_names, clients, names, num_test, dataset.domains, data=dataset.digest, held_out=aside)
    listener.stage(f"loading {config.model.source}")
    pretrained = load_pretrained(config, roster)
    listener.stage("trying the model")
    findings = rehearsed(config, pretrained, try_pretrained(config, pretrained))
    for note in findings.notes:
        listener.note(note)
    listener.stage("tokenising")

    def encoded(part: Split) -> Encoded:
        return replace(encode(pretrained.tokenizer, part.texts, part.labels, findings.limit), domains=part.domains)

    train, test = encoded(dataset.train), encoded(dataset.test)
    validation = None if dataset.validation is None else encoded(dataset.validation)
    for note in _about_tokens(train, test, findings.limit):
        listener.note(note)
    trainer = make_trainer(config, pretrained, findings, dataset.domains)
    form, modules = findings.form, tuple(trainer.shapes)
    roster = replace(roster, modules=modules, rows=trainer.rows, max_length=findings.limit, padding=form.padding)
    setup = make_setup(config, trainer, clients)
    method.init(setup)  # refuses here, before anything is written, what it cannot do
    empty = [roster.names[c.id] for c in clients if c.num_examples == 0]
    if len(empty) == len(clients):
        raise BadInput("no client has any training example")
    if empty:
        listener.note(f"skipped, for they have no training example: {', '.join(empty)}")
    own = {c.id: train.take(parts.train[c.id]) for c in clients}
    never = tuple(Client(len(clients) + i, 0, each.num_examples) for i, each in enumerate(aside))
    return RunContext(config, method, transforms, setup, trainer, findings, roster, own, test, validation, dataset, parts, never)


def _about_tokens(train: Encoded, test: Encoded, limit: int) -> Iterator[str]:
    """What a user should know of the texts as tokens. BadInput where the tokenizer knows no word of them."""
    unknown = f"{100 * train.unknown:.0f} % of the training texts' tokens are unknown to the tokenizer, or it finds none in a text"
    if train.unknown > 0.99:
        raise BadInput(f"{unknown}: it is not this model's, or not for texts like these, and nothing can be learned")
    if train.unknown > 0.25:
        yield unknown
    for name, part in (("training", train), ("test", test)):
        if part.cut:
            yield f"{part.cut:,} of {len(part):,} {name} texts are longer than {limit} tokens, and cut"
