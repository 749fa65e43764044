"""FedIT (2305.05644)."""

from dataclasses import replace

import numpy as np
import torch
from toy import SHAPES, Trainer, dense_slot, federate, make_clients, make_setup

from fedlora.methods.fedit import FedIT, Up
from fedlora.types import SHARED, Factors, Reply, Train

METHOD = FedIT()


def numpy_of(factors: Factors, m: str) -> tuple[np.ndarray, np.ndarray]:
    return factors.A[m].numpy(), factors.B[m].numpy()


def one_round(ranks=(2, 2, 2), examples=(10, 40, 20)):
    """A state with B off zero, what each client trained from it to, and the state after."""
    setup = make_setup(make_clients(ranks, examples))
    trainer = Trainer(setup)
    run = federate(METHOD, setup, 2, trainer=trainer)
    return setup, [done.slots[SHARED] for _, _, done in trainer.log[-len(ranks) :]], run


def test_each_factor_is_the_weighted_mean_of_the_clients_factors():
    _, trained, run = one_round()
    for m in SHAPES:
        for got, k in zip(numpy_of(run.states[2], m), (0, 1), strict=True):
            want = sum(n / 70 * numpy_of(f, m)[k] for n, f in zip((10, 40, 20), trained, strict=True))
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_the_gap_to_the_mean_product_is_the_covariance_of_the_factors():
    """sum_k w_k s B_k A_k - s B A = s sum_k w_k (B_k - B)(A_k - A), of rank at most (K - 1) r."""
    setup, trained, run = one_round()
    w, s = np.array([10, 40, 20]) / 70, setup.scaling(2)
    for m in SHAPES:
        A, B = numpy_of(run.states[2], m)
        gap = sum(p * dense_slot(f, m) for p, f in zip(w, trained, strict=True)) - s * B @ A
        covariance = s * sum(p * (numpy_of(f, m)[1] - B) @ (numpy_of(f, m)[0] - A) for p, f in zip(w, trained, strict=True))
        np.testing.assert_allclose(gap, covariance, rtol=0, atol=1e-12)
        singular = np.linalg.svd(gap, compute_uv=False)
        assert singular[0] > 1e-3 and (singular[(3 - 1) * 2 :] < 1e-12).all()


def test_every_client_counts():
    """A public FedIT keeps only the first client, times its weight."""
    _, _, run = one_round()
    replies = [reply for _, reply in run.rounds[2]]
    for i, reply in enumerate(replies):
        moved = Up(A={m: A + 1.0 for m, A in reply.up.A.items()}, B=reply.up.B)
        state, _ = METHOD.aggregate(run.states[1], iter([*replies[:i], replace(reply, up=moved), *replies[i + 1 :]]), 2)
        share = reply.client.num_examples / 70
        for m in SHAPES:
            np.testing.assert_allclose((state.A[m] - run.states[2].A[m]).numpy(), share, rtol=0, atol=1e-12)


def test_by_hand():
    """B = 1 + (1*4 + 3*8)/4 = 8, A = 2 + (1*0 + 3*4)/4 = 5."""
    setup = make_setup(make_clients((1, 1), (1, 3)), shapes={"m": (1, 1)})
    state = Factors({"m": torch.tensor([[2.0]])}, {"m": torch.tensor([[1.0]])}, 4.0)
    ups = [Up({"m": torch.tensor([[a]])}, {"m": torch.tensor([[b]])}) for a, b in ((0.0, 4.0), (4.0, 8.0))]
    after, _ = METHOD.aggregate(state, iter([Reply(c, u) for c, u in zip(setup.clients, ups, strict=True)]), 1)
    assert (after.A["m"].item(), after.B["m"].item(), after.scale) == (5.0, 8.0, 4.0)


def test_one_client_is_central_training():
    setup = make_setup(make_clients((2,), (30,)), epochs=2)
    run = federate(METHOD, setup, 3)
    ask = Train({SHARED: setup.fresh(2)}, frozenset({(SHARED, "A"), (SHARED, "B")}), epochs=6)
    central = Trainer(setup)(setup.clients[0], ask).slots[SHARED]
    for m in SHAPES:
        torch.testing.assert_close(run.states[-1].A[m], central.A[m], rtol=0, atol=1e-12)
        torch.testing.assert_close(run.states[-1].B[m], central.B[m], rtol=0, atol=1e-12)
