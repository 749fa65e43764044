"""From a configuration to everything a run needs: method, clients, data, model. Also the parts that a finished run needs again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora import methods, seeds
from fedlora.algebra.tensors import flat
from fedlora.config import RANK_SHARES, ClientsConfig, Config, Head, RankPlan
from fedlora.data.dataset import Dataset, Task
from fedlora.data.partition import Parts
from fedlora.data.tasks import task_counts
from fedlora.errors import BadInput, some
from fedlora.models.load import Pretrained
from fedlora.models.load import load as load_model
from fedlora.models.peft import held_by_peft, rehearse
from fedlora.models.slots import find_targets
from fedlora.models.trial import Findings, try_model
from fedlora.training.precision import pick_device, pick_dtype
from fedlora.training.trainer import Trainer
from fedlora.types import Client, Factors, Method, Setup


@dataclass(frozen=True)
class Roster:
    """Who takes part: written to federation.json, so that a finished run can be read without its data.

    Attributes:
        names: of the clients, by id.
        num_test: test examples of each client.
        tasks: of a run of several.
        modules: the adapted layers, in the order of arrays that have a row for each. No matter of who takes part, so two rosters
            may differ in it.
        rows: tokens that fill a step of training, which decides who trains together; a run that is resumed keeps it.
        max_length: tokens at which texts are cut.
        padding: on which side the model takes padding, "right" or "left"; "none" where it is changed by any.
        data: digest of the texts, labels and owners; None where the folder does not say.
    """

    label_names: tuple[str, ...]
    clients: tuple[Client, ...]
    names: tuple[str, ...]
    num_test: tuple[int, ...]
    tasks: tuple[Task, ...] = ()
    modules: tuple[str, ...] = field(default=(), compare=False)
    rows: int | None = field(default=None, compare=False)
    max_length: int | None = field(default=None, compare=False)
    padding: str = field(default="right", compare=False)
    data: str | None = field(default=None, compare=False)

    def to_json(self) -> str:
        rows = [
            {"id": c.id, "name": name, "rank": c.rank, "num_examples": c.num_examples, "num_test": n}
            | ({"tasks": dict(c.tasks)} if c.tasks else {})
            for c, name, n in zip(self.clients, self.names, self.num_test, strict=True)
        ]
        tasks = {"tasks": [asdict(task) for task in self.tasks]} if self.tasks else {}
        model = {"modules": self.modules, "rows": self.rows, "max_length": self.max_length, "padding": self.padding}
        model |= {"data": self.data}
        return json.dumps({"label_names": self.label_names, **tasks, **model, "clients": rows}, indent=1)


def read_roster(path: Path) -> Roster:
    """The roster of a run folder. BadInput when the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
        rows = found["clients"]
        return Roster(
            tuple(found["label_names"]),
            tuple(Client(r["id"], r["rank"], r["num_examples"], r.get("tasks", {})) for r in rows),
            tuple(r["name"] for r in rows),
            tuple(r["num_test"] for r in rows),
            tuple(Task(t["name"], t["first"], t["count"]) for t in found.get("tasks", ())),
            tuple(found.get("modules", ())),
            found.get("rows"),
            found.get("max_length"),
            found.get("padding", "right"),
            found.get("data"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: missing or damaged, so this is no run folder ({error})") from error


def client_ranks(config: ClientsConfig, count: int) -> list[int]:
    """The rank of every client: one number for all, a list by client, or a named plan."""
    rank = config.rank
    if isinstance(rank, int):
        return [rank] * count
    if isinstance(rank, list):
        if len(rank) != count:
            raise BadInput(f"clients.rank lists {len(rank)} ranks for {count} clients")
        return list(rank)
    if rank is RankPlan.TIERS:
        return [2 ** (k % 5 + 1) for k in range(count)]
    edges = np.cumsum(RANK_SHARES[rank]) * count / 30
    return [2 ** (1 + int(np.searchsorted(edges, k + 0.5))) for k in range(count)]


def make_clients(config: ClientsConfig, dataset: Dataset, parts: Parts) -> tuple[Client, ...]:
    """The clients that the data were dealt to. BadInput where `config` speaks of more, or of fewer."""
    if isinstance(config.sample, int) and config.sample > len(parts.train):
        raise BadInput(
            f"clients.sample = {config.sample}: the run has {len(parts.train)} clients; a share up to 1.0 is possible, too"
        )
    dealt = zip(client_ranks(config, len(parts.train)), parts.train, strict=True)
    return tuple(Client(i, rank, len(where), task_counts(dataset, where)) for i, (rank, where) in enumerate(dealt))


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
    return personal or config.model.head is Head.PERSONAL


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


def make_trainer(config: Config, pretrained: Pretrained, findings: Findings, tasks: Sequence[Task] = ()) -> Trainer:
    """The trainer on the configured device and in the configured precision."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    ranges = {task.name: range(task.first, task.first + task.count) for task in tasks}
    return Trainer(pretrained, findings.targets, config.train, device, dtype, ranges, form=findings.form)


def versions() -> dict[str, Any]:
    """The versions that numbers depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("fedlora", "torch", "transformers", "peft", "numpy")}
