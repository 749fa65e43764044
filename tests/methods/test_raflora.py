"""raFLoRA (2602.13486). Modules: q (12, 8) and up (20, 12)."""

import numpy as np
import pytest
import torch
from toy import Trainer, dense, dense_slot, distance, federate, make_clients, make_setup, same

from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.flexlora import State as FlexState
from fedlora.methods.raflora import RaFLoRA, Scale, State, Up
from fedlora.types import Client, Factors, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}
METHOD = RaFLoRA()
RANKS, EXAMPLES = (1, 2, 4, 2), (10, 40, 20, 30)


def numbers(rank: int, rng: np.random.Generator) -> Up:
    A = {m: torch.tensor(rng.normal(size=(rank, i))) for m, (_, i) in SHAPES.items()}
    B = {m: torch.tensor(rng.normal(size=(o, rank))) for m, (o, _) in SHAPES.items()}
    return Up(A, B)


def replies_of(clients, seed: int = 0) -> list[Reply]:
    rng = np.random.default_rng(seed)
    return [Reply(c, numbers(c.rank, rng)) for c in clients]


def rank_by_rank(replies, s, m: str, rank: int, kept: np.ndarray) -> np.ndarray:
    """sum over j of the mean of s_k b_j a_j' over those that have a j-th rank, one rank at a time; kept[j] where nobody has."""
    W = np.zeros(SHAPES[m])
    for j in range(rank):
        having = [r for r in replies if r.client.rank > j]
        N = sum(r.client.num_examples for r in having)
        for r in having:
            W += r.client.num_examples / N * s(r.client.rank) * np.outer(r.up.B[m][:, j].numpy(), r.up.A[m][j].numpy())
        W += 0.0 if having else kept[j]
    return W


def best(W: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(W)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("method, s", [(METHOD, lambda r: 1.0), (RaFLoRA(Scale.OWN), lambda r: 4.0 / r)], ids=["one", "own"])
def test_every_slice_is_a_mean_over_those_that_have_it_and_every_client_gets_the_best_approximation(method, s):
    setup = make_setup(make_clients(RANKS, EXAMPLES))  # alpha = 4, and 4 is the largest rank
    replies = replies_of(setup.clients)
    state, _ = method.aggregate(method.init(setup), iter(replies), 1)
    for m in SHAPES:
        W = rank_by_rank(replies, s, m, 4, kept=np.zeros(4))
        np.testing.assert_allclose(dense(method.deploy(state), setup)[f"{m}.weight"], best(W, 4), rtol=0, atol=1e-12)
        for client in setup.clients:
            down = method.send(state, client, 1)
            assert down.scale == s(client.rank) and down.A[m].shape == (client.rank, SHAPES[m][1])
            np.testing.assert_allclose(dense_slot(down, m), best(W, client.rank), rtol=0, atol=1e-12)
            gram = down.A[m] @ down.A[m].T
            torch.testing.assert_close(gram, torch.eye(client.rank, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("present", [(0,), (0, 1), (1, 3), (0, 2), (1, 2, 3)], ids=str)
def test_a_slice_that_no_participant_has_stays_as_the_server_has_it(present):
    """The levels are 1, 2 and 4: without client 2 the last slice is kept, with client 0 alone the last two."""
    setup = make_setup(make_clients(RANKS, EXAMPLES))
    before, _ = METHOD.aggregate(METHOD.init(setup), iter(replies_of(setup.clients, seed=1)), 1)
    replies = replies_of([setup.clients[k] for k in present], seed=2)
    after, _ = METHOD.aggregate(before, iter(replies), 1)
    for m in SHAPES:
        U, S, Vt = np.linalg.svd(dense(METHOD.deploy(before), setup)[f"{m}.weight"])
        kept = [S[j] * np.outer(U[:, j], Vt[j]) for j in range(4)]
        W = rank_by_rank(replies, lambda r: 1.0, m, 4, np.array(kept))
        np.testing.assert_allclose(dense(METHOD.deploy(after), setup)[f"{m}.weight"], best(W, 4), rtol=0, atol=1e-12)


def test_a_small_client_never_moves_the_slices_above_its_rank():
    """Every rank writes rows of W of its own, so that what is in them is what its slice holds."""
    setup = make_setup(make_clients((1, 4), (10, 90)), shapes={"m": (8, 6)})

    def reply(client: Client, size: float) -> Reply:
        B = torch.zeros(8, client.rank, dtype=torch.float64)
        for j in range(client.rank):
            B[2 * j : 2 * j + 2, j] = size
        return Reply(client, Up({"m": torch.eye(6, dtype=torch.float64)[: client.rank]}, {"m": B}))

    def server(small: Client, size: float) -> np.ndarray:
        state, _ = METHOD.aggregate(METHOD.init(setup), iter([reply(small, size), reply(setup.clients[1], 1.0)]), 1)
        return dense(METHOD.deploy(state), setup)["m.weight"]

    one, other = server(setup.clients[0], 1.0), server(Client(0, 1, 990), 9.0)
    np.testing.assert_allclose(one[2:], other[2:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(one[2:], np.kron(np.eye(4), np.ones((2, 1)))[2:] @ np.eye(6)[:4], rtol=0, atol=1e-12)
    np.testing.assert_allclose(other[0, 0], (990 * 9 + 90 * 1) / 1080, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_with_equal_ranks_it_is_flexlora_bit_for_bit(dtype):
    setup = make_setup(make_clients((3, 3, 3, 3)), dtype=dtype)

    def sample(t):
        return setup.clients[t % 3 :]

    ours, theirs = (federate(method, setup, 4, sample) for method in (METHOD, FlexLoRA()))
    assert all(same(a.shared, b.shared) for a, b in zip(ours.states, theirs.states, strict=True))


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (1, 2), (2,), (0, 1)], ids=str)
def test_who_trains_nothing_leaves_the_model_as_it_is(present):
    """Also without the largest rank: what is there comes back as it went out, and the rest is kept. FlexLoRA moves wherever a
    client of a smaller rank takes part."""
    setup = make_setup(make_clients(RANKS, EXAMPLES))
    run = federate(METHOD, setup, 3)
    want = dense(METHOD.deploy(run.states[-1]), setup)
    still, people = Trainer(setup, steps_per_epoch=0), [setup.clients[k] for k in present]
    idle = federate(METHOD, setup, 6, lambda t: people, still, resume=(3, run.states[-1], run.held[-1]))
    assert distance(dense(METHOD.deploy(idle.states[-1]), setup), want) < 1e-12
    flex = FlexState(run.states[-1].shared, {r: setup.scaling(r) for r in RANKS})
    drained = federate(FlexLoRA(), setup, 6, lambda t: people, still, resume=(3, flex, run.held[-1]))
    assert (distance(dense(METHOD.deploy(drained.states[-1]), setup), want) > 1e-2) is (present != (2,))


# Energy of each of 16 directions, in per mille: of the first two together 384, of the other slices 242, 246 and 128.
SPECTRUM = [192.0] * 2 + [121.0] * 2 + [61.5] * 4 + [16.0] * 8


@pytest.mark.parametrize(
    "method, shares",
    [(FlexLoRA(), (0.384, 0.677, 0.974, 0.998)), (METHOD, (0.384,) * 4), (RaFLoRA(Scale.OWN), (0.384,) * 4)],
    ids=["flexlora", "raflora", "raflora own scale"],
)
def test_energy_drains_from_flexlora_alone(method, shares):
    """Ranks 2, 2, 4, 8, 16, 16 and no training: the share of energy in the first two directions after 0, 1, 4 and 7 rounds.
    FlexLoRA's are those of W_i^2t: a direction counts as often as clients have it."""
    setup = make_setup(make_clients((2, 2, 4, 8, 16, 16), (10,)), shapes={"m": (24, 20)})
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(d, 16)))[0] for d in (24, 20))
    shared = Factors({"m": torch.tensor(V.T.copy())}, {"m": torch.tensor(U * np.sqrt(SPECTRUM))}, 1.0)
    start = method.init(setup)
    start = type(start)(shared, start.scale)
    run = federate(method, setup, 7, trainer=Trainer(setup, steps_per_epoch=0), resume=(0, start, {k: None for k in range(6)}))
    found = []
    for t in (0, 1, 4, 7):
        energy = np.linalg.svd(dense(method.deploy(run.states[t]), setup)["m.weight"], compute_uv=False) ** 2
        found.append(energy[:2].sum() / energy.sum())
    assert tuple(np.round(found, 3)) == shares
    W = np.array([1.0] * 2 + [4 / 6] * 2 + [3 / 6] * 4 + [2 / 6] * 8) if isinstance(method, FlexLoRA) else np.ones(16)
    left = np.array(SPECTRUM) * W**14
    np.testing.assert_allclose(found[-1], left[:2].sum() / left.sum(), rtol=1e-12)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_ranks_without_energy_are_zero_in_B_orthonormal_in_A_and_learn(dtype, atol):
    setup = make_setup([Client(0, 1, 10), Client(1, 4, 30)], dtype=dtype)
    run = federate(METHOD, setup, 2, lambda t: setup.clients[t - 1 : t])  # first the small one alone, then the large one
    down, up = run.rounds[2][0][0].down, run.rounds[2][0][1].up
    for m in SHAPES:
        assert not (down.B[m][:, 1:].abs() > atol).any()
        torch.testing.assert_close(down.A[m] @ down.A[m].T, torch.eye(4, dtype=dtype), rtol=0, atol=atol)
        assert all(up.B[m][:, i].norm() > 1e-3 for i in range(4))


def test_nobody_learned_anything_in_round_one():
    setup = make_setup(make_clients(RANKS))
    run = federate(METHOD, setup, 2, trainer=Trainer(setup, steps_per_epoch=0))
    for state in run.states:
        assert not any(B.any() for B in state.shared.B.values())
        assert all((A.norm(dim=1) > 0.1).all() for A in state.shared.A.values())
    assert isinstance(run.states[-1], State)


def test_a_rank_above_the_modules_size_is_padded_with_zeros():
    setup = make_setup(make_clients((2, 10)), shapes={"wide": (4, 30), "tall": (30, 4)})
    state = federate(METHOD, setup, 2).states[-1]
    assert state.shared.A["tall"].shape == (10, 4) and state.shared.B["tall"].shape == (30, 10)
    assert not state.shared.A["tall"][4:].any()
    gram = state.shared.A["wide"] @ state.shared.A["wide"].T
    torch.testing.assert_close(gram, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)
