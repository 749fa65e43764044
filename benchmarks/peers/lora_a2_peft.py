"""LoRA-A2 (arXiv 2410.22815) on PEFT's layers, as its authors describe it: the resting factor frozen, gradients masked.

A client trains the active factor for a probe epoch, scores every rank of every module by ||dB[:, i]|| ||A[i, :]|| (or
||B[:, i]|| ||dA[i, :]||), goes back, and trains its best ranks alone. What a mask forbids is put back after each step, since
AdamW's weight decay would move it. The server adds the mean change, a rank that a client did not choose counting as zero.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Sample, Side
from benchmarks.ours import work
from benchmarks.peers.peft_loop import Loop, State, get_state, orders, set_state
from fedlora.data.encoded import Encoded

LR_SCALE = {"lora_B": 5.0}  # LoRA+


@dataclass(frozen=True)
class LoRAA2Loop:
    """One resident model with an adapter at the global rank; every client may train `rank` ranks a module on average."""

    loop: Loop
    rank: int

    def round(self, clients: Mapping[int, Encoded], start: State, number: int) -> tuple[State, float]:
        """The server's factors after the round, and the seconds of training, probe and selection included."""
        active, resting = ("lora_B", "lora_A") if number % 2 else ("lora_A", "lora_B")
        for name, p in self.loop.model.named_parameters():
            p.requires_grad_(active in name)
        begun = time.perf_counter()
        changes = {id: self.client(id, data, start, number, active, resting) for id, data in clients.items()}
        seconds = time.perf_counter() - begun
        total = sum(map(len, clients.values()))
        moved = {
            name: x + sum(len(clients[id]) / total * change[name] for id, change in changes.items()) if active in name else x
            for name, x in start.items()
        }
        return moved, seconds

    def client(self, id: int, data: Encoded, start: State, number: int, active: str, resting: str) -> State:
        """The change of the active factor, zero outside the chosen ranks."""
        loop = self.loop
        set_state(loop.model, start)
        loop.train(data, orders(loop.seed, number, id, len(data), loop.settings), LR_SCALE)
        probe = get_state(loop.model)
        masks = self.masks(start, probe, active, resting)
        set_state(loop.model, start)
        self.train_masked(data, id, number, start, masks)
        done = get_state(loop.model)
        return {name: done[name] - start[name] for name in masks}

    def masks(self, start: State, probe: State, active: str, resting: str) -> dict[str, Tensor]:
        """Name of an active factor -> 1 where it may move, over the whole model the best ranks."""
        own, other = (0, 1) if active == "lora_B" else (1, 0)
        scores = {
            name: (probe[name] - start[name]).norm(dim=own) * start[name.replace(active, resting)].norm(dim=other)
            for name in start
            if active in name
        }
        flat = torch.cat(list(scores.values()))
        chosen = torch.zeros_like(flat)
        chosen[flat.topk(self.rank * len(scores)).indices] = 1.0
        parts = zip(scores, torch.split(chosen, [len(x) for x in scores.values()]), strict=True)
        return {name: part[None, :] if active == "lora_B" else part[:, None] for name, part in parts}

    def train_masked(self, data: Encoded, id: int, number: int, start: State, masks: Mapping[str, Tensor]) -> None:
        loop = self.loop
        named = {name.replace(".default", ""): p for name, p in loop.model.named_parameters() if p.requires_grad}
        parts = [(named[name], mask.to(loop.device), start[name].to(loop.device)) for name, mask in masks.items()]
        optimizer = loop.optimizer(LR_SCALE)
        for where in orders(loop.seed, number, id, len(data), loop.settings, request=1):
            loop.loss(data, where).backward()  # type: ignore[no-untyped-call]
            for p, mask, _ in parts:
                assert p.grad is not None
                p.grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for p, mask, before in parts:
                    p.sub_(before).mul_(mask).add_(before)


def side(peer: LoRAA2Loop, clients: Mapping[int, Encoded], start: State, rounds: int) -> Side:
    """So many rounds a repetition, going on from where the last one stopped; a round passes twice over the examples."""
    state, number = start, 0

    def run() -> Sample:
        nonlocal state, number
        seconds = 0.0
        for _ in range(rounds):
            number += 1
            state, took = peer.round(clients, state, number)
            seconds += took
        return work(seconds, list(clients.values()), 2 * rounds * peer.loop.settings.epochs)

    return run
