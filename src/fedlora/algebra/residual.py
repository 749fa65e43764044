"""What averaging two factors apart leaves out, and two ways to make up for it in B alone. Everything by factors, in float64.

With weights w_k of sum 1 and means B = sum_k w_k B_k, A = sum_k w_k A_k

    sum_k w_k B_k A_k - B A  =  sum_k w_k (B_k - B)(A_k - A)  =  sum_{k < K} w_k (B_k - B)(A_k - A_K)

The last form holds since sum_k w_k (B_k - B) = 0, and has one block less: rank (K - 1) r at most. It does not change when a
constant is added to all B_k or to all A_k, so changes do as well as values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedlora.algebra.lowrank import product_norm


def residual(weights: Sequence[float], B: Sequence[Tensor], A: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors (d_out, (K - 1) r) and ((K - 1) r, d_in) of sum_k w_k B_k A_k - (sum_k w_k B_k)(sum_k w_k A_k). The weights are
    brought to sum 1."""
    total = sum(weights)
    shares = [w / total for w in weights]
    B64, A64 = [x.to(torch.float64) for x in B], [x.to(torch.float64) for x in A]
    mean = torch.stack([w * x for w, x in zip(shares, B64, strict=True)]).sum(0)
    left = [w * (x - mean) for w, x in zip(shares[:-1], B64[:-1], strict=True)]
    right = [x - A64[-1] for x in A64[:-1]]
    return torch.cat([mean[:, :0], *left], dim=1), torch.cat([A64[-1][:0], *right])


def ridge_correction(A: Tensor, left: Tensor, right: Tensor, penalty: float) -> Tensor:
    """The X that minimises ||LR - XA||_F^2 + penalty ||X||_F^2 for the residual LR: L (R A') (A A' + penalty I)^-1."""
    A = A.to(torch.float64)
    return _divide(left @ (right @ A.mT), A @ A.mT, penalty)


def cosine_correction(B: Tensor, A: Tensor, left: Tensor, right: Tensor, penalty: float, steps: int) -> Tensor:
    """An X that lowers 1 - cos(M, (B + X) A) + penalty ||X||_F^2, where M = BA + LR and cos is that of the two as vectors.

    With N = M A', G = A A' and |Y|^2 = tr(Y G Y'), cos = <N, Y> / (||M||_F |Y|) for Y = B + X. Where the gradient is zero

        Y = (2 penalty B + a N) (b G + 2 penalty I)^-1,   a = 1 / (||M||_F |Y|),   b = <N, Y> / (||M||_F |Y|^3)

    and this is repeated `steps` times, from X = 0. M, which is d_out x d_in, is never formed.
    """
    B, A = B.to(torch.float64), A.to(torch.float64)
    G = A @ A.mT
    N = B @ G + left @ (right @ A.mT)
    norm = product_norm(torch.cat([B, left], dim=1), torch.cat([A, right]))
    Y = B
    for _ in range(steps):
        length = ((Y @ G) * Y).sum().clamp_min(0).sqrt()
        if norm * length == 0:  # one of the two is zero: no angle between them
            break
        a = 1 / (norm * length)
        b = ((N * Y).sum() * a / length.square()).clamp_min(0)
        Y = B + _divide(a * N - b * (B @ G), b * G, 2 * penalty)
    return Y - B


def _divide(X: Tensor, G: Tensor, penalty: float) -> Tensor:
    """X (G + penalty I)^-1 for a symmetric G without negative eigenvalues."""
    inner: Tensor = torch.linalg.solve(G + penalty * torch.eye(len(G), dtype=G.dtype, device=G.device), X.mT).mT
    return inner
