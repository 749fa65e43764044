"""From a configuration to everything a run needs: method, clients, data, model. Also the parts that a finished run needs again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora import methods, seeds, tasks
from fedlora.algebra.tensors import flat
from fedlora.collector import uncollected
from fedlora.config import Config, HeadMode, Partition, Strata
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.domains import deal
from fedlora.data.load import load as load_data
from fedlora.data.partition import Parts
from fedlora.data.strata import BINS, by_cluster
from fedlora.errors import BadInput, some
from fedlora.listener import Listener
from fedlora.models.load import Given, Pretrained, doing
from fedlora.models.memory import Room, room
from fedlora.models.peft import held_by_peft, rehearse
from fedlora.models.quantised import bits, move
from fedlora.models.slots import find_targets
from fedlora.models.trial import Findings, in_full
from fedlora.runs import fit
from fedlora.runs.context import RunContext
from fedlora.runs.packages import require
from fedlora.runs.roster import HeldOut, Roster, make_clients, make_held_out
from fedlora.tasks.base import Objective, Task
from fedlora.training.batched import Trainer
from fedlora.training.precision import dtype_of, pick_device
from fedlora.training.trainer import Outlined
from fedlora.transforms import pipeline
from fedlora.types import Client, Factors, Method, Setup

CHANGES_BASE = frozenset({"base", "full", "drop_base"})  # of what methods' requests use


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


def make_setup(config: Config, trainer: Outlined, clients: Sequence[Client]) -> Setup:
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


def with_source(config: Config, source: str | Path) -> Config:
    """The configuration with its model from there."""
    return config.model_copy(update={"model": config.model.model_copy(update={"source": str(source)})})


def has_own_models(config: Config) -> bool:
    """Whether clients end with models of their own, so that each is scored on its own test part, and no common one is."""
    personal: bool = methods.find(config.method.name).FACTS.personal
    return personal or config.model.head is HeadMode.PERSONAL


def make_task(config: Config) -> Task:
    """The configured task."""
    return tasks.make(config.task.name, config.task.settings)


def refuse_unserved(config: Config, task: Task) -> None:
    """BadInput where the method asks for what the task, or the kind of run, cannot serve."""
    facts = methods.find(config.method.name).FACTS
    lacking = sorted(facts.asks & task.LACKS)
    if lacking:
        raise BadInput(f"{facts.title} needs {some(lacking, 3)}, and {task.TITLE} has none; take another method or another task")
    refuse_changed_base(config, task, config.model.quantise)


def refuse_changed_base(config: Config, task: Task, bits: str | None) -> None:
    """BadInput where the method trains the base's own weights, merges into them or leaves them out, and they are kept in few bits:
    what a round changes is less than what such weights are rounded by."""
    facts = methods.find(config.method.name).FACTS
    if bits is not None and facts.asks & CHANGES_BASE:
        fit = [name for name in methods.names() if not methods.find(name).FACTS.asks & (CHANGES_BASE | task.LACKS)]
        raise BadInput(
            f"{facts.title} changes the base model's own weights, and those in {bits} cannot be changed; leave model.quantise out "
            f"and take an unquantised checkpoint, or take a method that leaves the base as it is: {', '.join(fit)}"
        )


def refuse_trainers(config: Config) -> None:
    """BadInput where the clients of a run have trainers of their own, which are needed and are not here."""
    if config.train.trainer is not None:
        raise BadInput(
            f"train.trainer = '{config.train.trainer}': data and model of this run are its clients' own trainers', so this is not "
            "possible; run, resume, report and export are"
        )


@dataclass(frozen=True)
class Loaded:
    """The model of a run, tried and ready to train; `there` is the room that there was before it was loaded."""

    pretrained: Pretrained
    findings: Findings
    objective: Objective
    trainer: Trainer
    there: Room


def load_model(config: Config, task: Task, schema: Schema, listener: Listener, given: Given | None = None) -> Loaded:
    """The configured model for what the data say; `given` where it is at hand. BadInput: why it cannot be."""
    listener.stage(doing(config.model.source))
    there = room(pick_device(config.device))
    if given is None:
        fit.refuse_base(config, task, schema, there)
    pretrained = load_pretrained(config, schema, given, dtype_of(config))
    refuse_changed_base(config, task, bits(pretrained.model))
    listener.stage("trying the model")
    with in_full(pretrained.model):
        findings = rehearsed(config, pretrained, try_pretrained(config, pretrained))
    for note in findings.notes:
        listener.note(note)
    objective = task.bind(schema, pretrained)
    return Loaded(pretrained, findings, objective, make_trainer(config, pretrained, findings, objective), there)


def load_pretrained(config: Config, schema: Schema, given: Given | None = None, dtype: torch.dtype = torch.float32) -> Pretrained:
    """The configured model for what the data say; `given` where it is at hand; `dtype` in which it will compute."""
    refuse_trainers(config)
    return make_task(config).load(config.model, schema, config.seed, given, dtype)


def try_pretrained(config: Config, pretrained: Pretrained) -> Findings:
    """How the configured model is run, on the configured device; `Task.try_model` says what is tried."""
    targets = find_targets(pretrained.model, config.model.target_modules)
    move(pretrained.model, pick_device(config.device))
    findings = make_task(config).try_model(pretrained, targets, config.data.max_length)
    move(pretrained.model, torch.device("cpu"))
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


def make_trainer(config: Config, pretrained: Pretrained, findings: Findings, objective: Objective) -> Trainer:
    """The trainer on the configured device and in the configured precision."""
    device, dtype = pick_device(config.device), dtype_of(config)
    return Trainer(pretrained, findings.targets, config.train, device, dtype, objective, form=findings.form)


def versions(quantised: bool) -> dict[str, Any]:
    """The versions that numbers depend on."""
    from importlib.metadata import version

    names = ("fedlora", "torch", "transformers", "peft", "numpy", *(("bitsandbytes",) if quantised else ()))
    return {name: version(name) for name in names}


@uncollected()
def prepare(config: Config, listener: Listener, run: Path | None = None, given: Given | None = None) -> RunContext:
    """Load data and model, deal the data to the clients. Checks everything that can be wrong before training starts.

    Args:
        run: the run's folder, where its data is kept in it.
        given: the model, where it is at hand.
    """
    refuse_trainers(config)
    require(config)
    task, method = make_task(config), make_method(config)
    transforms = pipeline.make(config.transform, method, config.seed, config.model.head)
    refuse_unserved(config, task)
    listener.stage(f"reading {config.data.title}")
    dataset = load_data(task, config.data, config.seed, run)
    for note in dataset.notes:
        listener.note(note)
    require_validation(config, dataset)
    dealt = None if config.data.strata is Strata.CLUSTER else _deal(config, dataset)  # what cannot be, before the model is loaded
    loaded = load_model(config, task, dataset.schema, listener, given)
    pretrained, findings, objective, trainer = loaded.pretrained, loaded.findings, loaded.objective, loaded.trainer
    fitting = task.fitting(dataset, pretrained, findings.limit)
    if fitting is not dataset:
        for note in fitting.notes[len(dataset.notes) :]:
            listener.note(note)
        dataset, dealt = fitting, dealt and _deal(config, fitting)
    if dealt is None:
        listener.stage("finding clusters")
        clusters = config.clients.count if config.data.partition is Partition.STRATA else None  # one a client
        features = partial(_features, task, trainer, pretrained, limit=findings.limit)
        dataset = by_cluster(dataset, features, config.seed, clusters or BINS)
        dealt = _deal(config, dataset)
    parts, clients, aside = dealt
    dataset = task.dealt(dataset, parts)
    names = parts.names[: len(clients)]
    listener.stage("encoding")
    train, test = (task.encode(pretrained, part, findings.limit) for part in (dataset.train, dataset.test))
    validation = None if dataset.validation is None else task.encode(pretrained, dataset.validation, findings.limit)
    for note in task.notes(train, test, findings.limit):
        listener.note(note)
    roster = Roster(
        dataset.schema,
        clients,
        names,
        tuple(len(where) for where in parts.test[: len(clients)]),
        objective.metrics,
        modules=tuple(trainer.shapes),
        rows=trainer.rows,
        max_length=findings.limit,
        padding=findings.form.padding,
        data=dataset.digest,
        held_out=aside,
    )
    setup = make_setup(config, trainer, clients)
    fit.check(config, method, setup, trainer, train, loaded.there)
    method.init(setup)  # refuses here, before anything is written, what it cannot do
    empty = [names[c.id] for c in clients if c.num_examples == 0]
    if len(empty) == len(clients):
        raise BadInput("no client has any training example")
    if empty:
        listener.note(f"skipped, for they have no training example: {', '.join(empty)}")
    own = {c.id: train.take(parts.train[c.id]) for c in clients}
    never = tuple(Client(len(clients) + i, 0, each.num_examples) for i, each in enumerate(aside))
    return RunContext(
        config=config,
        task=task,
        method=method,
        transforms=transforms,
        setup=setup,
        trainer=trainer,
        findings=findings,
        roster=roster,
        all_train=train,
        train=own,
        test=test,
        validation=validation,
        dataset=dataset,
        parts=parts,
        held_out=never,
        given=given,
    )


def _deal(config: Config, dataset: Dataset) -> tuple[Parts, tuple[Client, ...], tuple[HeldOut, ...]]:
    """Who has what, those who train and those who never do."""
    parts = deal(dataset, config.data, config.clients, config.seed)
    return parts, make_clients(config.clients, dataset, parts), make_held_out(config.clients, parts)


def _features(task: Task, trainer: Trainer, pretrained: Pretrained, part: Split, limit: int) -> np.ndarray:
    """What the pre-trained model makes of examples, (n, d)."""
    return trainer.features(task.encode(pretrained, part, limit)).numpy()
