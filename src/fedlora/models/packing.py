"""Inputs as one forward pass takes them.

Packed, all tokens of all texts are the rows of one matrix, their positions starting anew with each text, and attention keeps to
each text (see `attention`). Where a model cannot take that, texts are padded to the longest one; where padding changes what a text
gives, only texts of one length share a pass; and where even neighbours do, each text has its own. Which of these a model can do is
not known from its name: `trial` tries it. Inputs that all have one shape, such as images, are stacked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from fedlora.models import attention


class Reads(Enum):
    """The token of a packed text that the head reads: transformers' decoders read the last one that is not the padding token."""

    FIRST = "first"
    LAST = "last"


class Positions(Enum):
    """How positions count: 0, 1, 2, …, or as in RoBERTa, from the padding token's id on, where padding tokens have that id."""

    FROM_ZERO = "from zero"
    AFTER_PADDING = "after padding"


class Shared(Enum):
    """Which texts may share a forward pass, the fastest way first."""

    PACKED = "packed"
    PADDED = "padded"
    ONE_LENGTH = "one length a pass"
    ONE_TEXT = "one text a pass"
    STACKED = "arrays of one shape, side by side"  # no texts


@dataclass(frozen=True)
class Packing:
    """How a model takes packed texts."""

    reads: Reads
    positions: Positions


@dataclass(frozen=True)
class Form:
    """How a model is run, so that each text gives what it gives alone and each adapted layer serves one client.

    Attributes:
        shared: which texts (or other inputs) may share a pass.
        packing: how it takes packed texts, where `shared` is PACKED.
        left: padding stands before a text.
        masked: it takes an attention mask.
        split: its head can be run on what its body gave (see `heads.Head`); else the model is run as a whole.
        apart: some adapted layer sees other rows than the tokens, so a pass holds one client.
        shape: of an input, where `shared` is STACKED, and `rows`, as how many rows adapted layers see it.
        tokens: it answers for each token what follows, as language models do; else for each input.
    """

    shared: Shared = Shared.PADDED
    packing: Packing | None = None
    left: bool = False
    masked: bool = True
    split: bool = True
    apart: bool = False
    shape: tuple[int, ...] = ()
    rows: int = 0
    tokens: bool = False

    @property
    def padding(self) -> str:
        """Where plain transformers may pad its texts: "right", "left", or "none", where padding changes what a text gives."""
        if self.shared in (Shared.ONE_LENGTH, Shared.ONE_TEXT):
            return "none"
        return "left" if self.left else "right"


@dataclass(frozen=True)
class Inputs:
    """Inputs for one forward pass. Packed texts: token ids and positions (1, rows), `layout` says where each begins, `read`
    (texts,) is the row that the head reads. Padded: token ids (texts, longest) with their mask, no layout. Stacked: (n, *shape).

    Attributes:
        values: what the model is given.
        lengths: rows of each input, (inputs,): a text's tokens, or the padded length.
    """

    values: Tensor
    lengths: np.ndarray
    positions: Tensor | None = None
    mask: Tensor | None = None
    layout: attention.Layout | None = None
    read: Tensor | None = None


def sharing(shared: Shared, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Positions, ascending, of the texts of each forward pass, among texts of these lengths, (texts,)."""
    if shared is Shared.ONE_TEXT:
        yield from np.arange(len(lengths))[:, None]
    elif shared is Shared.ONE_LENGTH:
        yield from (np.flatnonzero(lengths == n) for n in np.unique(lengths))
    elif len(lengths):
        yield np.arange(len(lengths))


def pack(ids: Sequence[np.ndarray], form: Form, pad: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Texts, given as token ids, none of them empty, or arrays of one shape, for one forward pass of a model of this form. What is
    no token is given in `dtype`."""
    if form.shared is Shared.STACKED:
        return Inputs(torch.from_numpy(np.stack(ids)).to(device, dtype), np.full(len(ids), form.rows))
    if form.packing is None:
        return _padded(ids, form.left, pad, device)
    return _packed(ids, form.packing, pad, device, by_size(device, dtype))


def by_size(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of each new size cost a compilation: oneDNN's in half precision on a CPU."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def following(inputs: Inputs, trained: Sequence[np.ndarray], left: bool) -> tuple[Tensor, Tensor, np.ndarray]:
    """Of texts that share a pass, which rows of all tokens' states are asked what follows them.

    Args:
        trained: of each text, which of its tokens are asked for, (length,) bool; never the first.
        left: padding stands before a text.

    Returns:
        the row before each such token, (t,); the token, (t,); and the text that it is of, (t,).
    """
    sizes = np.array([len(each) for each in trained])
    starts = np.cumsum(inputs.lengths) - inputs.lengths + (inputs.lengths - sizes if left else 0)
    owner = np.repeat(np.arange(len(trained)), [int(each.sum()) for each in trained])
    places = np.concatenate([start + np.flatnonzero(each) for start, each in zip(starts, trained, strict=True)]).astype(np.int64)
    rows = torch.from_numpy(places - 1).to(inputs.values.device)
    return rows, inputs.values.flatten()[rows + 1], owner


def _padded(ids: Sequence[np.ndarray], left: bool, pad: int, device: torch.device) -> Inputs:
    lengths = np.array([len(row) for row in ids])
    longest = int(lengths.max())
    inside = np.arange(longest) < lengths[:, None]
    inside = inside[:, ::-1] if left else inside
    table = np.full(inside.shape, pad, dtype=np.int64)
    table[inside] = np.concatenate(ids)
    mask = torch.from_numpy(inside.astype(np.int64)).to(device)
    return Inputs(torch.from_numpy(table).to(device), np.full(len(ids), longest), mask=mask)


def _packed(ids: Sequence[np.ndarray], packing: Packing, pad: int, device: torch.device, alike: bool) -> Inputs:
    lengths = np.array([len(row) for row in ids])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate(ids).astype(np.int64)
    places = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    words = flat != pad
    if packing.positions is Positions.AFTER_PADDING:
        seen = np.concatenate([[0], np.cumsum(words)])
        places = np.where(words, seen[1:] - np.repeat(seen[starts[:-1]], lengths), 0) + pad
    read = starts[:-1]
    if packing.reads is Reads.LAST:  # of a text that is nothing but padding tokens, transformers reads the first
        read = np.maximum(read, np.maximum.reduceat(np.where(words, np.arange(starts[-1]), 0), starts[:-1]))
    tokens, positions = (torch.from_numpy(x)[None].to(device) for x in (flat, places))
    layout = attention.lay_out(lengths, device, alike)
    return Inputs(tokens, lengths, positions, layout=layout, read=torch.from_numpy(read).to(device))
