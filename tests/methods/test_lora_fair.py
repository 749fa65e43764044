"""LoRA-FAIR (2411.14961). Modules: q (12, 8) and up (20, 12)."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from toy import make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedit import Up as FedITUp
from fedlora.methods.lora_fair import LoRAFAIR, Objective, Up
from fedlora.types import Factors, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}
N = (10, 30, 60)


@pytest.fixture(scope="module")
def world():
    """A state, replies, and module -> (mean of A, mean of B, mean of the products), in numpy."""
    setup, rng = make_setup(make_clients((3, 3, 3), N)), np.random.default_rng(0)

    def random():
        A = {m: torch.tensor(rng.normal(size=(3, i))) for m, (_, i) in SHAPES.items()}
        return A, {m: torch.tensor(rng.normal(size=(o, 3))) for m, (o, _) in SHAPES.items()}

    state = Factors(*random(), 2.0)
    changes = [random() for _ in N]
    means = {}
    for m in SHAPES:
        own = [((state.A[m] + dA[m]).numpy(), (state.B[m] + dB[m]).numpy()) for dA, dB in changes]
        p = np.array(N) / sum(N)
        means[m] = (
            sum(w * A for w, (A, _) in zip(p, own, strict=True)),
            sum(w * B for w, (_, B) in zip(p, own, strict=True)),
            sum(w * B @ A for w, (A, B) in zip(p, own, strict=True)),
        )
    return state, list(zip(setup.clients, changes, strict=True)), means


def aggregate(world, method, kind=Up):
    state, clients, _ = world
    return method.aggregate(state, iter([Reply(c, kind(dA, dB)) for c, (dA, dB) in clients]), 1)[0]


@pytest.mark.parametrize("penalty", [1e-4, 0.01, 1.0])
def test_the_closed_form_of_ridge_with_every_matrix_formed(world, penalty):
    after = aggregate(world, LoRAFAIR(Objective.RIDGE, penalty))
    for m, (A, B, M) in world[2].items():
        X = (M - B @ A) @ A.T @ np.linalg.inv(A @ A.T + penalty * np.eye(3))
        np.testing.assert_allclose(after.A[m].numpy(), A, rtol=0, atol=1e-12)
        np.testing.assert_allclose(after.B[m].numpy(), B + X, rtol=0, atol=1e-10)
        assert np.linalg.norm(M - after.B[m].numpy() @ A) < 0.99 * np.linalg.norm(M - B @ A)


def test_with_a_vast_penalty_it_is_fedit(world):
    plain = aggregate(world, FedIT(), FedITUp)
    for objective in Objective:
        after = aggregate(world, LoRAFAIR(objective, penalty=1e12))
        for m in SHAPES:
            torch.testing.assert_close(after.B[m], plain.B[m], rtol=0, atol=1e-9)
        assert same(after.A, plain.A)


def test_with_a_tiny_penalty_it_is_the_best_approximation_in_the_rows_of_A(world):
    after = aggregate(world, LoRAFAIR(Objective.RIDGE, penalty=1e-12))
    for m, (A, _, M) in world[2].items():
        best = M @ np.linalg.pinv(A) @ A
        np.testing.assert_allclose(after.B[m].numpy() @ A, best, rtol=0, atol=1e-8)


def papers_objective(X, A, B, M, penalty) -> float:
    Y = (B + X) @ A
    return 1 - (M * Y).sum() / np.linalg.norm(M) / np.linalg.norm(Y) + penalty * np.linalg.norm(X)


def test_the_default_minimises_the_papers_objective(world):
    """Against a general minimiser of the dense objective, started beside the kink at zero and far from it."""
    after = aggregate(world, LoRAFAIR())
    for m, (A, B, M) in world[2].items():
        X, rng = after.B[m].numpy() - B, np.random.default_rng(0)
        starts = [size * rng.normal(size=X.size) for size in (0.01, 0.3, 1.0)]

        def f(x, A=A, B=B, M=M):
            return papers_objective(x.reshape(B.shape), A, B, M, 0.01)

        best = min((minimize(f, x, method="BFGS", tol=1e-8) for x in starts), key=lambda end: end.fun)
        assert f(X) < best.fun + 1e-8 and f(X) < f(0 * X) - 1e-3
        np.testing.assert_allclose(X, best.x.reshape(X.shape), rtol=0, atol=1e-3)
        np.testing.assert_allclose(after.A[m].numpy(), A, rtol=0, atol=1e-12)


def test_where_the_cosine_rises_less_than_the_penalty_it_is_fedit_to_the_bit(world):
    """The norm of X is not squared: no correction is the best one. The lengths of the gradients at X = 0, by hand."""
    plain, lengths = aggregate(world, FedIT(), FedITUp), {}
    for m, (A, B, M) in world[2].items():
        P, size = B @ A, np.linalg.norm(M) * np.linalg.norm(B @ A)
        lengths[m] = np.linalg.norm((M / size - (M * P).sum() / size / np.linalg.norm(P) ** 2 * P) @ A.T)
    between = sum(lengths.values()) / 2
    assert lengths["up"] < 0.9 * between and lengths["q"] > 1.1 * between
    after = aggregate(world, LoRAFAIR(penalty=between))
    assert torch.equal(after.B["up"], plain.B["up"]) and not torch.equal(after.B["q"], plain.B["q"])


def test_the_cosine_comes_closer_to_one_and_the_penalty_holds_B(world):
    moved = {}
    for penalty in (1e-4, 1e-3, 0.01):
        after = aggregate(world, LoRAFAIR(penalty=penalty))
        moved[penalty] = 0.0
        for m, (A, B, M) in world[2].items():

            def cosine(Y, A=A, M=M):
                return (M * (Y @ A)).sum() / np.linalg.norm(M) / np.linalg.norm(Y @ A)

            assert cosine(after.B[m].numpy()) > cosine(B) + 1e-3
            assert cosine(after.B[m].numpy()) <= np.linalg.norm(M @ np.linalg.pinv(A) @ A) / np.linalg.norm(M) + 1e-12
            moved[penalty] += np.linalg.norm(after.B[m].numpy() - B)
    assert moved[1e-4] > moved[1e-3] > moved[0.01] > 0


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("clients", [2, 9], ids=["by factors", "as a matrix"])
def test_vast_replies_in_float32_give_what_float64_gives(objective, clients):
    """One client of size 1e18: its products of products have 1e72. Every matrix formed by numpy, in float64."""
    setup, rng = make_setup(make_clients((3,) * clients), dtype=torch.float32), np.random.default_rng(0)
    method, replies, own = LoRAFAIR(objective), [], {m: [] for m in SHAPES}
    state = method.init(setup)
    for client in setup.clients:
        size = 1e18 if client.id == 1 else 1.0
        A = {m: torch.tensor(size * rng.normal(size=(3, i)), dtype=torch.float32) for m, (_, i) in SHAPES.items()}
        B = {m: torch.tensor(size * rng.normal(size=(o, 3)), dtype=torch.float32) for m, (o, _) in SHAPES.items()}
        replies.append(Reply(client, Up(A, B)))
        for m in SHAPES:
            own[m].append(((state.A[m].double() + A[m].double()).numpy(), (state.B[m].double() + B[m].double()).numpy()))
    after, _ = method.aggregate(state, iter(replies), 1)
    p = np.array([c.num_examples for c in setup.clients]) / sum(c.num_examples for c in setup.clients)
    for m in SHAPES:
        A, B = (sum(w * pair[i] for w, pair in zip(p, own[m], strict=True)) for i in (0, 1))
        M = sum(w * pair[1] @ pair[0] for w, pair in zip(p, own[m], strict=True))
        if objective is Objective.RIDGE:  # the penalty is nothing beside A A'
            B = M @ np.linalg.pinv(A)
        np.testing.assert_allclose(after.B[m].numpy(), B, rtol=0, atol=1e-5 * np.abs(B).max())
        np.testing.assert_allclose(after.A[m].numpy(), A, rtol=0, atol=1e-6 * np.abs(A).max())


@pytest.mark.parametrize("objective", Objective)
def test_clients_that_learned_nothing_leave_everything_as_it_was(objective):
    setup = make_setup(make_clients((3, 3)))
    state = LoRAFAIR(objective).init(setup)
    nothing = Up({m: torch.zeros_like(A) for m, A in state.A.items()}, {m: torch.zeros_like(B) for m, B in state.B.items()})
    after, _ = LoRAFAIR(objective).aggregate(state, iter([Reply(c, nothing) for c in setup.clients]), 1)
    assert same(after, state)  # B is zero here, so there is no angle either


@pytest.mark.parametrize("settings", [{"penalty": 0.0}, {"steps": 0}, {"objective": "dot"}], ids=str)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        make("lora-fair", settings)
