"""Singular value decompositions of products of two thin matrices, B (d_out, R) and A (R, d_in), and what goes with them. The
product is formed only where that is the cheaper way."""

import torch
from torch import Tensor

from fedlora.algebra.products import Matrix, Product, norm, times, whole


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """||BA||_F, by tr((B'B)(AA')): O(R^2 (d_out + d_in)). float64 inside; a scalar of B's dtype."""
    return norm((B, A)).to(B.dtype)


def leading(M: Matrix, rank: int) -> Product:
    """The best approximation of M at a rank (Eckart and Young): B = U S (d_out, q), A = V' (q, d_in) with orthonormal rows, and
    q = min(rank, the ranks of a product, d_out, d_in). Singular values fall; signs and rows as in `factored_svd`.

    float64 goes by the SVD. For float32 V are the eigenvectors of M'M, in float64 and only as many as asked for, and U S = M V:
    several times cheaper. Squaring takes half of float64's sixteen digits, and what is left is more than float32 factors carry:
    singular values are right to 1e-8 of the largest. A product is multiplied out where `factored_pays` says no.
    """
    parts = (M,) if isinstance(M, Tensor) else M
    rank, dtype = min(rank, *(n for part in parts for n in part.shape)), parts[0].dtype
    M = M.to(torch.float64) if isinstance(M, Tensor) else _cheaper((M[0].to(torch.float64), M[1].to(torch.float64)))
    if dtype == torch.float64:
        U, S, Vt = svd(M)
        return (U * S)[:, :rank].contiguous(), Vt[:rank]
    V = _right_vectors(M, rank)
    scaled = times(M, V)
    sign = _signs(scaled)
    return (scaled * sign).to(dtype).contiguous(), (V * sign).mT.to(dtype).contiguous()


def _right_vectors(M: Matrix, count: int) -> Tensor:
    """(d_in, count): the first right singular vectors of M, from the smallest symmetric matrix that has its eigenvalues: M'M,
    M M', or, with the R of a QR of B, R (A A') R'."""
    if isinstance(M, Tensor):
        if M.shape[0] >= M.shape[1]:
            return _eigenvectors(M.mT @ M, count)
        columns = M.mT @ _eigenvectors(M @ M.mT, count)
    else:
        T = torch.linalg.qr(M[0], mode="r").R
        columns = M[1].mT @ (T.mT @ _eigenvectors(T @ (M[1] @ M[1].mT) @ T.mT, count))
    V: Tensor = torch.linalg.qr(columns).Q  # orthogonal already, of lengths S, but for rounding
    return V


def factored_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of BA.

    By QR of both factors and an SVD of the (R, R) core, or, where `factored_pays` denies, an SVD of the product. Computed in
    float64 and returned in B's dtype. Signs are fixed: the entry of largest magnitude of every left vector is positive. Rows are
    contiguous, whatever LAPACK left: the bits of later products depend on it.

    Returns:
        U (d_out, q), S (q,) falling, Vt (q, d_in), with q = min(R, d_out, d_in).
    """
    U, S, Vt = svd(_cheaper((B.to(torch.float64), A.to(torch.float64))))
    q = min(len(S), len(A))  # of a product that was formed there may be more
    return U[:, :q].to(B.dtype).contiguous(), S[:q].to(B.dtype), Vt[:q].to(B.dtype)


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Those of BA in float64, falling, (min(R, d_out, d_in),): of the small core between the QRs of both factors."""
    left, right = (torch.linalg.qr(X.to(torch.float64), mode="r").R for X in (B, A.mT))
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def svd(M: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of M as it is given, in its own dtype: of a product by its factors. Signs and rows as in `factored_svd`."""
    if isinstance(M, Tensor):
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    else:
        Q1, T1 = torch.linalg.qr(M[0])
        Q2, T2 = torch.linalg.qr(M[1].mT)
        u, S, vt = torch.linalg.svd(T1 @ T2.mT, full_matrices=False)
        U, Vt = Q1 @ u, vt @ Q2.mT
    sign = _signs(U)
    return (U * sign).contiguous(), S, (Vt * sign.mT).contiguous()


def factored_pays(d_out: int, d_in: int, R: int) -> bool:
    """Whether the SVD of a (d_out, R) by (R, d_in) product costs less by its factors than by the product.

    In multiplications, weighed to fit timings on CPUs: LAPACK's count double, and those of the product by half. By factors: a QR
    of B, A A', and an (R, R) core. By the product: itself, its Gram matrix, and a core of the smaller side. So factors pay up to
    3/4 d for square matrices, and up to 0.8 or 0.9 of the smaller side where the other is four times as long.
    """
    small, large = min(d_out, d_in), max(d_out, d_in)
    factored = 2 * d_out * R**2 + d_in * R**2 + 4 * R**3
    dense = d_out * d_in * R / 2 + large * small**2 + 2 * small**3
    return factored < dense


def _cheaper(M: Product) -> Matrix:
    return M if factored_pays(len(M[0]), M[1].shape[1], len(M[1])) else whole(M)


def _eigenvectors(G: Tensor, count: int) -> Tensor:
    """(n, count): those of the largest eigenvalues of a symmetric matrix, falling."""
    import scipy.linalg  # computes a few of them, which torch does not

    n = len(G)
    if not count:
        return G[:, :0]
    vectors = scipy.linalg.eigh(G.cpu().numpy(), subset_by_index=(n - count, n - 1))[1]
    return torch.from_numpy(vectors[:, ::-1].copy()).to(G.device)


def _signs(U: Tensor) -> Tensor:
    """(1, q) of 1 and -1: what makes the entry of largest magnitude of every column positive."""
    sign = torch.gather(U, 0, U.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.where(sign == 0, torch.ones_like(sign), sign)


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


def at_rank(M: Matrix, rank: int) -> Product:
    """`leading` with exactly `rank` ranks: where M has fewer, B is zero and A orthonormal, so that they can learn."""
    scaled, Vt = leading(M, rank)
    return pad_rank(scaled, Vt, rank)[0], complete_rows(Vt, rank)


def pad_rank(B: Tensor, A: Tensor, rank: int) -> Product:
    """B (d_out, rank) and A (rank, d_in) with zeros past the rank they have; the product is unchanged."""
    missing = rank - A.shape[0]
    return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))


def principal(W: Tensor, rank: int) -> Product:
    """The best approximation of a matrix at a rank, its singular values shared evenly: B = U S^1/2 and A = S^1/2 V'.

    Past the smaller side of W, B is zero and A orthonormal, as far as there are directions left.
    """
    tall = W.shape[0] >= W.shape[1]
    scaled, Vt = leading(W if tall else W.mT, min(rank, *W.shape))
    S = torch.linalg.vector_norm(scaled, dim=0)
    U = scaled / S.where(S > 0, 1.0)
    U, Vt = (U, Vt) if tall else (Vt.mT, U.mT)
    B, _ = pad_rank(U * S.sqrt(), Vt, rank)
    A = complete_rows(Vt, rank).clone(memory_format=torch.contiguous_format)
    A[: len(S)] *= S.sqrt()[:, None]
    return B.contiguous(), A


def energy_rank(S: Tensor, share: float, noise: float = 0.0) -> int:
    """The smallest p with sum_{i < p} S_i^2 >= share * sum S_i^2, for falling S; at share 1 the number of those above zero. What is
    not above `noise` S_0 counts as zero: with `rounding` that is the numerical rank.

    The tail is summed from its small end, so that nothing is lost in the sum of the large ones.
    """
    S = S.to(torch.float64)
    tail = S.where(noise * S[:1] < S, 0.0).square().flip(0).cumsum(0).flip(0)
    return int((tail > (1.0 - share) * tail[:1]).sum())


def rounding(d_out: int, d_in: int, dtype: torch.dtype) -> float:
    """The share of the largest singular value of a matrix of this dtype up to which others may be nothing but rounding."""
    return max(d_out, d_in) * torch.finfo(dtype).eps
