"""Texts as token ids, made once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """Examples of one client or one test set: token ids of each text, (length,) int32, and labels, (n,) int64. `tasks`, (n,)
    int64, is the place of each example's task among the trainer's; empty in a run of one task."""

    ids: tuple[np.ndarray, ...]
    labels: np.ndarray
    tasks: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, where: np.ndarray) -> "Encoded":
        """The examples at these positions."""
        return Encoded(tuple(self.ids[i] for i in where), self.labels[where], self.tasks[where] if len(self.tasks) else self.tasks)


def encode(tokenizer: Any, texts: Sequence[str], labels: np.ndarray, max_length: int) -> Encoded:
    """Token ids of every text, cut at `max_length` tokens."""
    rows: list[np.ndarray] = []
    for start in range(0, len(texts), 1024):  # by pieces: the tokenizer's own objects are much larger than the ids
        part = tokenizer(list(texts[start : start + 1024]), truncation=True, max_length=max_length, return_attention_mask=False)
        rows.extend(np.asarray(ids, dtype=np.int32) for ids in part["input_ids"])
    return Encoded(tuple(rows), np.asarray(labels, dtype=np.int64))


def by_length(data: Encoded, tokens: int) -> Iterator[np.ndarray]:
    """Positions of all examples in batches of similar length, at most `tokens` padded tokens each (or one text): the order for
    evaluation."""
    order = np.argsort([len(row) for row in data.ids], kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(data.ids[order[end]]) <= tokens:
            end += 1
        yield order[start:end]
        start = end
