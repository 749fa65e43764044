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


def compress(B: Tensor, A: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The product BA as factors of at most min(d_out, d_in) ranks, without loss; with a smaller `rank`, its best approximation
    (Eckart and Young). Comes back as it is where it is no wider. Otherwise the rows of A are orthonormal."""
    limit = min(B.shape[0], A.shape[1]) if rank is None else min(B.shape[0], A.shape[1], rank)
    if B.shape[1] <= limit:
        return B, A
    U, S, Vt = factored_svd(B, A)
    return (U * S)[:, :limit].contiguous(), Vt[:limit]


def principal(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix at a rank, its singular values shared evenly: B = U S^1/2 and A = S^1/2 V'.

    Past the smaller side of W, B is zero and A orthonormal, as far as there are directions left.
    """
    if 4 * rank <= min(W.shape):  # the eigenvectors of the smaller Gram matrix: several times faster, and as good for the largest
        tall = W.to(torch.float64) if W.shape[0] >= W.shape[1] else W.to(torch.float64).mT
        V = torch.linalg.eigh(tall.mT @ tall).eigenvectors[:, -rank:].flip(1)
        U, S, Vt = factored_svd(tall @ V, V.mT)
        U, S, Vt = (U, S, Vt) if W.shape[0] >= W.shape[1] else (Vt.mT, S, U.mT)
        U, S, Vt = U.to(W.dtype), S.to(W.dtype), Vt.to(W.dtype)
    else:
        U, S, Vt = factored_svd(W, torch.eye(W.shape[1], dtype=W.dtype, device=W.device))
    U, root, Vt = U[:, :rank], S[:rank].sqrt(), Vt[:rank]
    B, _ = pad_rank(U * root, Vt, rank)
    A = complete_rows(Vt, rank).clone(memory_format=torch.contiguous_format)
    A[: len(root)] *= root[:, None]
    return B.contiguous(), A


def energy_rank(S: Tensor, share: float) -> int:
    """The smallest p with sum_{i < p} S_i^2 >= share * sum S_i^2, for falling S; at share 1 the number of those above zero.

    The tail is summed from its small end, so that nothing is lost in the sum of the large ones.
    """
    tail = S.to(torch.float64).square().flip(0).cumsum(0).flip(0)
    return int((tail > (1.0 - share) * tail[:1]).sum())
