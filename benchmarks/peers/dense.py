"""Server aggregation by the formulas of the papers with every matrix formed, in float32, one module.

Each takes what the clients uploaded and returns what the paper's server ends with. Products are formed a client at a time and added
up, as the public code does it, but for `flora_stacked`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Upload:
    n: int  # examples
    scale: float  # s in W + s B A
    A: Tensor  # (r_k, d_in)
    B: Tensor  # (d_out, r_k)


def by_examples(uploads: Sequence[Upload]) -> list[float]:
    """n_k / sum of n."""
    total = sum(up.n for up in uploads)
    return [up.n / total for up in uploads]


def mean(weights: Sequence[float], tensors: Iterable[Tensor]) -> Tensor:
    """sum_k w_k x_k."""
    total = torch.zeros(())
    for w, x in zip(weights, tensors, strict=True):
        total = total.add_(x, alpha=w) if total.ndim else w * x
    return total


def products(uploads: Sequence[Upload]) -> Iterator[Tensor]:
    """B_k A_k."""
    return (up.B @ up.A for up in uploads)


def updates(uploads: Sequence[Upload]) -> Iterator[Tensor]:
    """s_k B_k A_k."""
    return ((up.scale * up.B) @ up.A for up in uploads)


def flexlora(uploads: Sequence[Upload]) -> tuple[Tensor, Tensor]:
    """A = V' and B = U S of the mean, cut to the largest rank. One SVD; the public code takes one a client."""
    U, S, Vt = torch.linalg.svd(mean(by_examples(uploads), updates(uploads)), full_matrices=False)
    rank = max(len(up.A) for up in uploads)
    return Vt[:rank], U[:, :rank] * S[:rank]


def fedex_lora(uploads: Sequence[Upload], W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The averaged A and B, and W + s (mean of the products - product of the means); weights uniform."""
    weights = [1 / len(uploads)] * len(uploads)
    A, B = mean(weights, (up.A for up in uploads)), mean(weights, (up.B for up in uploads))
    residual = mean(weights, products(uploads)).sub_(B @ A)
    return A, B, W.add(residual, alpha=uploads[0].scale)


def flora(uploads: Sequence[Upload], W: Tensor) -> Tensor:
    """W + sum_k w_k s_k B_k A_k."""
    return W + mean(by_examples(uploads), updates(uploads))


def flora_stacked(uploads: Sequence[Upload], W: Tensor) -> Tensor:
    """The same by one product of the stacks, as the public code merges them."""
    B = torch.cat([w * up.scale * up.B for w, up in zip(by_examples(uploads), uploads, strict=True)], dim=1)
    return torch.addmm(W, B, torch.cat([up.A for up in uploads]))


def lora_fair(uploads: Sequence[Upload], penalty: float) -> tuple[Tensor, Tensor]:
    """The averaged A, and B moved by the ridge regression of the residual on A. (The paper's server runs SGD on it.)"""
    weights = by_examples(uploads)
    A, B = mean(weights, (up.A for up in uploads)), mean(weights, (up.B for up in uploads))
    residual = mean(weights, products(uploads)).sub_(B @ A)
    return A, B + torch.linalg.solve(A @ A.T + penalty * torch.eye(len(A)), A @ residual.T).T


def hetlora(uploads: Sequence[Upload]) -> tuple[Tensor, Tensor]:
    """Zero-padded averages of A and B, weighted by the norms of the products."""
    norms = [float(torch.linalg.norm(product)) for product in products(uploads)]
    weights, rank = [x / sum(norms) for x in norms], max(len(up.A) for up in uploads)
    A = mean(weights, (pad(up.A, (0, 0, 0, rank - len(up.A))) for up in uploads))
    return A, mean(weights, (pad(up.B, (0, rank - len(up.A))) for up in uploads))
