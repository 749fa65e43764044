"""Products of two thin matrices, handled by their factors. B is (d_out, R), A is (R, d_in); the product is never formed
unless that is the cheaper way."""

import torch
from torch import Tensor


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """||BA||_F, by tr((B'B)(AA')): O(R^2 (d_out + d_in)). float64 inside; a scalar of B's dtype."""
    B64, A64 = B.to(torch.float64), A.to(torch.float64)
    return ((B64.mT @ B64) * (A64 @ A64.mT)).sum().clamp_min(0).sqrt().to(B.dtype)


def factored_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of BA.

    With R < min(d_out, d_in): QR of both factors and an SVD of the (R, R) core, O((d_out + d_in) R^2 + R^3); otherwise an
    SVD of the product. Computed in float64 and returned in B's dtype. Signs are fixed: the entry of largest magnitude of
    every left vector is positive. Rows are contiguous, whatever LAPACK left: the bits of later products depend on it.

    Returns:
        U (d_out, q), S (q,) falling, Vt (q, d_in), with q = min(R, d_out, d_in).
    """
    dtype, B, A = B.dtype, B.to(torch.float64), A.to(torch.float64)
    if B.shape[1] < min(B.shape[0], A.shape[1]):
        Q1, T1 = torch.linalg.qr(B)
        Q2, T2 = torch.linalg.qr(A.mT)
        u, S, vt = torch.linalg.svd(T1 @ T2.mT, full_matrices=False)
        U, Vt = Q1 @ u, vt @ Q2.mT
    else:
        U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    sign = torch.gather(U, 0, U.abs().argmax(dim=0, keepdim=True)).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return (U * sign).to(dtype).contiguous(), S.to(dtype), (Vt * sign.mT).to(dtype).contiguous()


def complete_rows(V: Tensor, rows: int) -> Tensor:
    """V (q, d) with orthonormal rows, extended to `rows` orthonormal rows. The first q come back bit-identical.

    The new rows are the coordinate directions that V covers least, made orthogonal to it: no randomness. There are no more
    than d such rows: those past d are zero.
    """
    q, d = V.shape
    if rows <= q:
        return V[:rows]
    V64 = V.to(torch.float64)
    new = min(rows, d) - q
    least = V64.square().sum(dim=0).sort(stable=True).indices[:new]
    E = torch.zeros(new, d, dtype=torch.float64, device=V.device)
    E[torch.arange(new, device=V.device), least] = 1.0
    Q, _ = torch.linalg.qr(torch.cat([V64, E]).mT)
    return torch.cat([V, Q.mT[q:].to(V.dtype), V.new_zeros(max(rows - d, 0), d)])


def pad_rank(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (d_out, rank) and A (rank, d_in) with zeros past the rank they have; the product is unchanged."""
    missing = rank - A.shape[0]
    return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))
