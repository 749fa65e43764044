"""Packed attention against each sequence by itself, in float64, by the formula."""

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.models import attention
from fedlora.models.attention import laid_out, lay_out, packed_attention

LENGTHS = np.array([3, 9, 1, 8, 20, 15, 7, 2])  # the fifth pads the sixth by more than a window
HEADS, SIZE = 4, 5


def inputs(key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    rows = int(LENGTHS.sum())
    q, k, v = (torch.randn(rows, heads, SIZE, generator=g, dtype=torch.float64) for heads in (HEADS, key_heads, key_heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: int | None = None, alike: bool = False) -> Tensor:
    with laid_out(lay_out(LENGTHS, torch.device("cpu"), alike)):
        args = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return packed_attention(torch.nn.Module(), *args, None, is_causal=causal, sliding_window=window)[0][0]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: int | None = None) -> Tensor:
    ends = np.cumsum(LENGTHS)
    outs = []
    for start, end in zip(ends - LENGTHS, ends, strict=True):
        for i in range(start, end):
            seen = [j for j in range(start, end) if not causal or (j <= i and (window is None or i - j < window))]
            for h in range(HEADS):
                g = h * k.shape[1] // HEADS
                p = torch.softmax(torch.stack([q[i, h] @ k[j, g] for j in seen]) / SIZE**0.5, 0)
                outs.append(sum(w * v[j, g] for w, j in zip(p, seen, strict=True)))
    return torch.stack(outs).view(-1, HEADS, SIZE)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("key_heads", "causal", "window"), [(4, False, None), (4, True, None), (2, True, None), (1, True, 4)])
def test_it_equals_each_sequence_alone(key_heads: int, causal: bool, window: int | None, alike: bool) -> None:
    q, k, v = inputs(key_heads)
    expected, out = one_by_one(q, k, v, causal, window), ours(q, k, v, causal, window, alike)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_buckets_are_padded_to_few_sizes() -> None:
    layout = lay_out(np.array([3, 9, 1, 8, 20, 7, 2, 100, 90, 130]), torch.device("cpu"), alike=True)
    sizes = [tuple(bucket.rows.shape) for bucket in layout.buckets]
    assert all(longest % 8 == 0 and count % 4 == 0 if longest <= 64 else longest % 32 == 0 for count, longest in sizes)
    assert sum(count for count, longest in sizes if longest > 64) == 3  # of long ones there are no copies


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("broken", range(len(LENGTHS)))
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_that_is_not_finite_reaches_no_other(broken: int, causal: bool, alike: bool) -> None:
    """Clients share a pass: one that diverged must not spoil the others, in the output or in the gradients."""
    ends = np.cumsum(LENGTHS)
    own = torch.zeros(int(ends[-1]), dtype=torch.bool)
    own[ends[broken] - LENGTHS[broken] : ends[broken]] = True
    clean = inputs()
    spoilt = tuple(x.detach().clone().masked_fill_(own[:, None, None], torch.nan).requires_grad_() for x in clean)
    outs = [ours(*each, causal=causal, alike=alike) for each in (clean, spoilt)]
    assert torch.equal(outs[0][~own], outs[1][~own]) and outs[1][own].isnan().all()
    grads = [torch.autograd.grad(o.sum(), each) for o, each in zip(outs, (clean, spoilt), strict=True)]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine[~own], theirs[~own])


def test_the_kernel_of_a_gpu_gets_a_key_head_for_each_query_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every version of PyTorch's shares key heads, and some have no such kernel at all."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *bounds: object, scale: float, window_size: tuple[int, int]) -> Tensor:
        assert q.shape == k.shape == v.shape and scale == SIZE**-0.5 and window_size == (3, 0)
        return one_by_one(q, k, v, causal=True, window=window_size[0] + 1)

    q, k, v = inputs(2)
    layout = lay_out(LENGTHS, torch.device("cpu"))
    found = attention._on_gpu(kernel, q, k, v, layout, SIZE**-0.5, True, 4)
    torch.testing.assert_close(found, one_by_one(q, k, v, True, 4), atol=1e-12, rtol=0)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    attention._kernel.cache_clear()
    assert attention._kernel() is None
    monkeypatch.undo()
    attention._kernel.cache_clear()
    assert attention._kernel() is not None
