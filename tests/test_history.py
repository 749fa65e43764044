"""The log of base updates. Modules: q (12, 8) and up (20, 12): 336 numbers as dense matrices, 52 a rank as pairs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.history import History, append, append_matrices, everything, missed, noting, numbers
from fedlora.types import BaseUpdate, Client, Factors, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}
DENSE = 12 * 8 + 20 * 12
PER_RANK = 12 + 8 + 20 + 12


def pair(seed: int, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
    rng = np.random.default_rng(seed)
    A = {m: torch.tensor(rng.normal(size=(rank, i)), dtype=dtype) for m, (_, i) in SHAPES.items()}
    B = {m: torch.tensor(rng.normal(size=(o, rank)), dtype=dtype) for m, (o, _) in SHAPES.items()}
    return Factors(A, B, 0.5 + seed)


def logs(ranks, **options) -> list[History]:
    """The log after 0, 1, ... versions."""
    out = [History()]
    for seed, rank in enumerate(ranks):
        out.append(append(out[-1], pair(seed, rank), **options))
    return out


def update(history: History, since: int) -> BaseUpdate:
    """What a client is sent whose base is at this version."""
    return missed(replace(history, seen={7: since}), Client(7, 1, 1))


def fold(version: int, merged: dict, sent: BaseUpdate) -> tuple[int, dict]:
    """What a base does with an update: the sum of all merges is kept apart, and pairs are added to it one by one."""
    if sent.dense:
        return sent.version, dict(sent.dense)
    assert sent.since <= version and len(sent.pairs) == sent.version - sent.since
    for p in sent.pairs[version - sent.since :]:
        merged = {m: merged.get(m, torch.zeros(())) + p.scale * (p.B[m] @ p.A[m]) for m in SHAPES}
    return max(version, sent.version), merged


def size(sent: BaseUpdate) -> int:
    return sum(map(numbers, sent.pairs)) + sum(x.numel() for x in sent.dense.values())


def oracle(ranks, last: int) -> dict[str, np.ndarray]:
    """The sum of the first `last` products, by numpy in float64."""
    total = {m: np.zeros(shape) for m, shape in SHAPES.items()}
    for seed in range(last):
        p = pair(seed, ranks[seed])
        for m in SHAPES:
            total[m] += p.scale * np.einsum("or,ri->oi", p.B[m].double().numpy(), p.A[m].double().numpy())
    return total


MANY = [(1,) * 12, (2,) * 9, (4, 1, 6, 2, 1, 3), (8, 8, 8), (0, 2, 0, 5, 0, 0)]


@pytest.mark.parametrize("ranks", MANY, ids=str)
def test_a_base_has_the_same_bits_whichever_way_it_came_to_its_version(ranks):
    """Every way there is: bases that catch up in every subset of the versions."""
    history, versions = logs(ranks), len(ranks)
    stepwise = {0: {}}
    for v in range(1, versions + 1):
        stepwise[v] = fold(v - 1, stepwise[v - 1], update(history[v], v - 1))[1]
        for m, want in oracle(ranks, v).items():
            np.testing.assert_allclose(stepwise[v][m].numpy(), want, rtol=0, atol=2e-5)
    for present in range(1 << min(versions, 8)):
        base = 0, {}
        for v in range(1, versions + 1):
            if v == versions or present >> (v - 1) & 1:
                base = fold(*base, update(history[v], base[0]))
                assert base[0] == v
                assert all(torch.equal(base[1][m], stepwise[v][m]) for m in SHAPES)


@pytest.mark.parametrize("ranks", MANY, ids=str)
def test_an_update_is_the_missed_pairs_or_the_matrices_whichever_is_smaller(ranks):
    for v, log in enumerate(logs(ranks)):
        assert log.version == v
        for since in range(v + 1):
            sent = update(log, since)
            assert (sent.version, bool(sent.dense) and bool(sent.pairs)) == (v, False)
            assert sent.since == (0 if sent.dense else since)
            assert size(sent) == min(sum(ranks[since:v]) * PER_RANK, DENSE)


def test_the_oldest_pairs_go_first():
    """By hand: 336 / 52 = 6.46, so six ranks are less than the matrices and seven are more."""
    six, seven = logs((3, 3))[-1], logs((3, 3, 1))[-1]
    assert (six.start, len(six.pairs), six.total) == (0, 2, {})
    assert (seven.start, seven.version, [len(p.A["q"]) for p in seven.pairs]) == (1, 3, [3, 1])
    for m, want in oracle((3, 3, 1), 3).items():
        np.testing.assert_allclose(seven.total[m].numpy(), want, rtol=0, atol=2e-5)  # of all three, not of what went
    assert size(update(seven, 2)) == PER_RANK and size(update(seven, 1)) == 4 * PER_RANK
    assert update(seven, 0).dense and update(seven, 3) == BaseUpdate(3, 3)
    wide = append(seven, pair(5, 7))
    assert (wide.start, wide.pairs, wide.version) == (4, (), 4)


def test_a_client_that_misses_one_round_in_a_long_run_is_sent_one_pair():
    """Sixty rounds of two ranks each: the matrices are 336 numbers, a round's pair is 104, so three rounds can be missed."""
    for log in logs((2,) * 60)[4:]:
        assert [size(update(log, log.version - n)) for n in range(6)] == [0, 104, 208, 312, 336, 336]


def test_what_clients_know_does_not_count():
    """At half the cost thirteen ranks are 338 numbers: above; twelve are below."""
    half = {"cost": lambda p: numbers(p) // 2}
    fits, not_all = logs((6, 6), **half)[-1], logs((6, 7), **half)[-1]
    assert fits.start == 0 and not_all.start == 1
    assert [len(update(fits, v).pairs) for v in (0, 1)] == [2, 1]
    assert everything(fits).dense and not everything(logs((3, 3))[-1]).dense  # a model that is deployed knows nothing


def test_nothing_was_merged():
    assert missed(History(), Client(0, 1, 1)) == everything(History()) == BaseUpdate() and History().version == 0


def test_it_takes_a_copy_in_one_layout_and_leaves_its_inputs_alone():
    """The bits of a product can depend on the layout of its factors, and a message leaves rows contiguous."""
    p = pair(0, 3)
    turned = Factors(*({m: x.T.contiguous().T for m, x in role.items()} for role in (p.A, p.B)), p.scale)
    assert not turned.A["q"].is_contiguous() and not turned.B["q"].is_contiguous()
    one, two = append(History(), p), append(History(), turned)
    for role in ("A", "B"):
        got = getattr(two.pairs[0], role)["q"]
        assert got.is_contiguous() and torch.equal(got, getattr(one.pairs[0], role)["q"])
    before = one.pairs
    append(one, pair(1, 8))
    assert one.pairs is before and one.start == 0 and not turned.B["q"].is_contiguous()


def test_the_dtype_of_the_pairs_is_kept():
    for dtype in (torch.float32, torch.float64):
        log = append(History(), pair(0, 8, dtype))
        assert {x.dtype for x in log.total.values()} == {dtype} and len(log.total) == 2


def products(seed: int, rank: int) -> dict:
    p = pair(seed, rank)
    return {m: (p.B[m], p.A[m]) for m in SHAPES}


def test_a_product_that_fits_is_logged_as_it_is():
    log = append_matrices(append(History(), pair(0, 2)), products(1, 4), 1.5)  # six ranks: see `test_when_it_collapses`
    assert [len(p.A["q"]) for p in log.pairs] == [2, 4] and log.pairs[1].scale == 1.5
    assert all(torch.equal(log.pairs[1].B[m], pair(1, 4).B[m]) for m in SHAPES)


def test_what_takes_more_than_the_matrices_is_not_kept_as_a_pair():
    one = append_matrices(append(History(), pair(0, 2)), products(1, 7), 1.5)
    two = append(append(History(), pair(0, 2)), pair(1, 7))  # of the same scale
    assert (one.start, one.pairs, one.version) == (2, (), 2)
    for m in SHAPES:
        torch.testing.assert_close(one.total[m], two.total[m])
        given = {k: B @ A for k, (B, A) in products(1, 7).items()}
        torch.testing.assert_close(append_matrices(append(History(), pair(0, 2)), given, 1.5).total[m], one.total[m])
        torch.testing.assert_close(append_matrices(one, given).total[m], one.total[m] + given[m])


@pytest.mark.parametrize("tall", [True, False])
def test_what_is_wider_than_its_module_is_logged_as_the_matrix_beside_an_identity(tall):
    """A small module among large ones: the log as a whole still fits."""
    rng, small = np.random.default_rng(5), (6, 4) if tall else (4, 6)
    shapes = {"s": small, "l": (100, 100)}
    random = {m: (torch.tensor(rng.normal(size=(o, 9))), torch.tensor(rng.normal(size=(9, i)))) for m, (o, i) in shapes.items()}
    for given in (random, random | {"s": random["s"][0] @ random["s"][1]}):
        (logged,) = append_matrices(History(), given, 2.0).pairs
        assert (logged.B["s"].shape, logged.A["s"].shape, len(logged.A["l"])) == ((small[0], 4), (4, small[1]), 9)
        torch.testing.assert_close(logged.B["s"] @ logged.A["s"], random["s"][0] @ random["s"][1], rtol=0, atol=1e-12)


def test_matrices_are_not_changed():
    given = {m: torch.ones(shape) for m, shape in SHAPES.items()}
    log = append_matrices(append_matrices(History(), given, 0.5), given, 0.5)
    assert all(bool((x == 1).all()) for x in given.values()) and all(bool((x == 1).all()) for x in log.total.values())


def test_replies_are_noted_as_they_pass():
    log = History(7, {"q": torch.ones(12, 8)}, (), {1: 3, 4: 5})
    noted, replies = noting(log, (Reply(Client(k, 1, 1), None) for k in (1, 2)))
    assert [r.client.id for r in replies] == [1, 2]
    assert noted.seen == {1: 7, 2: 7, 4: 5} and log.seen == {1: 3, 4: 5}
    assert (noted.start, noted.total, noted.pairs) == (log.start, log.total, log.pairs)
    one, two = append(noted, pair(0, 1)), append_matrices(noted, {m: torch.ones(shape) for m, shape in SHAPES.items()})
    assert one.seen == two.seen == noted.seen


def test_clients_that_need_the_whole_share_one_sum_which_later_versions_leave_alone():
    log = append(append(History(), pair(0, 8)), pair(1, 1))
    one, two = update(log, 0), everything(log)
    before = {m: x.clone() for m, x in one.dense.items()}
    later = append(append_matrices(log, products(2, 8)), pair(3, 1))
    for m, want in oracle((8, 1), 2).items():
        assert one.dense[m] is two.dense[m]
        np.testing.assert_allclose(one.dense[m].numpy(), want, rtol=0, atol=2e-5)
        assert torch.equal(one.dense[m], before[m]) and not torch.equal(later.total[m], before[m])
    knows_half = append(History(), pair(0, 8), cost=lambda p: numbers(p) // 2)  # kept as a pair, but deployed as matrices
    assert everything(knows_half).dense["q"] is everything(knows_half).dense["q"]
