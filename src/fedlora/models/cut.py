"""A result cut to a lower rank, module by module, and what that takes from it.

W_N = the best approximation of a module's change W at rank N (Eckart and Young): the first N terms of its SVD
||W - W_N||_F^2 = the sum of the squares of the singular values that are left out
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedlora.algebra.lowrank import svd
from fedlora.algebra.products import Matrix
from fedlora.models import peft
from fedlora.types import Factors, Model


@dataclass(frozen=True)
class Cut:
    """What a cut to a rank takes away.

    Attributes:
        error: ||W - W_N||_F / ||W||_F, over all modules together.
        worst: the module that loses the largest share, by the same measure, of its own change.
        worst_error: that share.
    """

    rank: int
    error: float
    worst: str
    worst_error: float

    def __str__(self) -> str:
        return (
            f"cut to rank {self.rank}: relative error {percent(self.error)} (Frobenius norm, all modules), "
            f"{percent(self.worst_error)} in {self.worst}"
        )


def percent(share: float) -> str:
    """Two digits that say something, however small a share is: 12 %, 0.034 %."""
    return f"{100 * share:.2g} %"


def can_be_cut(model: Model) -> bool:
    """Whether a result is a fixed change of its modules' weights, of whatever rank, on the weights that the base has."""
    return peft.has_fixed_weights(model) and not model.full and not model.drop_base


def cut(model: Model, rank: int) -> tuple[Model, Cut]:
    """The result with at most `rank` ranks in each module, as one slot; what has no more stays as it is, to the bit.

    The SVDs are of float64; A has orthonormal rows, and B the singular values.
    """
    A: dict[str, torch.Tensor] = {}
    B: dict[str, torch.Tensor] = {}
    lost: dict[str, tuple[float, float]] = {}  # module -> squares of what is left out, and of all
    for m, W in _changes(model).items():
        U, S, Vt = svd(W.double() if isinstance(W, torch.Tensor) else (W[0].double(), W[1].double()))
        if isinstance(W, tuple) and len(W[1]) <= rank:
            B[m], A[m] = W
        else:
            B[m], A[m] = (U * S)[:, :rank].float().contiguous(), Vt[:rank].float().contiguous()
        squares = S.square()
        lost[m] = (float(squares[A[m].shape[0] :].sum()), float(squares.sum()))
    shares = {m: _share(*each) for m, each in lost.items()}
    worst = max(shares, key=lambda m: shares[m])
    whole = _share(sum(part for part, _ in lost.values()), sum(all for _, all in lost.values()))
    return Model({"cut": Factors(A, B, 1.0)}), Cut(rank, whole, worst, shares[worst])


def _changes(model: Model) -> Mapping[str, Matrix]:
    """Module -> its change, by factors where it has no dense part."""
    pairs = peft.stack(model)
    found: dict[str, Matrix] = {m: (pairs.B[m], pairs.A[m]) for m in pairs.A}
    for m, dense in model.base.dense.items():
        found[m] = dense.double() + pairs.B[m].double() @ pairs.A[m].double() if m in pairs.A else dense
    return found


def _share(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
