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
SHORT = 64  # keys, up to which half precision's softmax is computed in fp32, and buckets are padded to few counts
FILL = 0.75  # the shortest sequence of a bucket has at least this share of the longest one's length


@dataclass(frozen=True)
class Bucket:
    """n sequences of similar length. `rows`, (n, longest), is the row of each of their tokens, and, where `pad`, (n, longest), is
    True, that of their own last one: a client that diverged must reach nobody else, and even a hidden key spoils what it is hidden
    from when it is NaN. `pad` is None where there is no padding. The last sequences may be copies, which nobody reads."""

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


def lay_out(lengths: np.ndarray, device: torch.device, alike: bool = False) -> Layout:
    """The layout of sequences of these lengths, (sequences,).

    Args:
        alike: buckets are padded to few sizes. In half precision on a CPU each new size of a product costs what twenty products
            do, for oneDNN compiles it.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    first, width = np.zeros(starts[-1], dtype=np.int64), np.zeros(starts[-1], dtype=np.int64)
    place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    buckets: list[Bucket] = []
    taken = 0
    for members in _by_length(lengths):
        longest, copies = int(lengths[members].max()), 0
        if alike:
            longest, copies = _sizes(longest, len(members))
        inside = np.arange(longest) < lengths[members, None]
        rows = starts[members, None] + np.minimum(np.arange(longest), lengths[members, None] - 1)
        here = taken + np.arange(len(members)) * longest
        first[rows[inside]] = np.repeat(here, lengths[members])
        width[rows[inside]] = longest
        rows, pad = (np.concatenate([x, x[-1:].repeat(copies, axis=0)]) for x in (rows, ~inside))
        taken += rows.size
        buckets.append(Bucket(torch.from_numpy(rows).to(device), torch.from_numpy(pad).to(device) if pad.any() else None))
    bounds, places = torch.from_numpy(starts.astype(np.int32)), [torch.from_numpy(x).to(device) for x in (first, width, place)]
    return Layout(tuple(buckets), places[0], places[1], places[2], bounds.to(device), int(lengths.max()))


def _sizes(longest: int, count: int) -> tuple[int, int]:
    """What a bucket is padded to: its longest sequence's length, and how many copies make up its count."""
    step = 8 if longest <= SHORT else 32
    return -(-longest // step) * step, -count % 4 if longest <= SHORT else 0


def _by_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of the sequences of each bucket, the longest ones first."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        fits = int((lengths[order] >= FILL * lengths[order[0]]).sum())
        yield np.sort(order[:fits])
        order = order[fits:]


@dataclass(frozen=True)
class Block:
    """A bucket as attention computes it.

    Attributes:
        count, longest: sequences, and places of each.
        places: where its (sequence, head, place) lie among those of all buckets.
        bias: what is added to scores, 0, or -inf where a query does not see a key: (longest, longest), or (count, 1, 1 or longest,
            longest) where it differs by sequence; None where all see all.
        keep: 0 for padded queries, (count, 1, longest, 1); None where there is no padding.
    """

    count: int
    longest: int
    places: slice
    bias: Tensor | None
    keep: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What all layers of a pass have in common: which row of a matrix (rows * heads, size) each (sequence, head, place) is, of
    queries and of the keys that they read, and where each (row, head) finds its place again."""

    queries: Tensor
    keys: Tensor
    inverse: Tensor
    blocks: tuple[Block, ...]


def plan(layout: Layout, heads: int, shared: int, causal: bool, window: int, dtype: torch.dtype) -> Plan:
    """The plan of a layout for layers of so many query heads, `shared` of which read one key head."""
    blocks, taken = [], 0
    for bucket in layout.buckets:
        count, longest = bucket.rows.shape
        hidden = _hidden(bucket, causal, window)
        bias = None if hidden is None else torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)
        keep = None if bucket.pad is None else (~bucket.pad[:, None, :, None]).to(dtype)
        blocks.append(Block(count, longest, slice(taken, taken := taken + count * heads * longest), bias, keep))
    queries, keys = (torch.cat([_index(bucket.rows, heads, each) for bucket in layout.buckets]) for each in (1, shared))
    return Plan(queries, keys, _inverse(layout, heads), tuple(blocks))


Plans = dict[tuple[int, int, bool, int, torch.dtype], Plan]
_layout: ContextVar[tuple[Layout, Plans]] = ContextVar("layout")


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Within it, packed attention is over these sequences."""
    token = _layout.set((layout, {}))
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """Where the sequences of the pass that is under way lie; None outside one of packed sequences."""
    found = _layout.get(None)
    return None if found is None else found[0]


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
    layout, plans = _layout.get()
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
    kind = (q.shape[1], q.shape[1] // k.shape[1], causal, window, q.dtype)
    if kind not in plans:  # the first layer of its kind
        plans[kind] = plan(layout, *kind)
    out: Tensor = _Bucketed.apply(q, k, v, plans[kind], scale, softcap)  # type: ignore[no-untyped-call]
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
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, cap: float | None) -> Tensor:
        rows, heads, size = q.shape
        indices = (plan.queries, plan.keys, plan.keys)
        Q, K, V = (x.reshape(-1, size).index_select(0, index) for x, index in zip((q, k, v), indices, strict=True))
        out = torch.empty_like(Q)
        saved: list[Tensor] = []
        for block in plan.blocks:
            own, keys, values, outs = (x[block.places].view(-1, block.longest, size) for x in (Q, K, V, out))
            if block.bias is not None and block.bias.ndim == 2 and cap is None:  # in the product, which is a pass less
                S = torch.baddbmm(block.bias, own, keys.mT, alpha=scale)
            else:
                S = torch.bmm(own, keys.mT).mul_(scale)
                if cap is not None:
                    saved.append(S.div_(cap).tanh_())  # of which the backward pass needs the slope
                    S = saved[-1] * cap
                if block.bias is not None:
                    S.view(block.count, heads, block.longest, block.longest).add_(block.bias)
            saved.append(_softmax(S))
            torch.bmm(saved[-1], values, out=outs)
        ctx.plan, ctx.scale, ctx.cap, ctx.shapes = plan, scale, cap, (q.shape, k.shape)
        ctx.save_for_backward(Q, K, V, *saved)
        return out.index_select(0, plan.inverse).view(rows, heads, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows, heads, size), (_, key_heads, _) = ctx.shapes
        plan: Plan = ctx.plan
        Q, K, V, *saved = ctx.saved_tensors  # read once: a pass that is checkpointed is computed again for it
        G = grad.reshape(-1, size).index_select(0, plan.queries)
        slopes = [torch.empty_like(Q) for _ in range(3)]
        each = 1 if ctx.cap is None else 2
        for i, block in enumerate(plan.blocks):
            own, keys, values, g, dq, dk, dv = (x[block.places].view(-1, block.longest, size) for x in (Q, K, V, G, *slopes))
            *capped, P = saved[each * i : each * i + each]
            if block.keep is not None:  # padded queries must not reach the gradients of keys and values
                g.view(block.count, heads, block.longest, size).mul_(block.keep)
            torch.bmm(P.mT, g, out=dv)
            S = torch._softmax_backward_data(torch.bmm(g, values.mT), P, -1, P.dtype).mul_(ctx.scale)
            for tanh in capped:
                S = S * (1 - tanh.square())
            torch.bmm(S, keys, out=dq)
            torch.bmm(S.mT, own, out=dk)
        q, k, v = (x.index_select(0, plan.inverse) for x in slopes)
        k, v = (x.view(rows, key_heads, -1, size).sum(2) if key_heads != heads else x.view(rows, heads, size) for x in (k, v))
        return q.view(rows, heads, size), k, v, None, None, None


def _softmax(S: Tensor) -> Tensor:
    """Over the last axis. Short rows of half precision are several times faster by way of fp32 on a CPU."""
    if S.dtype in (torch.bfloat16, torch.float16) and S.shape[-1] <= SHORT:
        return torch.softmax(S, dim=-1, dtype=torch.float32).to(S.dtype)
    return torch.softmax(S, dim=-1)


def _index(rows: Tensor, heads: int, shared: int = 1) -> Tensor:
    """Where (sequence, head, place) finds its row in a matrix (rows * heads / shared, size)."""
    head = torch.arange(heads, device=rows.device) // shared
    return (rows[:, None, :] * (heads // shared) + head[:, None]).flatten()


def _inverse(layout: Layout, heads: int) -> Tensor:
    """Where (row, head) finds its place among those of all buckets."""
    head = torch.arange(heads, device=layout.first.device)
    return (layout.first[:, None] * heads + head * layout.width[:, None] + layout.place[:, None]).flatten()


def _hidden(bucket: Bucket, causal: bool, window: int) -> Tensor | None:
    """Which keys a query does not see: (longest, longest), or, where it differs by sequence, what broadcasts to (n, heads, longest,
    longest)."""
    longest = bucket.rows.shape[1]
    hidden = None if bucket.pad is None else bucket.pad[:, None, None, :]
    if causal:
        i = torch.arange(longest, device=bucket.rows.device)
        outside = (i > i[:, None]) | (i <= i[:, None] - window)
        # A padded query may have nothing but padding in its window. It sees itself, for a softmax over nothing is no number.
        hidden = outside if hidden is None else (hidden | outside) & (i != i[:, None])
    return hidden
