"""What is held out of a part: the right number, of every owner and class its share, and never the last one of either."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import load

from fedlora.config import DataConfig
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.holdout import apportion, hold_out
from fedlora.errors import BadInput
from fedlora.seeds import generator


def rng(seed: int = 0) -> np.random.Generator:
    return generator(seed, "test")


def part(labels: list[int], owners: list[str] | None = None) -> Split:
    return Split(tuple(f"t{i}" for i in range(len(labels))), np.array(labels, dtype=np.int64), tuple(owners or ()))


def write(path: Path, rows: list[tuple[str, ...]], header: str = "text,label,user") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return path


def read(source: Path, seed: int = 0, **settings: Any) -> Dataset:
    return load(DataConfig(source=str(source), **settings), seed)


OWNED = {"partition": "column", "column": "user"}


# ---- the function ------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcde")), min_size=1, max_size=60),
    share=st.floats(0.01, 0.99),
    owned=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_owner_and_class_keeps_one_and_the_number_is_right(
    rows: list[tuple[int, str]], share: float, owned: bool, seed: int
) -> None:
    split = part([label for label, _ in rows], [owner for _, owner in rows] if owned else None)
    kept, held = hold_out(split, share, rng(seed))
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(rows)))
    assert np.all(np.diff(kept) > 0) and np.all(np.diff(held) > 0)
    assert {rows[i][0] for i in kept} == {label for label, _ in rows}
    if owned:
        assert {rows[i][1] for i in kept} == {owner for _, owner in rows}
    # No more can have to be kept than one for each owner and each class.
    least = len({label for label, _ in rows}) + (len({owner for _, owner in rows}) if owned else 0)
    aim = max(1, round(share * len(rows)))
    assert min(aim, len(rows) - least) <= len(held) <= aim
    again = hold_out(split, share, rng(seed))
    assert all(map(np.array_equal, (kept, held), again))


def test_classes_have_their_shares_by_hand() -> None:
    """A fifth of 50, 25 and 15 is 10, 5 and 3."""
    split = part([0] * 50 + [1] * 25 + [2] * 15)
    for seed in range(5):
        assert np.bincount(split.targets[hold_out(split, 0.2, rng(seed))[1]]).tolist() == [10, 5, 3]


def test_owners_have_their_shares_and_within_them_the_classes_by_hand() -> None:
    """a: 20 of class 0 and 10 of class 1, so 4 and 2 of 6; b: 10 and 10, so 2 and 2 of 4."""
    split = part([0] * 20 + [1] * 10 + [0] * 10 + [1] * 10, ["a"] * 30 + ["b"] * 20)
    for seed in range(5):
        held = hold_out(split, 0.2, rng(seed))[1]
        assert Counter((split.owners[i], int(split.targets[i])) for i in held) == {
            ("a", 0): 4,
            ("a", 1): 2,
            ("b", 0): 2,
            ("b", 1): 2,
        }


def test_many_small_owners_still_give_the_right_total_and_all_classes_alike() -> None:
    """200 owners of 4, one of each class: 160 are held out of 800, none of an owner twice, about 40 of each class."""
    split = part([i % 4 for i in range(800)], [f"o{i // 4}" for i in range(800)])
    held = hold_out(split, 0.2, rng())[1]
    assert len(held) == 160
    assert max(Counter(split.owners[i] for i in held).values()) == 1
    assert all(20 < n < 60 for n in np.bincount(split.targets[held]))  # 40, and 5 is a standard deviation


def test_the_held_out_ones_are_drawn_evenly() -> None:
    """Two classes of ten: over 400 seeds each example is held out 80 times, give or take five standard deviations of 8."""
    split = part([0, 1] * 10)
    often = np.bincount(np.concatenate([hold_out(split, 0.2, rng(seed))[1] for seed in range(400)]), minlength=20)
    assert often.sum() == 1600 and np.all(np.abs(often - 80) < 40)


def test_nothing_can_be_held_out() -> None:
    assert len(hold_out(part([0, 1, 2]), 0.5, rng())[1]) == 0
    assert len(hold_out(part([0, 0, 1], ["a", "b", "c"]), 0.5, rng())[1]) == 0


@pytest.mark.parametrize(
    ("wanted", "most", "total", "counts"),
    [
        ([1.2, 2.7, 0.1], [9, 9, 9], 4, [1, 3, 0]),
        ([1.2, 2.7, 0.1], [9, 2, 9], 4, [2, 2, 0]),
        ([3.0, 3.0, 0.0], [1, 9, 1], 6, [1, 4, 1]),
        ([0.29 * 100, 0.71 * 100], [99, 99], 100, [29, 71]),
    ],
)
def test_largest_remainders_by_hand(wanted: list[float], most: list[int], total: int, counts: list[int]) -> None:
    assert apportion(np.array(wanted), np.array(most), total, rng()).tolist() == counts


# ---- in a data set -----------------------------------------------------------------------------------------------------


def test_an_owner_of_one_row_stays_and_is_named(tmp_path: Path) -> None:
    rows = [(f"t{i}", "xy"[i % 2], "al" if i < 20 else "bo") for i in range(40)] + [("alone", "x", "cy")]
    data = read(write(tmp_path / "a.csv", rows), **OWNED)
    assert "alone" in data.train.inputs and set(data.test.owners) == {"al", "bo"}
    assert data.notes == (
        "no test part: 8 of 41 examples, drawn by seed within owners and classes, are held out for it",
        "1 of 3 owners have no test example: cy",
    )


def test_test_rows_of_nobody_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("a", "x", "al"), ("b", "y", "bo")])
    write(tmp_path / "test.csv", [("c", "x", "zoe"), ("d", "y", "al"), ("e", "y", "zoe"), ("f", "y", "yan")])
    assert read(tmp_path, **OWNED).notes == (
        "1 of 2 owners have no test example: bo",
        "3 of 4 test examples belong to no client, for their owners have no training example: yan, zoe",
    )


def test_nothing_to_test_on_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", [("a", "x", "al"), ("b", "y", "bo")])
    message = "there is no test part, and none can be held out: each owner and stratum keeps one of 2 examples"
    with pytest.raises(BadInput) as caught:
        read(file)
    assert str(caught.value) == f"{file}: {message}"
    write(tmp_path / "a.csv", [(f"t{i}", "xy"[i % 2], f"o{i}") for i in range(30)])
    with pytest.raises(BadInput, match="keeps one of 30 examples"):
        read(file, **OWNED)


def test_texts_of_the_training_part_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("a", "x", ""), ("b", "y", ""), ("", "y", "")])
    write(tmp_path / "test.csv", [("b", "x", ""), ("c", "y", ""), ("", "y", "")])
    assert read(tmp_path).notes == (
        "1 of 3 training texts are empty",
        "1 of 3 test texts are empty",
        "1 of 3 test texts are training texts too",
    )


def test_a_validation_part_is_drawn_from_training_before_the_limit(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [(f"t{i}", "xy"[i % 2], "") for i in range(40)])
    write(tmp_path / "test.csv", [("z", "x", "")])
    data, limited = read(tmp_path, validation=0.25), read(tmp_path, validation=0.25, limit=10)
    assert data.validation is not None and limited.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 1)
    assert np.bincount(data.validation.targets).tolist() == [5, 5]
    assert set(data.train.inputs) | set(data.validation.inputs) == {f"t{i}" for i in range(40)}
    assert data.notes == ("validation part: 10 of 40 training examples, drawn by seed within classes, are held out for it",)
    assert len(limited.train) == 10 and set(limited.train.inputs) < set(data.train.inputs)
    assert limited.validation.inputs == data.validation.inputs
    assert read(tmp_path, 1, validation=0.25).validation.inputs != data.validation.inputs  # type: ignore[union-attr]
    assert read(tmp_path).validation is None


def test_a_validation_file_wins(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [(f"t{i}", "xy"[i % 2], "al") for i in range(40)])
    write(tmp_path / "test.csv", [("z", "x", "al")])
    write(tmp_path / "validation.csv", [("v", "y", "al"), ("w", "y", "zoe"), ("t1", "y", "al")])
    data = read(tmp_path, validation=0.25, **OWNED)
    assert data.validation is not None and data.validation.inputs == ("v", "w", "t1") and len(data.train) == 40
    assert data.notes == (
        f"the validation part is {tmp_path / 'validation.csv'}, 3 examples; data.validation = 0.25 has no effect",
        "1 of 3 validation texts are training texts too",
        "1 of 3 validation examples belong to no client, for their owners have no training example: zoe",
    )
    write(tmp_path / "validation.csv", [("v", "nope", "al")])
    with pytest.raises(BadInput, match=r"validation\.csv: column 'label', line 2: unknown label 'nope'"):
        read(tmp_path)


def test_a_limit_of_the_test_part(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [("a", "x", ""), ("b", "y", "")])
    write(tmp_path / "test.csv", [(f"t{i}", "xy"[i % 2], "") for i in range(30)])
    few, more = (read(tmp_path, test_limit=n).test for n in (7, 12))
    assert (len(few), len(more)) == (7, 12) and set(few.inputs) < set(more.inputs)
    rows = [int(text[1:]) for text in few.inputs]
    assert rows == sorted(rows) and few.targets.tolist() == [row % 2 for row in rows]
    assert read(tmp_path, 1, test_limit=7).test.inputs != few.inputs
    assert len(read(tmp_path, test_limit=100).test) == 30


# ---- digest ------------------------------------------------------------------------------------------------------------


def test_the_digest_tells_all_data_apart() -> None:
    def one(**changes: Any) -> str:
        fields = {"name": "d", "train": part([0, 1], ["a", "b"]), "test": part([0]), "schema": Schema(("x", "y")), **changes}
        return Dataset(**fields).digest

    domains = Split(("t0",), np.array([0]), domains=np.array([0]))
    others = [
        one(train=part([1, 1], ["a", "b"])),
        one(train=part([0, 1], ["a", "c"])),
        one(train=part([0, 1])),
        one(train=Split(("t0t", "1"), np.array([0, 1]), ("a", "b"))),
        one(test=part([0, 0])),
        one(test=domains),
        one(schema=Schema(("x", "z"))),
        one(schema=Schema(("xy", ""))),
        one(validation=part([0])),
        one(validation=part([1])),
    ]
    assert len({one(), *others}) == 11
    assert one() == one(name="other", notes=("a note",)) and len(one()) == 32
