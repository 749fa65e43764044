"""LoRA-A2 (2410.22815), by hand where that is clearer. Modules: q (12, 8) and up (20, 12); global rank 4."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Trainer, federate, make_clients, make_setup, same

from fedlora.check import refuse
from fedlora.methods import make
from fedlora.methods.lora_a2 import Criterion, Down, LoRAA2, State, Up
from fedlora.types import SHARED, Client, Factors, Reply, Trained

SHAPES = {"q": (12, 8), "up": (20, 12)}
METHOD = LoRAA2(global_rank=4)


def random_factors(seed: int, scale: float = 1.0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A = {m: torch.randn(4, i, generator=g, dtype=torch.float64) for m, (_, i) in SHAPES.items()}
    B = {m: torch.randn(o, 4, generator=g, dtype=torch.float64) for m, (o, _) in SHAPES.items()}
    return Factors(A, B, scale)


def dialogue(method, round: int, client: Client, start: Factors, tried: Factors, done: Factors, grad=None):
    """Plays the client's procedure with these answers: (first request, second request, Up, held)."""
    g = method.local(Down(2, start), start, client, round)
    first = next(g)
    second = g.send(Trained({SHARED: tried}, 0.0, 1, grad=grad or {}))
    with pytest.raises(StopIteration) as end:
        g.send(Trained({SHARED: done}, 0.0, 1))
    return first, second, *end.value.value


def chosen(request, role: str) -> list[tuple[str, int]]:
    """The (module, rank) pairs that a request lets move."""
    assert set(request.mask) == {(SHARED, role)}
    return [(m, i) for m, mask in request.mask[SHARED, role].items() for i in range(4) if mask.flatten()[i]]


def explicit_scores(criterion: Criterion, role: str, start: Factors, tried: Factors, grad) -> dict[tuple[str, int], float]:
    """The score of every rank by its outer product, formed."""
    scores = {}
    for m in SHAPES:
        for i in range(4):
            B0, B1, A0, A1 = (x.numpy() for x in (start.B[m][:, i], tried.B[m][:, i], start.A[m][i], tried.A[m][i]))
            if criterion is Criterion.CONTRIBUTION:
                scores[m, i] = np.linalg.norm(np.outer(B1 - B0, A0) if role == "B" else np.outer(B0, A1 - A0))
            elif criterion is Criterion.MAGNITUDE:
                scores[m, i] = sum(abs(B1 if role == "B" else A1))
            else:
                g = grad[SHARED, role][m].numpy()
                products = abs((B1 - B0) * g[:, i]) if role == "B" else abs((A1 - A0) * g[i])
                scores[m, i] = sum(products) / len(products)
    return scores


# ---- scores and selection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", Criterion)
@pytest.mark.parametrize("round, role", [(1, "B"), (2, "A"), (3, "B"), (10, "A")])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_ranks_with_the_best_explicit_scores_are_chosen(criterion, round, role, rank):
    start, other = random_factors(1), random_factors(2)
    tried = replace(start, **{role: getattr(other, role)})
    grad = {(SHARED, role): getattr(random_factors(3), role)}
    scores = explicit_scores(criterion, role, start, tried, grad)
    best = sorted(scores, key=scores.__getitem__, reverse=True)[: rank * 2]
    first, second, _, _ = dialogue(LoRAA2(4, criterion=criterion), round, Client(0, rank, 10), start, tried, tried, grad)
    assert sorted(chosen(second, role)) == sorted(best)
    assert first.want_grad == (criterion is Criterion.SENSITIVITY)
    assert first.roles == second.roles == {(SHARED, role)}


@pytest.mark.parametrize("criterion, long", [(Criterion.MAGNITUDE, True), (Criterion.SENSITIVITY, False)])
@pytest.mark.parametrize("round, role", [(1, "B"), (2, "A")])
def test_magnitude_prefers_long_vectors_and_sensitivity_does_not(criterion, long, round, role):
    """Table 3: at magnitude nearly all chosen vectors are long ones, at sensitivity few. Entries of one size everywhere, in `up`
    one per cent smaller; `up` has the longer vectors."""
    start, zero, one = random_factors(1), random_factors(1), random_factors(1)
    for f, size in ((zero, 0.0), (one, 1.0)):
        for m, less in (("q", 1.0), ("up", 0.99)):
            getattr(f, role)[m].fill_(size * less)
    start = replace(start, **{role: getattr(zero, role)})
    grad = {(SHARED, role): getattr(one, role)}
    tried = replace(start, **{role: getattr(one, role)})
    _, second, _, _ = dialogue(LoRAA2(4, criterion=criterion), round, Client(0, 2, 10), start, tried, tried, grad)
    assert chosen(second, role) == [("up" if long else "q", i) for i in range(4)]


@pytest.mark.parametrize("criterion", Criterion)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("round, role", [(1, "B"), (2, "A")])
def test_a_client_whose_probe_diverged_is_unfit_and_trains_no_further(criterion, bad, round, role):
    """One entry is enough, also in a rank that would not have been chosen."""
    start, held = random_factors(1), random_factors(4)
    entries = getattr(random_factors(2), role)["up"].clone()
    entries[(5, 3) if role == "B" else (3, 5)] = bad
    tried = replace(start, **{role: {**getattr(random_factors(2), role), "up": entries}})
    grad = {(SHARED, role): getattr(random_factors(3), role)}
    g = LoRAA2(4, criterion=criterion).local(Down(2, start), held, Client(0, 1, 10), round)
    next(g)
    with pytest.raises(StopIteration) as end:
        g.send(Trained({SHARED: tried}, 0.0, 1, grad=grad))
    up, kept = end.value.value
    assert type(up).__name__ == "Unfit" and "finite" in up.reason and "\n" not in up.reason
    assert kept is held


def test_the_default_criterion_is_the_papers():
    assert LoRAA2().criterion is Criterion.CONTRIBUTION


@pytest.mark.parametrize("rank, expected", [(1, 2), (3, 6), (4, 8), (9, 8)])
def test_a_client_chooses_min_of_its_rank_and_the_global_one_times_the_modules(rank, expected):
    start, tried = random_factors(1), random_factors(2)
    _, second, up, _ = dialogue(METHOD, 1, Client(0, rank, 10), start, tried, tried)
    assert len(chosen(second, "B")) == expected
    assert sum(int(mask.sum()) for mask in up.ranks.values()) == expected


def test_a_module_may_get_no_rank():
    start = random_factors(1)
    tried = replace(start, B={**start.B, "up": start.B["up"] + 1.0})
    _, second, up, _ = dialogue(METHOD, 1, Client(0, 2, 10), start, tried, tried)
    assert chosen(second, "B") == [("up", i) for i in range(4)]
    assert up.B["q"].shape == (12, 0)
    assert refuse(up, METHOD, make_setup(make_clients((2, 2))), Client(0, 2, 10)) is None


def test_ties_go_to_the_earlier_module_and_then_the_earlier_rank():
    start = random_factors(1)
    _, second, _, _ = dialogue(METHOD, 1, Client(0, 3, 10), start, start, start)  # a probe that moved nothing: all scores are 0
    assert chosen(second, "B") == [("q", 0), ("q", 1), ("q", 2), ("q", 3), ("up", 0), ("up", 1)]


def test_round_one_trains_B_with_finite_scores_that_are_not_all_zero():
    setup = make_setup(make_clients((1, 2, 4, 2)))
    trainer = Trainer(setup)
    run = federate(METHOD, setup, 1, trainer=trainer)
    probes = [(ask, done) for _, ask, done in trainer.log if ask.probe]
    assert len(probes) == 4
    for ask, done in probes:
        assert ask.roles == {(SHARED, "B")}
        scores = explicit_scores(Criterion.CONTRIBUTION, "B", ask.slots[SHARED], done.slots[SHARED], None)
        assert np.isfinite(list(scores.values())).all() and max(scores.values()) > 0
    assert all(torch.count_nonzero(B) for B in run.states[1].shared.B.values())


# ---- the client ---------------------------------------------------------------------------------------------------------------


def test_the_requests_are_a_probe_of_one_epoch_and_the_local_epochs_with_five_times_the_learning_rate_for_B():
    start, tried, done = random_factors(1), random_factors(2), random_factors(3)
    first, second, _, held = dialogue(METHOD, 1, Client(0, 2, 10), start, tried, done)
    assert (first.epochs, first.probe, first.mask) == (1, True, {})
    assert (second.epochs, second.probe) == (2, False)
    assert first.lr_scale == second.lr_scale == {"B": 5.0}
    assert same(first.slots[SHARED], start) and same(second.slots[SHARED], start)  # the probe is undone
    assert same(held, start)  # the client keeps what the round began with: the server's change comes with the next order


@pytest.mark.parametrize("round, role", [(1, "B"), (2, "A")])
def test_the_upload_is_the_change_of_the_chosen_ranks(round, role):
    start, tried, done = random_factors(1), random_factors(2), random_factors(3)
    _, second, up, _ = dialogue(METHOD, round, Client(0, 2, 10), start, tried, done)
    for m in SHAPES:
        ranks = [i for n, i in chosen(second, role) if n == m]
        assert up.ranks[m].nonzero().flatten().tolist() == ranks
        moved = getattr(done, role)[m].numpy() - getattr(start, role)[m].numpy()
        np.testing.assert_array_equal(getattr(up, role)[m].numpy(), moved[:, ranks] if role == "B" else moved[ranks])
    assert not getattr(up, "A" if role == "B" else "B")


@pytest.mark.parametrize("round, role", [(1, "B"), (2, "A")])
def test_without_reset_the_chosen_ranks_go_on_from_the_probe(round, role):
    start, tried, done = random_factors(1), random_factors(2), random_factors(3)
    first, second, up, _ = dialogue(LoRAA2(4, probe_reset=False), round, Client(0, 2, 10), start, tried, done)
    assert not first.probe  # its training is kept
    went_on = set(chosen(second, role))
    for m in SHAPES:
        for i in range(4):
            source = tried if (m, i) in went_on else start
            got, expected = (getattr(f, role)[m].select(1 if role == "B" else 0, i) for f in (second.slots[SHARED], source))
            assert torch.equal(got, expected)
        moved = getattr(done, role)[m] - getattr(start, role)[m]  # still against the start of the round
        assert torch.equal(getattr(up, role)[m], moved[:, up.ranks[m]] if role == "B" else moved[up.ranks[m]])


def test_a_probe_that_counts_is_one_of_the_local_epochs():
    setup = make_setup(make_clients((2, 2)), epochs=5)
    assert LoRAA2(4).init(setup).epochs == 5
    assert LoRAA2(4, probe_counts=True, probe_epochs=2).init(setup).epochs == 3
    with pytest.raises(ValueError, match=r"probe_counts.*epochs = 5"):
        LoRAA2(4, probe_counts=True, probe_epochs=5).init(setup)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_not_chosen_does_not_move_by_a_bit(optimizer):
    setup = make_setup(make_clients((1, 2, 4, 2)))
    trainer = Trainer(setup, optimizer=optimizer, weight_decay=0.5)
    federate(METHOD, setup, 4, trainer=trainer)
    rested = 0
    for _, ask, done in trainer.log:
        for (slot, role), masks in ask.mask.items():
            for m, mask in masks.items():
                before, after = getattr(ask.slots[slot], role)[m], getattr(done.slots[slot], role)[m]
                still = ~mask.expand_as(before)
                rested += int(still.sum())
                assert torch.equal(before[still], after[still])
    assert rested > 0


# ---- the server ---------------------------------------------------------------------------------------------------------------


def tiny() -> State:
    """One module (2, 3) at rank 2."""
    A, B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    return State(2, Factors({"m": A}, {"m": B}, 8.0))


def test_columns_are_added_with_the_weights_of_all_participants():
    """By hand: n = 1 and 3. Column 0: 10 + (1*4 + 3*1)/4, 30 + (1*8 + 3*3)/4. Column 1 was chosen by the second client alone, and
    still the divisor is 4: 20 + 3*2/4, 40 + 3*4/4."""
    one = Up(B={"m": torch.tensor([[4.0], [8.0]])}, ranks={"m": torch.tensor([True, False])})
    two = Up(B={"m": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, ranks={"m": torch.tensor([True, True])})
    replies = [Reply(Client(5, 1, 1), one), Reply(Client(7, 2, 3), two)]
    before = tiny()
    state, diagnostics = METHOD.aggregate(before, iter(replies), 1)
    assert state.shared.B["m"].tolist() == [[11.75, 21.5], [34.25, 43.0]]
    assert torch.equal(state.shared.A["m"], before.shared.A["m"])
    assert (state.seen, state.shared.scale) == ({5: 0, 7: 0}, 8.0)
    assert diagnostics["ranks_chosen"].tolist() == [[[True, False]], [[True, True]]]
    assert diagnostics["ranks_chosen_clients"].tolist() == [5, 7]


def test_rows_are_added_in_even_rounds():
    """By hand: row 1 only, from one client of two: (0, 1, 0) + 2/8 * (4, 8, -4)."""
    one = Up(A={"m": torch.tensor([[4.0, 8.0, -4.0]])}, ranks={"m": torch.tensor([False, True])})
    two = Up(A={"m": torch.zeros(0, 3)}, ranks={"m": torch.tensor([False, False])})
    before = tiny()
    state, _ = METHOD.aggregate(before, iter([Reply(Client(0, 1, 2), one), Reply(Client(1, 1, 6), two)]), 2)
    assert state.shared.A["m"].tolist() == [[1.0, 0.0, 0.0], [1.0, 3.0, -1.0]]
    assert torch.equal(state.shared.B["m"], before.shared.B["m"])


def test_ranks_that_nobody_chose_do_not_move_by_a_bit():
    setup = make_setup(make_clients((1, 1)))
    run = federate(METHOD, setup, 4)
    idle = 0
    for t in range(1, 5):
        role = "B" if t % 2 else "A"
        for m in SHAPES:
            nobody = ~torch.stack([reply.up.ranks[m] for _, reply in run.rounds[t]]).any(dim=0)
            before, after = (getattr(run.states[i].shared, role)[m] for i in (t - 1, t))
            if role == "A":
                before, after = before.T, after.T
            idle += int(nobody.sum())
            assert torch.equal(before[:, nobody], after[:, nobody])
            assert not torch.equal(before[:, ~nobody], after[:, ~nobody]) or nobody.all()
    assert idle > 0


class FiveTimesFasterB(Trainer):
    def __call__(self, client, ask):
        return super().__call__(client, replace(ask, lr_scale={"B": 5.0}))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_with_every_rank_and_equal_clients_it_is_rolora_at_five_times_the_learning_rate_for_B(optimizer):
    setup = make_setup(make_clients((4, 4, 4), examples=(20, 20, 20)))
    one = federate(METHOD, setup, 5, trainer=Trainer(setup, optimizer=optimizer))
    two = federate(make("rolora", {}), setup, 5, trainer=FiveTimesFasterB(setup, optimizer=optimizer))
    for x, y in zip(one.states, two.states, strict=True):
        for m in SHAPES:
            torch.testing.assert_close(x.shared.A[m], y.shared.A[m], rtol=0, atol=1e-12)
            torch.testing.assert_close(x.shared.B[m], y.shared.B[m], rtol=0, atol=1e-12)


# ---- settings and refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, expected", [((2, 8), 16), ((2, 32), 32)])
def test_the_global_rank_is_sixteen_or_the_largest_client_rank_and_sets_the_scale(ranks, expected):
    setup = make_setup(make_clients(ranks), shapes={"m": (40, 50)}, lora_alpha=16.0)
    state = LoRAA2().init(setup)
    assert state.shared.A["m"].shape == (expected, 50) and state.shared.scale == 16.0 / expected
    assert same(state.shared, LoRAA2().hold(setup, setup.clients[0]))  # which is why nothing comes down in round 1


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"global_rank": 0}, "global_rank"),
        ({"probe_epochs": 0}, "probe_epochs"),
        ({"lr_ratio_b": 0.0}, "lr_ratio_b"),
        ({"criterion": "x"}, "method.criterion"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        make("lora-a2", settings)


@pytest.mark.parametrize(
    "mask, word",
    [
        ([True, True, True, False], "'chosen' is 3, but 2 in another field"),  # the values are two columns
        ([True, True, False], "'global' is 3, expected 4"),
        ([1.0, 1.0, 0.0, 0.0], "torch.bool"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, word):
    setup = make_setup(make_clients((2, 2)))
    fine = torch.tensor([True, True, False, False])
    up = Up(B={m: torch.ones(o, 2) for m, (o, _) in SHAPES.items()}, ranks={"q": torch.tensor(mask), "up": fine})
    why = refuse(up, METHOD, setup, setup.clients[0])
    assert why is not None and "'q'" in why and word in why
    assert refuse(replace(up, ranks={"q": fine, "up": fine}), METHOD, setup, setup.clients[0]) is None
