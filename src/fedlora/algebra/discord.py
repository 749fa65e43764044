"""What the updates of K clients have to do with each other, by their factors alone: no d_out x d_in product is formed.

A client's product goes from P_0 = B_0 A_0 to P_k = B_k A_k; its update is U_k = P_k - P_0. With <X, Y> the sum over all entries,

    <B A, B' A'>   = sum over all entries of (B'^T B) * (A' A^T)              two r x r products
    <U_i, U_j>     = <P_i, P_j> - <P_i, P_0> - <P_0, P_j> + <P_0, P_0>        or exactly, where one factor rests,
    <U_i, U_j>     = <(B_i - B_0) A, (B_j - B_0) A>

and discord is how far the product of the means is from the mean of the products, which is what averaging factors apart gets wrong:

    || sum_k w_k B_k A_k - B A ||  =  || sum_k w_k (B_k - B)(A_k - A) ||,   B and A the means, w of sum 1

and zero when a factor is common to all.

float64 inside, so the four terms lose nothing that fp32 factors had: an update 1e-6 as long as the product keeps 4 digits.

Shapes: stacks of factors, B (K, d_out, r) and A (K, r, d_in). A stack of one stands for a factor that all clients have in common.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gram(B: Tensor, A: Tensor) -> Tensor:
    """<B_i A_i, B_j A_j>, (K, K) in float64. O(R^2 d), R the sum of ranks; where a factor is common to all, O(K^2 r d)."""
    B, A = B.to(torch.float64), A.to(torch.float64)
    if len(A) == 1:
        B, A = A.mT, B.mT  # transposed products have the same inner products
    K, r = A.shape[:2]
    if len(B) == 1:
        common: Tensor = (B[0].mT @ B[0] @ A).flatten(1) @ A.flatten(1).mT
        return common
    left, right = B.mT.flatten(0, 1), A.flatten(0, 1)  # (K r, d): client by client, rank by rank
    there = left.any(dim=1) & right.any(dim=1)  # zeros that fill up smaller ranks are left out
    left, right = left[there], right[there]
    owner = torch.arange(K, device=A.device).repeat_interleave(r)[there] == torch.arange(K, device=A.device)[:, None]
    own = owner.to(torch.float64)  # (K, ranks): 1 where a rank is the client's
    return own @ ((left @ left.mT) * (right @ right.mT)) @ own.mT


def update_gram(B0: Tensor, A0: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """<U_i, U_j> of the updates from B_0 A_0 to B_k A_k, (K, K) in float64; the starts may differ from client to client."""
    B0, A0, B, A = (x.to(torch.float64) for x in (B0, A0, B, A))
    if A.shape == A0.shape and torch.equal(A, A0):
        return gram(B - B0, A)
    if B.shape == B0.shape and torch.equal(B, B0):
        return gram(B, A - A0)
    K, starts = max(len(B), len(A)), max(len(B0), len(A0))
    G = gram(
        torch.cat([B0.expand(starts, -1, -1), B.expand(K, -1, -1)]),
        torch.cat([A0.expand(starts, -1, -1), A.expand(K, -1, -1)]),
    )
    return G[starts:, starts:] - G[starts:, :starts] - G[:starts, starts:] + G[:starts, :starts]


def discord(weights: Sequence[float], B: Tensor, A: Tensor) -> float:
    """The Frobenius norm of the mean of the products less the product of the means, of one module. The weights are brought to sum
    1. Exactly 0.0 when a factor is common to all."""
    if len(B) == 1 or len(A) == 1:
        return 0.0
    w = torch.tensor(weights, dtype=torch.float64, device=B.device)
    w = w / w.sum()
    B, A = B.to(torch.float64), A.to(torch.float64)
    apart = gram(B - torch.einsum("k,kor->or", w, B), A - torch.einsum("k,kri->ri", w, A))
    return float((w @ apart @ w).clamp_min(0).sqrt())
