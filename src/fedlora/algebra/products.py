"""Matrices given as a product of two thin ones, and sums of many such products.

B is (d_out, R) and A is (R, d_in); BA is formed only where that is the cheaper way.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)  # a module, or a part of one
Tensors = Mapping[str, Tensor]
Product = tuple[Tensor, Tensor]  # (B, A) for BA
Matrix = Tensor | Product


@dataclass
class ProductMean:
    """sum_k w_k s_k B_k A_k / sum_k w_k of one module, taken up one term at a time.

    Terms wait as factors while they have no more ranks together than the matrix, min(d_out, d_in); past that they are added to the
    matrix in one product. So memory does not grow with their number: the matrix, and factors of about twice its size. Sums are in
    float64, and the mean in the dtype of the terms.
    """

    total: float = 0.0
    waiting: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)  # w_k s_k, B_k, A_k
    ranks: int = 0  # of those that wait
    folded: Tensor | None = None  # the sum of those before

    def add(self, weight: float, B: Tensor, A: Tensor, scale: float = 1.0) -> None:
        if self.ranks > min(B.shape[0], A.shape[1]):
            self._fold()
        self.waiting.append((weight * scale, B, A))
        self.ranks += len(A)
        self.total += weight

    def value(self) -> Matrix:
        """The mean: a product as long as nothing was folded, then a matrix. To be asked for once, at the end."""
        dtype = self.waiting[0][1].dtype
        if self.folded is None:
            B, A = self._stack(self.total)
            return B.to(dtype), A.to(dtype)
        self._fold()
        return self.folded.div_(self.total).to(dtype)

    def _fold(self) -> None:
        B, A = self._stack(1.0)
        self.folded = B @ A if self.folded is None else self.folded.addmm_(B, A)
        self.waiting.clear()
        self.ranks = 0

    def _stack(self, total: float) -> Product:
        """Factors of the sum of those that wait over a total, in float64."""
        B = torch.cat([B for _, B, _ in self.waiting], dim=1).to(torch.float64)
        A = torch.cat([A for _, _, A in self.waiting]).to(torch.float64)
        by_rank = [w / total for w, _, A in self.waiting for _ in range(len(A))]
        return B * torch.tensor(by_rank, dtype=B.dtype, device=B.device), A


def mean_of_products(terms: Iterable[tuple[float, float, Mapping[Key, Tensor], Mapping[Key, Tensor]]]) -> dict[Key, Matrix]:
    """sum_k w_k s_k B_k A_k / sum_k w_k of every module, over the terms that have it, in one pass.

    Args:
        terms: (w_k, s_k, B_k, A_k) with w_k >= 0 and not all zero. Ranks may differ.
    """
    means: dict[Key, ProductMean] = {}
    for w, s, B, A in terms:
        for m in B:
            means.setdefault(m, ProductMean()).add(w, B[m], A[m], s)
    return {m: mean.value() for m, mean in means.items()}


def total(parts: Sequence[Matrix]) -> Matrix:
    """The sum of at least one: a product where all parts are products, else a matrix."""
    if len(parts) == 1:
        return parts[0]
    products = [part for part in parts if not isinstance(part, Tensor)]
    matrices = [part for part in parts if isinstance(part, Tensor)]
    if not matrices:
        return torch.cat([B for B, _ in products], dim=1), torch.cat([A for _, A in products])
    out = matrices[0].clone()
    for M in matrices[1:]:
        out += M
    for B, A in products:
        out.addmm_(B, A)
    return out


def whole(M: Matrix) -> Tensor:
    """The matrix itself."""
    return M if isinstance(M, Tensor) else M[0] @ M[1]


def times(M: Matrix, X: Tensor) -> Tensor:
    """M X, from right to left."""
    return M @ X if isinstance(M, Tensor) else M[0] @ (M[1] @ X)


def norm(M: Matrix) -> Tensor:
    """||M||_F as a float64 scalar; of a product by tr((B'B)(AA')), O(R^2 (d_out + d_in))."""
    if isinstance(M, Tensor):
        length: Tensor = torch.linalg.vector_norm(M, dtype=torch.float64)
        return length
    B, A = M[0].to(torch.float64), M[1].to(torch.float64)
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt()
