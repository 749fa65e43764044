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
    residual, A = _double(residual), A.to(torch.float64)
    inner = A @ A.mT + penalty * torch.eye(len(A), dtype=A.dtype, device=A.device)
    X: Tensor = torch.linalg.solve(inner, times(residual, A.mT).mT).mT
    return X


def cosine_correction(B: Tensor, A: Tensor, residual: Matrix, penalty: float, steps: int) -> Tensor:
    """A stationary point X of F(X) = 1 - cos(M, (B + X) A) + penalty ||X||_F, where M = B A + residual and cos is that of the two
    as vectors. X = 0 where the gradient of the cosine is no longer than the penalty there, or where M or B A is zero.

    Proximal gradient from X = 0. A step of length t along the gradient g of the smooth part ends, for V = X - t g, in
    (1 - t penalty / ||V||)_+ V. The length is Barzilai and Borwein's, halved until the smooth part lies under its quadratic
    model, so that F never rises. It ends when a step is a 1e-12th of X, or after `steps`. In float64.

    With N = M A', G = A A' and |Y|^2 = tr(Y G Y'): cos = <N, Y> / (||M||_F |Y|) for Y = B + X. The columns of X stay in the span of
    those of B and N, so all of it is done in an orthonormal basis of 2 r columns: O(d r^2), then O(r^3) a step.
    """
    residual, B, A = _double(residual), B.to(torch.float64), A.to(torch.float64)
    lacking, G = times(residual, A.mT), A @ A.mT
    N = B @ G + lacking
    length_of_M = (((B @ G) * B).sum() + 2 * (lacking * B).sum() + norm(residual).square()).clamp_min(0).sqrt()
    basis, inside = torch.linalg.qr(torch.cat([B, N], dim=1))
    b, n = inside.tensor_split(2, dim=1)

    def smooth(X: Tensor) -> tuple[Tensor, Tensor] | None:
        """1 - cos and its gradient; None where there is no angle."""
        YG = (b + X) @ G
        square = (YG * (b + X)).sum()
        lengths = length_of_M * square.clamp_min(0).sqrt()
        if not 0 < lengths < torch.inf:
            return None
        along = (n * (b + X)).sum()
        return 1 - along / lengths, (along / square * YG - n) / lengths

    X, now = torch.zeros_like(b), smooth(torch.zeros_like(b))
    t = float(((b @ G) * b).sum() / torch.linalg.matrix_norm(G, 2))  # of the size of 1 / the curvature
    for _ in range(steps):
        if now is None:
            break
        f, g = now
        while True:
            V = X - t * g
            length = torch.linalg.vector_norm(V)
            step = (V * (1 - t * penalty / length).clamp_min(0) if length > 0 else V) - X
            new = smooth(X + step)
            if new and new[0] <= f + (g * step).sum() + step.square().sum() / (2 * t) + 1e-15:
                break
            t /= 2
        curvature = float((step * (new[1] - g)).sum())
        t = min(float(step.square().sum()) / curvature, 100 * t) if curvature > 0 else 2 * t
        X, now = X + step, new
        if torch.linalg.vector_norm(step) <= 1e-12 * torch.linalg.vector_norm(X):
            break
    correction: Tensor = basis @ X
    return correction


def _double(M: Matrix) -> Matrix:
    """In float64: products of large entries overflow smaller types."""
    return M.to(torch.float64) if isinstance(M, Tensor) else (M[0].to(torch.float64), M[1].to(torch.float64))
