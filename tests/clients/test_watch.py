"""What is measured of a round's clients, against dense products in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.clients.watch import MOST_CLIENTS, LocalUpdate, similarity
from fedlora.server.energy import energy
from fedlora.types import SHARED, BaseUpdate, Factors, Mix, Model

SHAPES = {"q": (6, 9), "up": (14, 6)}
EXAMPLES = (10, 30, 5, 15)


def random(rank: int, seed: int, scale: float = 2.0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(rank, d, generator=draw) for m, (_, d) in SHAPES.items()}
    B = {m: torch.randn(d, rank, generator=draw) for m, (d, _) in SHAPES.items()}
    return Factors(A, B, scale)


def moved(start: Factors, roles: str, seed: int) -> Factors:
    other = random(start.A["q"].shape[0], seed)
    for role in roles:
        start = start.with_role(role, {m: x + 0.1 * other.role(role)[m] for m, x in start.role(role).items()})
    return start


def clients(roles: str, start: Factors | None = None) -> list[LocalUpdate]:
    start = start or random(3, seed=0)
    return [LocalUpdate(i, n, {SHARED: start}, {SHARED: moved(start, roles, 1 + i)}) for i, n in enumerate(EXAMPLES)]


def dense(f: Factors) -> np.ndarray:
    """All modules' scale D B C A in one vector."""
    parts = []
    for m in SHAPES:
        A, B = f.A[m].double().numpy(), f.B[m].double().numpy()
        C = f.C[m].double().numpy() if m in f.C else np.eye(A.shape[0])
        D = f.D[m].double().numpy() if m in f.D else np.ones(B.shape[0])
        parts.append((f.scale * D[:, None] * (B @ (np.diag(C) if C.ndim == 1 else C) @ A)).ravel())
    return np.concatenate(parts)


def updates(learned: list[LocalUpdate]) -> np.ndarray:
    return np.stack([sum(dense(each.after[s]) - dense(each.before[s]) for s in each.after) for each in learned])


def cosines(U: np.ndarray) -> np.ndarray:
    unit = U / np.linalg.norm(U, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("roles", ["AB", "A", "B"])
def test_similarity_is_the_cosine_of_updates(roles):
    learned = clients(roles)
    found = similarity(learned)
    assert found["similarity"].dtype == torch.float32 and found["similarity_clients"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(found["similarity"].numpy(), cosines(updates(learned)), atol=1e-6)


def test_discordance_is_what_averaging_apart_gets_wrong_relative_to_the_update():
    learned = clients("AB")
    p = np.array(EXAMPLES) / sum(EXAMPLES)
    mean = {
        r: {m: sum(w * e.after[SHARED].role(r)[m].double() for w, e in zip(p, learned, strict=True)) for m in SHAPES} for r in "AB"
    }
    apart = dense(Factors(mean["A"], mean["B"], 2.0))
    true = np.einsum("k,kd->d", p, np.stack([dense(each.after[SHARED]) for each in learned]))
    start = dense(learned[0].before[SHARED])
    want = np.linalg.norm(apart - true) / np.linalg.norm(true - start)
    assert similarity(learned)["discordance"] == pytest.approx(want, rel=1e-6) and want > 1e-3


@pytest.mark.parametrize("roles", ["A", "B"])
def test_discordance_is_exactly_zero_where_a_factor_rests(roles):
    assert similarity(clients(roles))["discordance"] == 0.0


def test_a_trained_core_between_resting_factors_has_no_discordance():
    start = replace(
        random(3, seed=0), C={m: torch.eye(3) for m in SHAPES}, D={m: torch.full((d,), 0.5) for m, (d, _) in SHAPES.items()}
    )
    draw = torch.Generator().manual_seed(9)
    learned = [
        LocalUpdate(i, n, {SHARED: start}, {SHARED: replace(start, C={m: torch.randn(3, 3, generator=draw) for m in SHAPES})})
        for i, n in enumerate(EXAMPLES)
    ]
    found = similarity(learned)
    assert found["discordance"] == 0.0
    np.testing.assert_allclose(found["similarity"].numpy(), cosines(updates(learned)), atol=1e-6)
    assert "discordance" not in similarity(clients("AB", start))  # which of the three would be averaged with which?


def test_clients_of_different_ranks_have_a_similarity_and_no_discordance():
    learned = []
    for i, rank in enumerate((1, 2, 4)):
        start = random(rank, seed=i, scale=16 / rank)
        learned.append(LocalUpdate(i, 10, {SHARED: start}, {SHARED: moved(start, "AB", 20 + i)}))
    found = similarity(learned)
    assert "discordance" not in found
    np.testing.assert_allclose(found["similarity"].numpy(), cosines(updates(learned)), atol=1e-6)


def test_a_slot_that_only_some_have_is_no_update_of_the_others():
    """Clients 0 and 1 trained two slots, client 2 one, client 3 a slot that it did not start with."""
    start, own = random(3, seed=0), random(2, seed=40)
    learned = []
    for i in range(4):
        before, after = {SHARED: start}, {SHARED: moved(start, "B", i + 1)}
        if i < 2:
            before["own"], after["own"] = own, moved(own, "AB", i + 10)
        if i == 3:
            after["own"] = own
        learned.append(LocalUpdate(i, 10, before, after))
    found = similarity(learned)
    shared = updates([replace(e, before={SHARED: e.before[SHARED]}, after={SHARED: e.after[SHARED]}) for e in learned])
    private = np.zeros_like(shared)
    private[:2] = updates([replace(e, before={"own": e.before["own"]}, after={"own": e.after["own"]}) for e in learned[:2]])
    np.testing.assert_allclose(found["similarity"].numpy(), cosines(np.concatenate([shared, private], axis=1)), atol=1e-6)
    assert "discordance" not in found


def test_who_moved_nothing_is_similar_to_nobody():
    learned = clients("AB")
    learned[1] = replace(learned[1], after=learned[1].before)
    found = similarity(learned)["similarity"]
    assert not found[1].any() and not found[:, 1].any() and found[0, 0] == pytest.approx(1.0)
    still = similarity([replace(each, after=each.before) for each in learned])
    assert not still["similarity"].any() and "discordance" not in still


def test_the_first_clients_by_id_are_studied_whatever_their_order():
    start = random(1, seed=0)
    many = [LocalUpdate(i, 1, {SHARED: start}, {SHARED: moved(start, "AB", i)}) for i in range(MOST_CLIENTS + 3)]
    found = similarity(many[::-1])
    assert found["similarity_clients"].tolist() == list(range(MOST_CLIENTS))
    want = similarity(many[:MOST_CLIENTS])
    assert torch.equal(found["similarity"], want["similarity"]) and found["discordance"] == want["discordance"]


def test_without_slots_there_is_nothing_to_say():
    assert similarity([]) == similarity([LocalUpdate(0, 5, {}, {})]) == {}


# ---- the energy of the deployed change ---------------------------------------------------------------------------------------


def shares(f: Factors) -> np.ndarray:
    """Of every direction, by dense SVDs: six of q (6, 9), six of up (14, 6)."""
    q, up = np.split(dense(f), [6 * 9])
    squares = [np.linalg.svd(x.reshape(SHAPES[m]), compute_uv=False) ** 2 for m, x in (("q", q), ("up", up))]
    return sum(squares) / sum(squares).sum()


C = {"core": torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 0.5]]), "diagonal": torch.tensor([3.0, 1.0, 0.1])}


@pytest.mark.parametrize("form", ["plain", "core", "diagonal"])
def test_energy_is_that_of_the_singular_values_of_all_modules(form):
    slot = random(3, seed=5)
    if form != "plain":
        D = {m: torch.linspace(0.5, 2.0, d_out) for m, (d_out, _) in SHAPES.items()}
        slot = replace(slot, C={m: C[form] for m in SHAPES}, D=D)
    found = energy(Model({SHARED: slot}))["energy"]
    np.testing.assert_allclose(found, shares(slot)[:3], rtol=1e-5)
    assert len(found) == 3 and found == sorted(found, reverse=True) and sum(found) == pytest.approx(1.0, abs=1e-5)


def test_energy_of_modules_of_different_ranks_and_of_ranks_above_a_modules_size():
    one, other = random(8, seed=1), random(2, seed=2)
    slot = Factors({"q": one.A["q"], "up": other.A["up"]}, {"q": one.B["q"], "up": other.B["up"]})
    found = energy(Model({SHARED: slot}))["energy"]
    np.testing.assert_allclose(found, shares(slot), rtol=1e-5)
    assert len(found) == 6  # of 8 ranks: q has six rows


@pytest.mark.parametrize(
    "model",
    [
        Model(),
        Model({SHARED: random(2, 0), "own": random(2, 1)}),
        Model({SHARED: random(2, 0)}, base=BaseUpdate(0, 1, (random(2, 1),))),
        Model({SHARED: random(2, 0)}, gate=Mix({SHARED: 0.5})),
        Model({SHARED: random(2, 0)}, full={"q.bias": torch.ones(6)}),
        Model({SHARED: random(2, 0)}, drop_base=True),
        Model({SHARED: replace(random(2, 0), B={m: torch.zeros(d, 2) for m, (d, _) in SHAPES.items()})}),
        Model({SHARED: random(0, 0)}),
    ],
    ids=["nothing", "two slots", "merged", "gate", "full", "no base", "zero", "no rank"],
)
def test_what_is_no_single_low_rank_change_has_no_energy(model):
    assert energy(model) == {}
