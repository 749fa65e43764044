"""What averaging two factors apart leaves out, and two ways to make up for it in B alone, without a d_out x d_in matrix.

With weights w_k of sum 1 and means B = sum_k w_k B_k, A = sum_k w_k A_k

    sum_k w_k B_k A_k - B A  =  sum_k w_k (B_k - B)(A_k - A)  =  sum_{k < K} w_k (B_k - B)(A_k - A_K)

The last form holds since sum_k w_k (B_k - B) = 0, and has one block less: rank (K - 1) r at most. It does not change when a
constant is added to all B_k or to all A_k, so changes do as well as values.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedlora.algebra.products import Matrix, Product, ProductMean, Tensors, norm, times
from fedlora.algebra.tensors import weighted_mean


def means_and_residuals(
    terms: Iterable[tuple[float, tuple[Tensors, Tensors]]],
) -> tuple[Tensors, Tensors, dict[str, Matrix]]:
    """The means of A and B, and module by module what the product of the means lacks of the mean of the products: a product of
    (K - 1) r ranks, or, where more ranks came than the matrix has, the matrix. One pass: memory does not grow with K.

    Args:
        terms: (w_k, (A_k, B_k)) with w_k > 0; at least one.
    """
    products: dict[str, ProductMean] = {}

    def taken(term: tuple[float, tuple[Tensors, Tensors]]) -> tuple[float, tuple[Tensors, Tensors]]:
        w, (A, B) = term
        for m in A:
            products.setdefault(m, ProductMean()).add(w, B[m], A[m])
        return term

    A, B = weighted_mean(map(taken, terms))
    return A, B, {m: _residual(mean, B[m], A[m]) for m, mean in products.items()}


def _residual(products: ProductMean, B: Tensor, A: Tensor) -> Matrix:
    if products.folded is None:
        weights, left, right = zip(*products.waiting, strict=True)
        return residual(weights, left, right)
    M = products.value()
    assert isinstance(M, Tensor)
    return M.addmm_(B.to(M.dtype), A.to(M.dtype), alpha=-1.0)


def residual(weights: Sequence[float], B: Sequence[Tensor], A: Sequence[Tensor]) -> Product:
    """Factors (d_out, (K - 1) r) and ((K - 1) r, d_in) of sum_k w_k B_k A_k - (sum_k w_k B_k)(sum_k w_k A_k), rounded to their
    dtype only at the end. The weights are brought to sum 1."""
    total = sum(weights)
    mean, last = torch.zeros_like(B[0], dtype=torch.float64), A[-1].to(torch.float64)
    for w, x in zip(weights, B, strict=True):
        mean.add_(x, alpha=w / total)
    left = [((x - mean) * (w / total)).to(x.dtype) for w, x in zip(weights[:-1], B[:-1], strict=True)]
    right = [(x - last).to(x.dtype) for x in A[:-1]]
    return torch.cat([B[0][:, :0], *left], dim=1), torch.cat([A[0][:0], *right])


def ridge_correction(A: Tensor, residual: Matrix, penalty: float) -> Tensor:
    """The X that minimises ||M - XA||_F^2 + penalty ||X||_F^2 for the residual M: M A' (A A' + penalty I)^-1. In float64."""
    N = times(residual, A.mT).to(torch.float64)
    A = A.to(torch.float64)
    return _divide(N, A @ A.mT, penalty)


def cosine_correction(B: Tensor, A: Tensor, residual: Matrix, penalty: float, steps: int) -> Tensor:
    """An X that lowers 1 - cos(M, (B + X) A) + penalty ||X||_F^2, where M = BA + residual and cos is that of the two as vectors.

    With N = M A', G = A A' and |Y|^2 = tr(Y G Y'), cos = <N, Y> / (||M||_F |Y|) for Y = B + X. Where the gradient is zero

        Y = (2 penalty B + a N) (b G + 2 penalty I)^-1,   a = 1 / (||M||_F |Y|),   b = <N, Y> / (||M||_F |Y|^3)

    and this is repeated `steps` times, from X = 0. In float64.
    """
    lacking = times(residual, A.mT).to(torch.float64)
    B, A = B.to(torch.float64), A.to(torch.float64)
    G = A @ A.mT
    N = B @ G + lacking
    length_of_M = (((B @ G) * B).sum() + 2 * (lacking * B).sum() + norm(residual).square()).clamp_min(0).sqrt()
    Y = B
    for _ in range(steps):
        length = ((Y @ G) * Y).sum().clamp_min(0).sqrt()
        if length_of_M * length == 0:  # one of the two is zero: no angle between them
            break
        a = 1 / (length_of_M * length)
        b = ((N * Y).sum() * a / length.square()).clamp_min(0)
        Y = B + _divide(a * N - b * (B @ G), b * G, 2 * penalty)
    return Y - B


def _divide(X: Tensor, G: Tensor, penalty: float) -> Tensor:
    """X (G + penalty I)^-1 for a symmetric G without negative eigenvalues."""
    inner: Tensor = torch.linalg.solve(G + penalty * torch.eye(len(G), dtype=G.dtype, device=G.device), X.mT).mT
    return inner
