"""Attention over packed sequences: rows of one matrix, no padding outside this file.

On a CPU the sequences are gathered by bucket of similar length into (sequences * heads, longest, head size) blocks, and each block
is two batched products around a softmax: on short texts several times faster than the fused kernels, whose backward pass is slow
there. On a GPU it is the variable-length kernel. transformers calls it by name, as one of its attention functions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAME = "fedlora_packed"
FILL = 0.75  # the shortest sequence of a bucket has at least this share of the longest one's length


@dataclass(frozen=True)
class Bucket:
    """n sequences of similar length. `rows`, (n, longest), is the row of each of their tokens, and, where `pad`, (n, longest), is
    True, that of their own last one: a client that diverged must reach nobody else, and even a hidden key spoils what it is hidden
    from when it is NaN. `pad` is None where there is no padding."""

    rows: Tensor
    pad: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed matrix lie, in order, without gaps.

    Attributes:
        buckets: the sequences, by length.
        first, width, place: of each row, (rows,): where its sequence begins among the places of all buckets, how many places it
            has there, and which of them is the row's.
        bounds: (sequences + 1,) int32, the first row of each sequence and the end.
        longest: tokens of the longest sequence.
    """

    buckets: tuple[Bucket, ...]
    first: Tensor
    width: Tensor
    place: Tensor
    bounds: Tensor
    longest: int


def lay_out(lengths: np.ndarray, device: torch.device) -> Layout:
    """The layout of sequences of these lengths, (sequences,)."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first, width = np.zeros(starts[-1], dtype=np.int64), np.zeros(starts[-1], dtype=np.int64)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    buckets: list[Bucket] = []
    taken = 0
    for members in _by_length(lengths):
        longest = int(lengths[members].max())
        inside = np.arange(longest) < lengths[members, None]
        rows = starts[members, None] + np.minimum(np.arange(longest), lengths[members, None] - 1)
        here = taken + np.arange(len(members)) * longest
        first[rows[inside]] = np.repeat(here, lengths[members])
        width[rows[inside]] = longest
        taken += rows.size
        pad = None if inside.all() else torch.from_numpy(~inside).to(device)
        buckets.append(Bucket(torch.from_numpy(rows).to(device), pad))
    bounds, places = torch.from_numpy(starts.astype(np.int32)), [torch.from_numpy(x).to(device) for x in (first, width, place)]
    return Layout(tuple(buckets), places[0], places[1], places[2], bounds.to(device), int(lengths.max()))


def _by_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the sequences of each bucket, the longest ones first."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        fits = int((lengths[order] >= FILL * lengths[order[0]]).sum())
        yield np.sort(order[:fits])
        order = order[fits:]


_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Within it, packed attention is over these sequences."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """Where the sequences of the pass that is under way lie; None outside one of packed sequences."""
    return _layout.get(None)


def register() -> None:
    """Make packed attention known to transformers as NAME. There is no mask function of that name, so models make no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (1, heads, rows, size), key and value (1, key heads, rows, size) -> (1, rows, heads, size).

    Raises:
        NotImplementedError: the model wants something of its attention that this one does not do.
    """
    layout = _layout.get()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    strange = [name for name in ("s_aux", "position_bias", "head_mask") if kwargs.get(name) is not None]
    window = layout.longest if sliding_window is None else sliding_window
    if attention_mask is not None or dropout or strange or (sliding_window is not None and not causal):
        raise NotImplementedError(f"{type(module).__name__} wants a mask, dropout or a window that packed attention lacks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    can = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and softcap is None
    kernel = _kernel() if can else None
    if kernel is not None:
        return _on_gpu(kernel, q, k, v, layout, scale, causal, window)[None], None
    out: Tensor = _Bucketed.apply(q, k, v, layout, scale, causal, window, softcap)  # type: ignore[no-untyped-call]
    return out[None], None


@cache
def _kernel() -> Callable[..., Any] | None:
    """PyTorch's variable-length attention; None where this version has none, or one without a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= set(signature(varlen_attn).parameters) else None


def _on_gpu(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, causal: bool, window: int
) -> Tensor:
    around = (window - 1 if window < layout.longest else -1, 0 if causal else -1)
    if q.shape[1] != k.shape[1]:  # not every version reads one key head for several query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = kernel(q, k, v, layout.bounds, layout.bounds, layout.longest, layout.longest, scale=scale, window_size=around)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


class _Bucketed(torch.autograd.Function):
    """q (rows, heads, size), k and v (rows, key heads, size) -> (rows, heads, size). With a cap, a score s counts as
    cap * tanh(s / cap)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        scale: float,
        causal: bool,
        window: int,
        cap: float | None,
    ) -> Tensor:
        rows, heads, size = q.shape
        shared = heads // k.shape[1]  # query heads that read one key head
        flat = [x.reshape(-1, size) for x in (q, k, v)]
        outs: list[Tensor] = []
        saved: list[Tensor] = []
        for bucket in layout.buckets:
            Q = flat[0].index_select(0, _index(bucket.rows, heads))
            K, V = (x.index_select(0, _index(bucket.rows, heads, shared)) for x in flat[1:])
            Q, K, V = (x.view(-1, bucket.rows.shape[1], size) for x in (Q, K, V))
            hidden = _hidden(bucket, heads, causal, window)
            P = torch.bmm(Q, K.mT).mul_(scale)
            capped = None if cap is None else P.div_(cap).tanh_()  # of which the backward pass needs the slope
            P = P if capped is None or cap is None else capped * cap
            if hidden is not None:
                P = P.view(len(bucket.rows), heads, *P.shape[1:]).masked_fill_(hidden, -torch.inf).view_as(P)
            P = torch.softmax(P, dim=-1)
            if bucket.pad is not None:  # padded queries must not reach the gradients of keys and values
                P.view(len(bucket.rows), heads, *P.shape[1:]).masked_fill_(bucket.pad[:, None, :, None], 0.0)
            outs.append(torch.bmm(P, V).view(-1, size))
            saved += [Q, K, V, P] if capped is None else [Q, K, V, P, capped]
        ctx.layout, ctx.scale, ctx.cap, ctx.shapes = layout, scale, cap, (q.shape, k.shape)
        ctx.save_for_backward(*saved)
        return torch.cat(outs).index_select(0, _inverse(layout, heads)).view(rows, heads, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, heads, size), (_, key_heads, _) = ctx.shapes
        layout: Layout = ctx.layout
        flat = grad.reshape(-1, size)
        grads: list[list[Tensor]] = [[], [], []]
        saved = ctx.saved_tensors  # read once: a pass that is checkpointed is computed again for it
        for i, bucket in enumerate(layout.buckets):
            each = 4 if ctx.cap is None else 5
            Q, K, V, P, *capped = saved[each * i : each * i + each]
            G = flat.index_select(0, _index(bucket.rows, heads)).view(Q.shape)
            grads[2].append(torch.bmm(P.mT, G))
            S = torch._softmax_backward_data(torch.bmm(G, V.mT), P, -1, P.dtype).mul_(ctx.scale)
            for tanh in capped:
                S = S * (1 - tanh.square())
            grads[0].append(torch.bmm(S, K))
            grads[1].append(torch.bmm(S.mT, Q))
        inverse = _inverse(layout, heads)
        q, k, v = (torch.cat([x.view(-1, size) for x in each]).index_select(0, inverse) for each in grads)
        k, v = (x.view(rows, key_heads, -1, size).sum(2) if key_heads != heads else x.view(rows, heads, size) for x in (k, v))
        return q.view(rows, heads, size), k, v, None, None, None, None, None


def _index(rows: Tensor, heads: int, shared: int = 1) -> Tensor:
    """Where (sequence, head, place) finds its row in a matrix (rows * heads / shared, size)."""
    head = torch.arange(heads, device=rows.device) // shared
    return (rows[:, None, :] * (heads // shared) + head[:, None]).flatten()


def _inverse(layout: Layout, heads: int) -> Tensor:
    """Where (row, head) finds its place among those of all buckets."""
    head = torch.arange(heads, device=layout.first.device)
    return (layout.first[:, None] * heads + head * layout.width[:, None] + layout.place[:, None]).flatten()


def _hidden(bucket: Bucket, heads: int, causal: bool, window: int) -> Tensor | None:
    """Which keys a query does not see: broadcasts to (n, heads, longest, longest)."""
    longest = bucket.rows.shape[1]
    hidden = None if bucket.pad is None else bucket.pad[:, None, None, :]
    if causal:
        i = torch.arange(longest, device=bucket.rows.device)
        outside = (i > i[:, None]) | (i <= i[:, None] - window)
        hidden = outside if hidden is None else hidden | outside
    return hidden
