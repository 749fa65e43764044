"""The loop that every peer runs: a Hugging Face model with PEFT's adapter, the clients one after the other, their factors averaged.

Dynamic padding to the longest text of a batch, fused AdamW, no wait for the device but at the end of a client, nothing decoded or
tokenised inside the clock.
"""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import Sample, Side
from benchmarks.ours import work
from fedlora import seeds
from fedlora.config import TrainConfig
from fedlora.data.encoded import Encoded
from fedlora.models.load import draw, locate
from fedlora.types import Factors

State = dict[str, Tensor]  # of the adapter, as PEFT names it


def load(source: str, num_labels: int, seed: int) -> Any:
    """The classifier in fp32 with transformers' own choice of attention, its head drawn as ours, dropout off."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        locate(source), num_labels=num_labels, dtype=torch.float32, output_loading_info=True
    )
    draw(model, set(info["missing_keys"]), seed)
    return model.eval()


def adapted(model: Any, rank: int, alpha: float, modules: list[str]) -> PeftModel:
    """LoRA on these modules; everything else is frozen, the head too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 on transformers 5.23
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=modules))


def as_state(factors: Factors) -> State:
    """The factors under PEFT's names."""
    names = {"A": "lora_A", "B": "lora_B"}
    return {f"base_model.model.{m}.{names[r]}.weight": x for r in names for m, x in factors.role(r).items()}


def get_state(model: PeftModel) -> State:
    return {name: x.detach().float().cpu().clone() for name, x in get_peft_model_state_dict(model).items()}


def set_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    set_peft_model_state_dict(model, dict(state))


def orders(seed: int, round: int, client: int, count: int, settings: TrainConfig, request: int = 0) -> Iterator[np.ndarray]:
    """The positions of each batch, epoch after epoch. The order is the one that we draw, so that accuracies are paired."""
    own = seeds.derive(seed, "train", round, client, request)
    for epoch in range(settings.epochs):
        order = seeds.generator(own, "epoch", epoch).permutation(count)
        yield from (order[start : start + settings.batch_size] for start in range(0, count, settings.batch_size))


@dataclass(frozen=True)
class Loop:
    """One resident model that trains clients in turn. `autocast` is the dtype of the matrix products; None is the model's own."""

    model: PeftModel
    settings: TrainConfig
    pad: int
    seed: int
    device: torch.device = torch.device("cpu")
    autocast: torch.dtype | None = None

    def round(self, clients: Mapping[int, Encoded], start: State, number: int) -> tuple[State, float]:
        """The mean of what the clients trained, weighted by their examples, and the seconds of training without that mean."""
        begun = time.perf_counter()
        trained = {id: self.client(id, data, start, number) for id, data in clients.items()}
        seconds = time.perf_counter() - begun
        total = sum(map(len, clients.values()))
        mean = {n: torch.stack([len(clients[k]) / total * own[n] for k, own in trained.items()]).sum(0) for n in start}
        return mean, seconds

    def client(self, id: int, data: Encoded, start: State, number: int) -> State:
        """The adapter after the local epochs of a client."""
        set_state(self.model, start)
        self.train(data, orders(self.seed, number, id, len(data), self.settings), {})
        return get_state(self.model)

    def train(self, data: Encoded, batches: Iterator[np.ndarray], lr_scale: Mapping[str, float]) -> None:
        """A fresh AdamW over what requires a gradient; `lr_scale` by a part of the parameter's name."""
        optimizer = self.optimizer(lr_scale)
        for where in batches:
            self.loss(data, where).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def optimizer(self, lr_scale: Mapping[str, float]) -> torch.optim.Optimizer:
        groups: dict[float, list[Tensor]] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                scale = next((x for part, x in lr_scale.items() if part in name), 1.0)
                groups.setdefault(self.settings.lr * scale, []).append(p)
        rates = [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]
        return torch.optim.AdamW(rates, weight_decay=self.settings.weight_decay, fused=True)

    def loss(self, data: Encoded, where: np.ndarray) -> Tensor:
        with self._precision():
            logits = self.model(**self._batch(data, where)).logits
        labels = torch.from_numpy(data.targets[where]).to(self.device, non_blocking=True)
        return cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def accuracy(self, state: State, data: Encoded) -> float:
        """The share of examples that the model with this adapter gets right."""
        set_state(self.model, state)
        order = np.argsort([len(ids) for ids in data.inputs], kind="stable")
        right = 0
        for where in np.array_split(order, max(1, len(order) // 64)):
            with self._precision():
                predicted = self.model(**self._batch(data, where)).logits.argmax(-1).cpu().numpy()
            right += int((predicted == data.targets[where]).sum())
        return right / len(data)

    def _batch(self, data: Encoded, where: np.ndarray) -> dict[str, Tensor]:
        rows = [torch.from_numpy(data.inputs[i]).long() for i in where]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {name: x.to(self.device, non_blocking=True) for name, x in (("input_ids", ids), ("attention_mask", mask))}

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def side(loop: Loop, clients: Mapping[int, Encoded], start: State) -> Side:
    """A round a repetition, going on from the last one's mean."""
    state, number = start, 0

    def run() -> Sample:
        nonlocal state, number
        number += 1
        state, seconds = loop.round(clients, state, number)
        return work(seconds, list(clients.values()), loop.settings.epochs)

    return run
