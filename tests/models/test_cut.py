"""A result cut to a rank: the best there is by the SVD of the dense change, and what it loses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.models import peft
from fedlora.models.cut import can_be_cut, cut
from fedlora.types import BaseUpdate, Factors, Mix, Model


def diagonal(*values: float) -> Factors:
    """diag(values) as BA in module a."""
    return Factors({"a": torch.eye(len(values))}, {"a": torch.diag(torch.tensor(values))}, 1.0)


def test_what_is_lost_by_hand() -> None:
    """a = diag(4, 3) at rank 1 loses 3 of 5; b has rank 1 and is 12 long: of both, 3 of sqrt(25 + 144) = 13."""
    b = Factors({"b": torch.tensor([[0.0, 1.0, 0.0]])}, {"b": torch.tensor([[12.0], [0.0]])}, 1.0)
    a = diagonal(4.0, 3.0)
    both = Model({"x": Factors({**a.A, **b.A}, {**a.B, **b.B}, 1.0)})
    one, lost = cut(both, 1)
    assert (lost.rank, lost.worst) == (1, "a")
    assert lost.error == pytest.approx(3 / 13) and lost.worst_error == pytest.approx(3 / 5)
    assert torch.equal(one.slots["cut"].B["b"], b.B["b"]) and torch.equal(one.slots["cut"].A["b"], b.A["b"])
    assert str(lost) == "cut to rank 1: relative error 23 % (Frobenius norm, all modules), 60 % in a"
    same, nothing = cut(both, 2)
    assert nothing.error == nothing.worst_error == 0.0 and torch.equal(same.slots["cut"].A["a"], a.A["a"])


def random(rank: int, seed: int, scale: float) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(
        {m: torch.randn(rank, 9, generator=draw) for m in ("p", "q")},
        {m: torch.randn(n, rank, generator=draw) for m, n in (("p", 7), ("q", 12))},
        scale,
    )


def test_it_is_the_best_of_its_rank_of_the_whole_change() -> None:
    """Two weighed slots, a merged pair and a dense change, multiplied out by numpy; Eckart and Young's bound by its SVD."""
    dense = torch.randn(12, 9, generator=torch.Generator().manual_seed(5))
    slots = {"x": random(2, 1, 0.5), "y": random(3, 2, 2.0)}
    model = Model(slots, BaseUpdate(pairs=(random(2, 3, 1.5),), dense={"q": dense}), gate=Mix({"x": 0.25, "y": 0.75}))
    whole = {"p": np.zeros((7, 9)), "q": dense.double().numpy()}
    for f, weight in ((slots["x"], 0.25 * 0.5), (slots["y"], 0.75 * 2.0), (model.base.pairs[0], 1.5)):
        whole = {m: W + weight * f.B[m].double().numpy() @ f.A[m].double().numpy() for m, W in whole.items()}
    small, lost = cut(model, 3)
    missing: dict[str, float] = {}
    for m, W in whole.items():
        f = small.slots["cut"]
        assert f.A[m].shape == (3, 9) and f.A[m].dtype == torch.float32
        U, S, Vt = np.linalg.svd(W)
        np.testing.assert_allclose(f.B[m].double() @ f.A[m].double(), (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-5)
        missing[m] = float(np.sqrt((S[3:] ** 2).sum()))
    total = np.sqrt(sum((W**2).sum() for W in whole.values()))
    assert lost.error == pytest.approx(np.hypot(*missing.values()) / total, rel=1e-6)
    shares = {m: missing[m] / np.linalg.norm(W) for m, W in whole.items()}
    assert lost.worst == max(shares, key=shares.get) and lost.worst_error == pytest.approx(shares[lost.worst], rel=1e-6)
    assert not peft.is_adapter(model) and peft.is_adapter(small)


def test_an_adapter_that_never_moved_loses_nothing() -> None:
    assert cut(Model({"x": diagonal(0.0, 0.0)}), 1)[1].error == 0.0


def test_what_can_be_cut() -> None:
    model = Model({"x": diagonal(1.0)})
    assert can_be_cut(model) and can_be_cut(Model(base=BaseUpdate(dense={"a": torch.eye(2)})))
    assert not can_be_cut(replace(model, full={"w": torch.eye(2)})) and not can_be_cut(replace(model, drop_base=True))
