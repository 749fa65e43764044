"""Splits: every example has one client, and each rule does what its definition says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import DataConfig
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.partition import Parts, Spread, dirichlet_shares, split, statistics
from fedlora.errors import BadInput
from fedlora.seeds import generator


def dataset(train: list[int], test: list[int], owners: list[str] | None = None, test_owners: list[str] | None = None) -> Dataset:
    def part(labels: list[int], names: list[str] | None) -> Split:
        return Split(tuple(f"text {i}" for i in range(len(labels))), np.array(labels, dtype=np.int64), tuple(names or ()))

    classes = max(train + test) + 1
    return Dataset("toy", part(train, owners), part(test, test_owners), Schema(tuple(f"class {c}" for c in range(classes))))


def balanced(classes: int, train: int, test: int) -> Dataset:
    return dataset([i % classes for i in range(classes * train)], [i % classes for i in range(classes * test)])


def deal(data: Dataset, partition: str, count: int | None, seed: int = 0, **settings: Any) -> Parts:
    return split(data, DataConfig(partition=partition, **settings), count, seed)


def assert_each_example_has_one_client(parts: Parts, data: Dataset) -> None:
    for rows, examples in ((parts.train, data.train), (parts.test, data.test)):
        assert len(rows) == len(parts.names)
        assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(examples)))
        assert all(mine.dtype == np.int64 and np.all(np.diff(mine) > 0) for mine in rows)


def same(one: Parts, other: Parts) -> bool:
    pairs = zip(one.train + one.test, other.train + other.test, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


labels = st.lists(st.integers(0, 4), min_size=20, max_size=200)


@given(
    train=labels,
    test=st.lists(st.integers(0, 4), max_size=60),
    count=st.integers(1, 20),
    seed=st.integers(0, 10),
    iid=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_example_has_one_client(train: list[int], test: list[int], count: int, seed: int, iid: bool) -> None:
    data = dataset(train, test)
    parts = deal(data, "iid" if iid else "dirichlet", count, seed, alpha=0.1)
    assert_each_example_has_one_client(parts, data)
    assert parts.names[0] == "client 0"
    assert same(parts, deal(data, "iid" if iid else "dirichlet", count, seed, alpha=0.1))


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_the_seed_decides(partition: str) -> None:
    data = balanced(10, 20, 10)
    assert same(deal(data, partition, 10, 1), deal(data, partition, 10, 1))
    assert not same(deal(data, partition, 10, 1), deal(data, partition, 10, 2))


def test_ten_clients_by_default() -> None:
    assert len(deal(balanced(10, 20, 10), "dirichlet", None).names) == 10


# ---- iid ---------------------------------------------------------------------------------------------------------------


@given(train=labels, count=st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_iid_sizes_differ_by_at_most_one(train: list[int], count: int) -> None:
    found = statistics(deal(data := dataset(train, train[:7]), "iid", count), data)
    assert found.train.max_examples - found.train.min_examples <= 1
    assert found.test.max_examples - found.test.min_examples <= 1


def test_iid_is_shuffled() -> None:
    parts = deal(balanced(2, 50, 5), "iid", 2)
    assert not np.array_equal(parts.train[0], np.arange(50))


# ---- Dirichlet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-3, 0.01, 0.5, 1.0, 100.0])
def test_dirichlet_shares_have_the_moments_of_a_dirichlet(alpha: float) -> None:
    """E p_k = 1/K and Var p_k = (1/K)(1 - 1/K)/(K alpha + 1), to five standard errors of 20,000 draws."""
    count, draws = 4, 20_000
    rng = generator(0, "test")
    p = np.stack([dirichlet_shares(rng, alpha, count) for _ in range(draws)])
    assert np.all(np.isfinite(p)) and np.all(p >= 0)
    assert np.allclose(p.sum(axis=1), 1)
    variance = (1 / count) * (1 - 1 / count) / (count * alpha + 1)
    assert np.all(np.abs(p.mean(axis=0) - 1 / count) < 5 * np.sqrt(variance / draws))
    squares = (p - 1 / count) ** 2
    assert np.all(np.abs(squares.mean(axis=0) - variance) < 5 * squares.std(axis=0) / np.sqrt(draws))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.01, 1e6])
def test_dirichlet_at_extreme_alpha(alpha: float) -> None:
    data = balanced(20, 30, 10)
    for seed in range(20):
        assert_each_example_has_one_client(deal(data, "dirichlet", 30, seed, alpha=alpha), data)


def test_a_tiny_alpha_gives_each_class_to_one_client_and_a_huge_one_gives_everybody_everything() -> None:
    data = balanced(4, 100, 100)
    tiny = deal(data, "dirichlet", 2, alpha=1e-6)
    for c in range(4):
        have = [np.count_nonzero(data.train.targets[mine] == c) for mine in tiny.train]
        assert sorted(have) in ([0, 100], [1, 99])  # one example may have been moved to a client without any
    huge = statistics(deal(data, "dirichlet", 10, alpha=1e6), data)
    assert huge.train.min_classes == 4
    assert huge.train.max_examples - huge.train.min_examples <= 4


def test_training_and_test_share_the_draw_and_counts_are_rounded_to_the_nearest() -> None:
    """With equally large parts the counts must be equal; with a tenth, within rounding of a tenth."""
    data = dataset([i % 5 for i in range(5000)], [i % 5 for i in range(5000)])
    parts = deal(data, "dirichlet", 7, alpha=0.5)
    for mine, theirs in zip(parts.train, parts.test, strict=True):
        assert np.array_equal(
            np.bincount(data.train.targets[mine], minlength=5), np.bincount(data.test.targets[theirs], minlength=5)
        )
    small = dataset([i % 5 for i in range(5000)], [i % 5 for i in range(500)])
    parts = deal(small, "dirichlet", 7, alpha=0.5)
    for mine, theirs in zip(parts.train, parts.test, strict=True):
        train = np.bincount(small.train.targets[mine], minlength=5)
        test = np.bincount(small.test.targets[theirs], minlength=5)
        assert np.all(np.abs(train / 10 - test) <= 1.1)  # each end of a share moves by half an example at most


def test_each_class_has_its_own_draw() -> None:
    data = balanced(3, 1000, 10)
    counts = [np.bincount(data.train.targets[mine], minlength=3) for mine in deal(data, "dirichlet", 5, alpha=0.5).train]
    assert len(set(np.transpose(counts).ravel().tolist())) > 10


def test_dirichlet_counts_add_up_from_rounded_running_totals() -> None:
    data = balanced(1, 1000, 10)
    parts = deal(data, "dirichlet", 6, seed=3, alpha=1.0)
    p = dirichlet_shares(generator(3, "partition", "shares", 0), 1.0, 6)
    assert np.all(np.abs(np.cumsum([len(mine) for mine in parts.train]) - 1000 * np.cumsum(p)) <= 0.5)


@given(train=labels, test=st.lists(st.integers(0, 4), max_size=40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_min_size(train: list[int], test: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 10))
    least = data.draw(st.integers(1, len(train) // count))
    examples = dataset(train, test)
    parts = deal(examples, "dirichlet", count, alpha=0.01, min_size=least)
    assert_each_example_has_one_client(parts, examples)
    assert min(len(mine) for mine in parts.train) >= least
    assert min(len(mine) for mine in parts.test) >= min(least, len(test) // count)


def test_the_largest_client_gives() -> None:
    """One class, nearly all with one client: only that one may lose examples."""
    data = balanced(1, 100, 10)
    before = [len(mine) for mine in deal(data, "dirichlet", 4, alpha=1e-6, min_size=1).train]
    after = [len(mine) for mine in deal(data, "dirichlet", 4, alpha=1e-6, min_size=20).train]
    assert sorted(before) == [1, 1, 1, 97]
    assert sorted(after) == [20, 20, 20, 40]
    assert before.index(97) == after.index(40)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_too_many_clients_for_the_data(partition: str) -> None:
    with pytest.raises(
        BadInput, match=r"^clients.count = 4: 4 clients with data.min_size = 6 need 24 training examples, .* are 20$"
    ):
        deal(balanced(4, 5, 5), partition, 4, min_size=6)


# ---- pathological ------------------------------------------------------------------------------------------------------


def test_pairs_of_clients_share_pairs_of_classes() -> None:
    data = balanced(20, 11, 7)
    parts = deal(data, "pathological", 20)
    assert_each_example_has_one_client(parts, data)
    for k in range(20):
        first = 2 * (k // 2)
        for rows, examples, each in ((parts.train[k], data.train, 11), (parts.test[k], data.test, 7)):
            have = np.bincount(examples.targets[rows], minlength=20)
            assert set(np.flatnonzero(have)) == {first, first + 1}
            assert set(have[first : first + 2]) == {each // 2, each // 2 + 1}


def test_fewer_pairs_of_clients_take_turns() -> None:
    data = balanced(7, 4, 4)
    parts = deal(data, "pathological", 4)
    assert_each_example_has_one_client(parts, data)
    held = [set(data.train.targets[mine].tolist()) for mine in parts.train]
    assert held == [{0, 1, 4, 5}, {0, 1, 4, 5}, {2, 3, 6}, {2, 3, 6}]


@pytest.mark.parametrize("count", [3, 10])
def test_pathological_counts_that_do_not_work(count: int) -> None:
    with pytest.raises(
        BadInput, match=f"^clients.count = {count}: a pathological split of 7 classes needs an even number, at most 8$"
    ):
        deal(balanced(7, 4, 4), "pathological", count)


def test_a_pathological_client_without_examples() -> None:
    data = dataset([0] * 10 + [3], [0, 1, 2, 3])
    with pytest.raises(
        BadInput, match=r"^data.min_size = 1: with data.partition = pathological, client 3 has 0 training examples$"
    ):
        deal(data, "pathological", 4)


# ---- by column ---------------------------------------------------------------------------------------------------------


def by_owner(data: Dataset, count: int | None = None, **settings: Any) -> Parts:
    return deal(data, "column", count, column="user", **settings)


def test_one_client_for_each_owner() -> None:
    data = dataset([0, 1, 0, 1], [0, 1, 1], ["bo", "al", "bo", "cy"], ["cy", "bo", "zoe"])
    parts = by_owner(data)
    assert parts.names == ("al", "bo", "cy")
    assert [mine.tolist() for mine in parts.train] == [[1], [0, 2], [3]]
    assert [mine.tolist() for mine in parts.test] == [[], [1], [0]]  # zoe's belongs to nobody
    assert same(parts, by_owner(data, count=3))


def test_a_test_part_without_owners_is_everybodys() -> None:
    parts = by_owner(dataset([0, 1], [0, 1, 1], ["bo", "al"]))
    assert [mine.tolist() for mine in parts.test] == [[0, 1, 2], [0, 1, 2]]


def test_a_count_that_is_not_the_number_of_owners() -> None:
    with pytest.raises(BadInput, match=r"^clients.count = 5: column 'user' has 2 owners$"):
        by_owner(dataset([0, 1], [0], ["bo", "al"]), count=5)


def test_an_owner_with_too_few_examples() -> None:
    with pytest.raises(BadInput, match=r"^data.min_size = 2: with data.partition = column, al has 1 training examples$"):
        by_owner(dataset([0, 1, 1], [0], ["bo", "al", "bo"]), min_size=2)


# ---- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    data = dataset([0, 1, 2, 0, 0], [0, 1])
    parts = Parts((np.array([0, 1, 2]), np.array([3, 4])), (np.array([0, 1]), np.array([], dtype=np.int64)), ("a", "b"))
    found = statistics(parts, data)
    assert found.train == Spread(max_examples=3, min_examples=2, max_classes=3, min_classes=1)
    assert found.test == Spread(max_examples=2, min_examples=0, max_classes=2, min_classes=0)


@pytest.mark.parametrize(
    ("partition", "settings", "rule"),
    [
        ("iid", {}, "IID"),
        ("dirichlet", {"alpha": 0.5}, "Dirichlet(0.5)"),
        ("pathological", {}, "pathological"),
    ],
)
def test_the_rule_in_words(partition: str, settings: dict[str, Any], rule: str) -> None:
    assert deal(balanced(10, 20, 10), partition, 10, **settings).rule == rule


# ---- validation --------------------------------------------------------------------------------------------------------


def with_validation(data: Dataset, labels: list[int], owners: list[str] | None = None) -> Dataset:
    return replace(data, validation=dataset(labels, [0], owners).train)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological"])
def test_validation_is_dealt_as_the_test_part_and_changes_nothing_else(partition: str) -> None:
    """With alpha = 0.5 and as many examples of each class, a client's counts by class equal those of its test part."""
    plain = balanced(4, 50, 30)
    data = with_validation(plain, [i % 4 for i in range(120)])
    parts, before = deal(data, partition, 4), deal(plain, partition, 4)
    assert same(parts, before) and before.validation == ()
    assert np.array_equal(np.sort(np.concatenate(parts.validation)), np.arange(120))
    for mine, theirs in zip(parts.validation, parts.test, strict=True):
        assert data.validation is not None
        counts = [np.bincount(s.targets[rows], minlength=4) for s, rows in ((data.validation, mine), (data.test, theirs))]
        assert np.array_equal(*counts) or partition == "iid"
        assert len(mine) == len(theirs)
    assert any(not np.array_equal(a, b) for a, b in zip(parts.validation, parts.test, strict=True))  # a draw of its own
    spread = statistics(parts, data).validation
    assert spread is not None and spread.max_examples == max(map(len, parts.validation))
    assert statistics(before, plain).validation is None


def test_validation_by_owner() -> None:
    data = dataset([0, 1, 0], [0, 1], ["bo", "al", "bo"], ["bo", "al"])
    parts = by_owner(with_validation(data, [0, 1, 1], ["bo", "zoe", "bo"]))
    assert [mine.tolist() for mine in parts.validation] == [[], [0, 2]]
    parts = by_owner(with_validation(data, [0, 1, 1]))
    assert [mine.tolist() for mine in parts.validation] == [[0, 1, 2]] * 2


# ---- strata ------------------------------------------------------------------------------------------------------------


def test_each_stratum_has_an_owner() -> None:
    data = balanced(5, 4, 2)
    parts = deal(data, "strata", None)
    assert parts.names == data.strata_names and parts.rule == "by classes"
    for c, (train, test) in enumerate(zip(parts.train, parts.test, strict=True)):
        assert set(data.train.targets[train]) == set(data.test.targets[test]) == {c} and (len(train), len(test)) == (4, 2)
    fewer = deal(data, "strata", 2)
    assert [sorted(set(data.train.targets[rows])) for rows in fewer.train] == [[0, 2, 4], [1, 3]]
    assert fewer.names == ("client 0", "client 1")
    with pytest.raises(BadInput, match=r"^clients.count = 6: the training part has 5 classes, one a client at most$"):
        deal(data, "strata", 6)


def test_strata_without_training_examples_have_no_owner() -> None:
    data = balanced(3, 4, 2)
    without = replace(data, train=data.train.take(np.flatnonzero(data.train.targets != 1)))
    parts = deal(without, "strata", None)
    assert parts.names == (data.strata_names[0], data.strata_names[2])
    assert 1 not in data.test.targets[np.concatenate(parts.test)]
