"""A transformers classifier that takes packed batches: all tokens of all texts as the rows of one matrix.

The body runs on (1, rows) tokens whose positions start anew with each text, under `attention.packed_attention`. The head runs on
the one token of each text that it reads: the first in encoders, the last in decoders. It is the model's own head, whatever it is
made of: the body is stood in for by its output. Whether an architecture can do this is not guessed from its name but tried once, on
a few tokens, against its own padded forward pass.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.models import attention

Parameters = Mapping[str, Tensor]


class Reads(Enum):
    """The token of a text that the head reads."""

    FIRST = 0
    LAST = -1


@dataclass(frozen=True)
class Packing:
    """How a model takes packed texts: what its head reads, and the position of a text's first token."""

    reads: Reads
    offset: int


@dataclass(frozen=True)
class Texts:
    """Texts for one forward pass. Packed: ids and positions (1, rows), `layout` says where each begins. Padded: ids
    (texts, longest) with their mask, and no layout.

    Attributes:
        lengths: rows of each text, (texts,): its tokens, or the padded length.
    """

    ids: Tensor
    lengths: np.ndarray
    positions: Tensor | None = None
    mask: Tensor | None = None
    layout: attention.Layout | None = None


def pack(ids: Sequence[np.ndarray], packing: Packing | None, pad: int, device: torch.device) -> Texts:
    """Texts, given as token ids, side by side; padded at the end where there is no packing."""
    lengths = np.array([len(row) for row in ids])
    if packing is None:
        longest = max(1, int(lengths.max()))
        inside = np.arange(longest) < lengths[:, None]
        table = np.full(inside.shape, pad, dtype=np.int64)
        table[inside] = np.concatenate(ids)
        mask = torch.from_numpy(inside.astype(np.int64)).to(device)
        return Texts(torch.from_numpy(table).to(device), np.full(len(ids), longest), mask=mask)
    positions = np.concatenate([np.arange(n) for n in lengths]) + packing.offset
    flat = np.concatenate(ids).astype(np.int64)
    tokens, places = (torch.from_numpy(x)[None].to(device) for x in (flat, positions))
    return Texts(tokens, lengths, positions=places, layout=attention.lay_out(lengths, device))


class Body(nn.Module):
    """The model below its head. Packed texts -> the token that the head reads, (texts, d); padded ones -> all tokens."""

    def __init__(self, model: Any, packing: Packing | None) -> None:
        super().__init__()
        self.model, self.packing = model, packing

    def forward(self, texts: Texts) -> Tensor:
        hidden = self.all_tokens(texts)
        if self.packing is None or texts.layout is None:
            return hidden
        read = texts.layout.bounds[1:] - 1 if self.packing.reads is Reads.LAST else texts.layout.bounds[:-1]
        return hidden[read.long()]

    def all_tokens(self, texts: Texts) -> Tensor:
        """The last hidden states: (rows, d) packed, (texts, longest, d) padded."""
        base = self.model.base_model
        if texts.layout is None:
            padded: Tensor = base(input_ids=texts.ids, attention_mask=texts.mask).last_hidden_state
            return padded
        with attention.laid_out(texts.layout):
            packed: Tensor = base(input_ids=texts.ids, position_ids=texts.positions).last_hidden_state
        return packed[0]


class Head(nn.Module):
    """The model's head: what `Body` gave -> logits, (texts, classes)."""

    def __init__(self, model: Any, packing: Packing | None) -> None:
        super().__init__()
        self.model, self.packing = model, packing

    def forward(self, hidden: Tensor, texts: Texts) -> Tensor:
        if texts.layout is not None:
            hidden = hidden[:, None]
        # One token a text, and none of them padding: for heads that look for the last token that is not.
        ids = texts.ids if texts.layout is None else torch.full(hidden.shape[:2], self._some_token(), device=hidden.device)
        with _body_gives(self.model.base_model, hidden):
            logits: Tensor = self.model(input_ids=ids, attention_mask=texts.mask).logits
        return logits.float() if logits.dtype is not torch.float64 else logits

    def _some_token(self) -> int:
        return 1 if self.model.config.pad_token_id == 0 else 0


@contextmanager
def _body_gives(base: Any, hidden: Tensor) -> Iterator[None]:
    """The base model, called within, answers with these hidden states, and with what its pooler makes of them."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as Output

    pooler = getattr(base, "pooler", None)
    output = Output(hidden, None if pooler is None else pooler(hidden))
    base.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del base.forward


def try_packing(model: Any) -> Packing | None:
    """How this model takes packed texts; None when it cannot, or would not give the logits of its padded forward pass. Switches the
    model to packed attention where it can, and back to its own where it cannot."""
    pad, words = model.config.pad_token_id or 0, model.config.vocab_size
    before = model.config._attn_implementation
    rng = np.random.default_rng(0)
    ids = [(pad + 1 + rng.integers(0, words - 1, n)) % words for n in (3, 8, 5)]  # any token but the padding
    device = next(model.parameters()).device
    with torch.no_grad():
        padded = pack(ids, None, pad, device)
        wanted = model(input_ids=padded.ids, attention_mask=padded.mask).logits
        attention.register()
        model.config.use_cache = False  # decoders would keep keys and values for a generation that never comes
        for packing in (Packing(reads, offset) for reads, offset in product(Reads, (0, pad + 1))):
            try:
                _use(model, attention.NAME)
                texts = pack(ids, packing, pad, device)
                got = Head(model, packing)(Body(model, packing)(texts), texts)
            except (NotImplementedError, TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                continue
            if got.shape == wanted.shape and bool(((got - wanted).abs().max() <= 1e-4 * wanted.abs().max()).item()):
                return packing
    _use(model, before)
    return None


def _use(model: Any, implementation: str) -> None:
    """Switch the model's attention, without transformers' warning where it cannot be switched: it is tried, then."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model.set_attn_implementation(implementation)
    finally:
        logger.setLevel(level)
