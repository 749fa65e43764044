"""Texts as token ids, made once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlora.errors import BadInput


@dataclass(frozen=True)
class Encoded:
    """Examples of one client or one test set: token ids of each text, (length,) int32, and labels, (n,) int64. `domains`, (n,)
    int64, is the place of each example's domain among the trainer's; empty in a run of one domain. Of a whole part as it was
    encoded, `cut` counts the texts that were longer than allowed, and `unknown` is the share of tokens that the tokenizer does not
    know (a text that it finds none in counts as one)."""

    ids: tuple[np.ndarray, ...]
    labels: np.ndarray
    domains: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    cut: int = 0
    unknown: float = 0.0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, where: np.ndarray) -> "Encoded":
        """The examples at these positions."""
        return Encoded(
            tuple(self.ids[i] for i in where), self.labels[where], self.domains[where] if len(self.domains) else self.domains
        )


def encode(tokenizer: Any, texts: Sequence[str], labels: np.ndarray, max_length: int) -> Encoded:
    """Token ids of every text, cut at `max_length` tokens. A text of no tokens is its tokenizer's end-of-text token.

    Raises:
        BadInput: `max_length` leaves no room for a text beside what the tokenizer adds.
    """
    added = tokenizer.num_special_tokens_to_add()
    if max_length <= added:
        raise BadInput(f"data.max_length = {max_length}: the tokenizer adds {added} tokens to every text; give {added + 1} or more")
    rows: list[np.ndarray] = []
    nothing = np.array([_nothing(tokenizer)], dtype=np.int32)
    cut = 0
    for start in range(0, len(texts), 1024):  # by pieces: the tokenizer's own objects are much larger than the ids
        piece = list(texts[start : start + 1024])
        part = tokenizer(piece, truncation=True, max_length=max_length, return_attention_mask=False)
        own = [np.asarray(ids, dtype=np.int32) for ids in part["input_ids"]]
        full = [i for i, ids in enumerate(own) if len(ids) == max_length]
        cut += sum(_is_cut(tokenizer, part, piece[i], i, max_length) for i in full)
        rows.extend(ids if len(ids) else nothing for ids in own)
    return Encoded(tuple(rows), np.asarray(labels, dtype=np.int64), cut=cut, unknown=_unknown(tokenizer, rows))


def _nothing(tokenizer: Any) -> int:
    """What stands for a text of no tokens."""
    named = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return next((int(id) for id in named if id is not None), 0)


def _is_cut(tokenizer: Any, part: Any, text: str, place: int, max_length: int) -> bool:
    if part.encodings is not None:
        return bool(part.encodings[place].overflowing)
    return len(tokenizer(text)["input_ids"]) > max_length


def _unknown(tokenizer: Any, rows: Sequence[np.ndarray]) -> float:
    """The share of unknown tokens among those of the texts themselves; a text that has none counts as one."""
    if not rows:
        return 0.0
    added = [id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id]
    tokens = np.concatenate(rows)
    own = ~np.isin(tokens, added)
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    nothing = int((np.add.reduceat(own, starts, dtype=np.int64) == 0).sum())
    strange = 0 if tokenizer.unk_token_id is None else int((tokens == tokenizer.unk_token_id).sum())
    return (strange + nothing) / (int(own.sum()) + nothing)


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
