"""A client's own `transformers.Trainer` (or a subclass of it, such as trl's SFTTrainer) answers Train requests.

The trainer keeps its data, its collator, its loss, its arguments: a local pass is one call of its `train()`. What a round sets is

    the adapter    its factors, their scale and rank from the request; the roles that do not train have no gradient
    the base       what was merged into it, added in fp32 to the weights that the trainer came with
    the start      optimiser and schedule anew, the order of the data and dropout from the round's seed
    the end        nothing is saved and no checkpoint is loaded: what a round learned is in the adapter, and goes to the server

Precision, dropout and devices are the trainer's own.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.models.lora_layers import LoraLayers
from fedlora.tasks.metrics import Array, MeanLoss
from fedlora.training.learner import Job, Outcome
from fedlora.training.score import ScoreJob
from fedlora.types import BASE, BaseUpdate, Factors, Model, Observe, Observed, Train, Trained

SEEDS = 2**31  # what every library takes as a seed is below


class HFTrainer:
    """One client's transformers.Trainer.

    Attributes:
        whose: what messages begin with.
        trainer: it.
        adapter: that of its model, which other trainers may share.
        rank, lora_alpha, rslora: of the adapter as it came.
    """

    rows = 1  # nobody trains beside it

    def __init__(self, trainer: Any, whose: str) -> None:
        """BadInput where this is no Trainer, or one that cannot be asked for a round at a time."""
        self.whose, self.trainer = whose, trainer
        _refuse(trainer, whose)
        self.adapter = LoraLayers(trainer.model, whose)
        config = self.adapter.config
        self.rank, self.lora_alpha, self.rslora = self.adapter.rank, float(config.lora_alpha), bool(config.use_rslora)
        self.shapes, self.transposed = self.adapter.shapes, self.adapter.transposed
        self.params: dict[str, tuple[int, ...]] = {}
        self.head = self.adapter.read_saved()
        self.objective = MeanLoss()

    @property
    def device(self) -> torch.device:
        """Where its model is."""
        found: torch.device = self.trainer.args.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of its model's own weights."""
        found: torch.dtype = self.adapter.weight(next(iter(self.shapes))).dtype
        return found

    untrained = None  # `MeanLoss` has no constant answer

    @property
    def num_examples(self) -> int:
        """It trains on."""
        return len(self.trainer.train_dataset)

    @property
    def num_scored(self) -> int:
        """Examples that it is scored on."""
        return sum(_parts(self.trainer).values())

    @property
    def version(self) -> int:
        """Of the base."""
        return self.adapter.merges.version

    def refuses(self, asks: frozenset[str]) -> list[str]:
        """All but merges into a base that is not quantised."""
        return sorted(asks - {"base"} if self.adapter.can_merge else asks)

    # ---- the base ------------------------------------------------------------------------------------------------------

    def base_weight(self, module: str) -> Tensor:
        """The weight that the trainer came with, (d_out, d_in) in fp32."""
        if not self.adapter.can_merge:
            raise BadInput(f"{self.whose}: the weights of its base model are quantised, and the method reads them")
        return self.adapter.base_weight(module)

    def fold(self, update: BaseUpdate) -> bool:
        """Bring the base to `update.version`; False where the update starts after the version that it is at."""
        return self.adapter.fold(update)

    # ---- training ------------------------------------------------------------------------------------------------------

    def train(self, jobs: deque[Job], on_examples: Callable[[int], None] = lambda n: None) -> Iterator[tuple[Job, Outcome]]:
        """See `training.trainer.Trainer`. One after the other; the examples of a job are the trainer's own."""
        while jobs:
            job = jobs.popleft()
            if not self.fold(job.ask.base):
                raise ValueError(f"the base is at version {self.version}, the update starts at {job.ask.base.since}")
            yield job, self._pass(job, on_examples)

    def _pass(self, job: Job, on_examples: Callable[[int], None]) -> Outcome:
        ask, trainer = job.ask, self.trainer
        beyond = _beyond(ask)
        if beyond:
            raise BadInput(f"{self.whose}: the method asks for {beyond}, which a transformers.Trainer does not do")
        ((name, slot),) = ask.slots.items()
        roles = [role for each, role in ask.roles if each == name]
        self.adapter.write(slot)
        self.adapter.write_saved(job.head)
        self.adapter.trains(roles, bool(job.head))
        trainer.optimizer = trainer.lr_scheduler = None
        try:
            with _seeded(job.seed), _arguments(trainer, ask, job.seed):
                done = trainer.train()
        finally:
            trainer.optimizer = trainer.lr_scheduler = None
            self.adapter.trains("AB", True)
        on_examples(self.num_examples)
        learned, after = self.adapter.read(), slot
        for role in roles:
            own = slot.role(role)
            after = after.with_role(role, {m: x.to(own[m].dtype) for m, x in learned.role(role).items()})
        trained = Trained({name: after}, float(done.training_loss), int(done.global_step))
        return Outcome(trained, self.adapter.read_saved() if job.head else {})

    def observe(self, ask: Observe, data: Encoded, seed: int) -> Observed:
        """Not done. BadInput."""
        raise BadInput(f"{self.whose}: the method asks for statistics of the data, which a transformers.Trainer does not make")

    # ---- scores and results --------------------------------------------------------------------------------------------

    def sums(self, jobs: Iterable[ScoreJob]) -> Iterator[dict[str, Array]]:
        """By its `evaluate()`. The examples of a job are the trainer's own."""
        for job in jobs:
            self._show(job.model)
            self.adapter.write_saved(job.head)
            found: Mapping[str, Any] = self.trainer.evaluate()
            total = self.objective.zeros()
            for prefix, count in _parts(self.trainer).items():
                if f"{prefix}_loss" not in found:
                    raise BadInput(f"{self.whose}: evaluate() gives no {prefix}_loss; its eval_dataset may have no labels")
                total = {name: x + total[name] for name, x in self.objective.of(float(found[f"{prefix}_loss"]), count).items()}
            yield total

    def _show(self, model: Model) -> None:
        """Be this model: the base at its version, and its one slot."""
        if len(model.slots) > 1 or model.full or model.gate is not None or model.drop_base or not self.fold(model.base):
            raise BadInput(f"{self.whose}: the method's model is more than an adapter on a base, which a PEFT model is")
        rest = self.adapter.read()
        nothing = replace(rest, B={m: torch.zeros_like(B) for m, B in rest.B.items()})
        self.adapter.write(next(iter(model.slots.values()), nothing))

    def load(self, result: Factors, head: Mapping[str, Tensor]) -> None:
        """Be the base that the trainer came with, and this adapter."""
        self.fold(BaseUpdate())
        self.adapter.write(result)
        self.adapter.write_saved(head)

    def save(self, folder: Path) -> None:
        """Write the adapter as it is, and what makes inputs, as PEFT and transformers do."""
        self.adapter.model.save_pretrained(folder)
        if self.trainer.processing_class is not None:
            self.trainer.processing_class.save_pretrained(folder)


def _refuse(trainer: Any, whose: str) -> None:
    """BadInput where this is no Trainer, or one that cannot be asked for a round at a time."""
    kind, lacks = type(trainer).__name__, [name for name in ("train", "evaluate", "args", "model") if not hasattr(trainer, name)]
    if lacks:
        raise BadInput(f"{whose}: {kind} is no transformers.Trainer (it has no {lacks[0]})")
    data, args = getattr(trainer, "train_dataset", None), trainer.args
    parts = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    if not hasattr(data, "__len__"):
        what = "it has no train_dataset" if data is None else f"its train_dataset, {type(data).__name__}, has no length"
        raise BadInput(f"{whose}: {what}; a client counts by how many examples it has")
    if any(part is not None and not hasattr(part, "__len__") for part in parts.values()):
        raise BadInput(f"{whose}: its eval_dataset has no length; scores count by how many examples they are of")
    if trainer.model_init is not None:
        raise BadInput(f"{whose}: model_init makes the model anew in each round, and the base with it; give model instead")
    if trainer.optimizer is not None and not trainer.state.global_step:
        raise BadInput(
            f"{whose}: it was given an optimizer, which would go on over rounds; let it make its own: optim in its arguments, or "
            "optimizer_cls_and_kwargs"
        )
    if args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise BadInput(f"{whose}: its training is spread over several processes; a client is one process")


def _parts(trainer: Any) -> dict[str, int]:
    """Prefix of what `evaluate()` says -> how many examples it says it of."""
    data = trainer.eval_dataset
    if data is None:
        return {}
    return {f"eval_{name}": len(part) for name, part in data.items()} if isinstance(data, dict) else {"eval": len(data)}


def _beyond(ask: Train) -> str | None:
    """What a request asks for that no PEFT model can do. Before round 1 `refuses` looks at what the method claims."""
    (slot, *more) = ask.slots.values() or [Factors()]
    asked = {
        "several slots, or none": more or not ask.slots,
        "the roles C or D": slot.C or slot.D,
        "a mask": ask.mask,
        "learning rates by role": any(x != 1.0 for x in ask.lr_scale.values()),
        "a penalty": ask.penalty,
        "full fine-tuning": ask.full or any(each == BASE for each, _ in ask.roles),
        "a gate": ask.gate,
        "one of several data sets": ask.data,
        "a base without its weights": ask.drop_base,
        "a rehearsal": ask.probe,
        "the mean gradient": ask.want_grad,
    }
    return next((what for what, found in asked.items() if found), None)


@contextmanager
def _arguments(trainer: Any, ask: Train, seed: int) -> Iterator[None]:
    """The trainer's arguments as a round has them; afterwards they are as before. A request's `epochs` counts local passes,
    and a pass is all that the arguments say, epochs or steps."""
    args, passes = trainer.args, 1 if ask.epochs is None else ask.epochs
    steps = args.max_steps * passes if args.max_steps > 0 else math.inf
    steps = min(steps, math.inf if ask.max_steps is None else ask.max_steps)
    changed = {
        "save_strategy": type(args.save_strategy)("no"),
        "load_best_model_at_end": False,
        "num_train_epochs": args.num_train_epochs * passes,
        "max_steps": -1 if math.isinf(steps) else int(steps),
    }
    with ExitStack() as stack:
        stack.enter_context(_set(args, changed))
        # Where it is set, each round would go through the data in the same order.
        order = trainer.accelerator.dataloader_config
        if order is not None:
            stack.enter_context(_set(order, {"data_seed": seed % SEEDS}))
        yield


@contextmanager
def _set(thing: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Attributes, for a while."""
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every library's random numbers from this seed; afterwards they go on as if nothing had been."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed % SEEDS)
        np.random.seed(seed % SEEDS)
        torch.manual_seed(seed % SEEDS)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
