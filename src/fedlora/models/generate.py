"""Text that a language model writes: greedily, token by token, with the keys and values of what stands before kept.

It is transformers' own generation, on prompts of similar length side by side, padding before them. Packed attention keeps
nothing, so the model's own stands in for it meanwhile. What is bound to the model's layers (see `slots`) must be bound to all
rows, for their number changes with every token.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedlora.models.heads import padding, text_config
from fedlora.models.quiet import quiet
from fedlora.models.trial import PLAIN, use


def stops(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: what the tokenizer ends texts with, and what the model says of itself."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = own if isinstance(own, list | tuple) else [own]
    return tuple(sorted({int(id) for id in (*several, tokenizer.eos_token_id) if id is not None}))


Hear = Callable[[np.ndarray], None]  # told what there is of an answer, token ids (length,), whenever it has grown


def context(model: Any) -> int | None:
    """How many tokens the model takes, prompt and answer together, by its own words; None where it says nothing."""
    said = getattr(text_config(model), "max_position_embeddings", None)
    return said if isinstance(said, int) and said > 0 else None


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[np.ndarray], limit: int, stop: Collection[int], tokens: int, hear: Hear | None = None
) -> list[np.ndarray]:
    """What follows each prompt, up to and without the token that ends it, or to where the model's context is full.

    Args:
        prompts: token ids of each, none of them empty, and each shorter than the context.
        limit: the most tokens of an answer.
        stop: tokens that end one.
        tokens: of prompts and answers that pass together, padding among them; at least one prompt does.
        hear: of a single prompt.

    Returns:
        token ids of each answer, (length,) int64.
    """
    found: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(prompts)
    pad, device = padding(model), next(model.parameters()).device
    with _cached(model), quiet():
        full = context(model)
        for group in _groups([len(each) for each in prompts], limit, tokens, full):
            longest = max(len(prompts[i]) for i in group)
            own = limit if full is None else min(limit, full - longest)
            ids, mask = np.full((len(group), longest), pad, dtype=np.int64), np.zeros((len(group), longest), dtype=np.int64)
            for row, i in enumerate(group):
                ids[row, longest - len(prompts[i]) :], mask[row, longest - len(prompts[i]) :] = prompts[i], 1
            out = model.generate(
                torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=_greedy(own, stop, pad),
                streamer=None if hear is None else _Streamer(hear, stop),
            )
            for i, row in zip(group, out[:, longest:].cpu().numpy(), strict=True):
                ends = np.flatnonzero(np.isin(row, list(stop)))
                found[i] = row[: ends[0]] if len(ends) else row
    return found


def _greedy(limit: int, stop: Collection[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=sorted(stop) or None, pad_token_id=pad, use_cache=True
    )


class _Streamer:
    """What transformers calls so: it is given the prompt, and then each token."""

    def __init__(self, hear: Hear, stop: Collection[int]) -> None:
        self.hear, self.stop, self.ids = hear, stop, list[int]()
        self.prompted = False

    def put(self, ids: torch.Tensor) -> None:
        if self.prompted and (id := int(ids)) not in self.stop:
            self.ids.append(id)
            self.hear(np.array(self.ids, dtype=np.int64))
        self.prompted = True

    def end(self) -> None:
        pass


def _groups(lengths: Sequence[int], limit: int, tokens: int, full: int | None) -> Iterator[list[int]]:
    """Positions of the prompts that pass together: similar lengths, the longest first, so that memory is short at once or never.
    One that leaves less than `limit` of the context, `full`, passes alone, so that no other's answer is cut where its own is."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        alone = full is not None and bool(group) and lengths[group[0]] + limit > full
        if group and (alone or (len(group) + 1) * (lengths[group[0]] + limit) > tokens):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@contextmanager
def _cached(model: Any) -> Iterator[None]:
    """Within, the model keeps keys and values, with an attention that can use them."""
    attention, cached, own = model.config._attn_implementation, model.config.use_cache, model.generation_config
    use(model, PLAIN)
    model.config.use_cache = True
    model.generation_config = type(own)()  # its own sampling and lengths are not asked for
    try:
        yield
    finally:
        model.generation_config = own
        model.config.use_cache = cached
        use(model, attention)
