"""Word problems: right, many, and none of the training part in the test part."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import islice

import pytest

from fedlora.config import DataConfig
from fedlora.data import arithmetic
from fedlora.data.load import find

# What a reader makes of each story: written from the questions' words, not from the code that made them.
READ: dict[str, tuple[str, Callable[..., int]]] = {
    r"buys (\d+) \w+ for (\d+) coins each\. How many coins does \w+ pay\?": ("shop", lambda n, price: n * price),
    r"buys (\d+) \w+ for (\d+) coins each and pays with (\d+)": ("shop", lambda n, price, paid: paid - n * price),
    r"buys (\d+) \w+ for (\d+) coins each and a bag for (\d+)": ("shop", lambda n, price, bag: bag + price * n),
    r"A box of \w+ cost (\d+) coins\. The price falls by (\d+)": ("shop", lambda before, less: before - less),
    r"(\d+) girls and (\d+) boys of the school": ("school", lambda girls, boys: boys + girls),
    r"A class has (\d+) \w+, another (\d+) and a third (\d+)": ("school", lambda *classes: sum(classes)),
    r"(\d+) pupils are at school\. In spring (\d+) pupils join, in summer (\d+) leave": (
        "school",
        lambda n, new, gone: n - gone + new,
    ),
    r"has (\d+) \w+ and hands (\d+) of them": ("school", lambda n, given: n - given),
    r"One pan takes (\d+) \w+\. How many \w+ do (\d+) pans": ("kitchen", lambda n, pans: n * pans),
    r"cooks (\d+) pots of soup with (\d+) \w+ each and puts (\d+)": ("kitchen", lambda pots, n, salad: salad + n * pots),
    r"gets (\d+) \w+ before the meal and (\d+) \w+ with it\. How many \w+ do (\d+) guests": (
        "kitchen",
        lambda before, with_it, guests: before * guests + with_it * guests,
    ),
    r"fills (\d+) trays with (\d+) rows of (\d+)": ("kitchen", lambda trays, rows, n: n * rows * trays),
    r"A board is (\d+) cm long\. \w+ saws off (\d+)": ("workshop", lambda length, off: length - off),
    r"holds (\d+) \w+\. \w+ uses (\d+) of them on Monday and (\d+)": ("workshop", lambda n, one, two: n - (one + two)),
    r"needs (\d+) \w+\. \w+ builds (\d+) tables out of a box of (\d+)": ("workshop", lambda n, tables, box: box - tables * n),
    r"makes (\d+) \w+ an hour, and (\d+) of them are bad\. .* in (\d+) hours": (
        "workshop",
        lambda n, bad, hours: n * hours - bad * hours,
    ),
}


def read(question: str) -> tuple[str, str, tuple[int, ...], int]:
    """The story, its owner, its numbers, and the answer."""
    ((pattern, found),) = ((p, m) for p in READ if (m := re.search(p, question)))
    owner, answer = READ[pattern]
    numbers = tuple(map(int, found.groups()))
    assert len(numbers) == len(re.findall(r"\d+", question))  # all that are there
    return pattern, owner, numbers, answer(*numbers)


@cache
def rows(part: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = getattr(find(DataConfig(source="arithmetic").sources[0]), part).table.to_pylist()
    return found


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_answer_is_right_and_every_owner_tells_its_own(part: str) -> None:
    for row in rows(part):
        _, owner, _, answer = read(row["question"])
        steps, result = row["answer"].split("\n#### ")
        assert owner == row["owner"] and int(result) == answer > 0
        worked = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+) [\w ]+\.", steps)
        assert " ".join(f"{a} {sign} {b} = {c}" for a, sign, b, c in worked) == re.sub(r" [a-zA-Z ]+\.", "", steps)
        for a, sign, b, c in worked:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(c)
        assert worked[-1][3] == result
        text = row["question"] + row["answer"]
        assert "{" not in text and len(re.findall(r"[A-Za-z]+|\d|[^\w ]", text)) <= 85  # about SmolLM2's tokens


def test_owners_and_stories_are_of_one_size() -> None:
    for part, each in (("train", 250), ("test", 50)):
        owners = Counter(row["owner"] for row in rows(part))
        assert owners == dict.fromkeys(("shop", "school", "kitchen", "workshop"), each)
        stories = Counter(read(row["question"])[0] for row in rows(part))
        assert set(stories) == set(READ) and max(stories.values()) - min(stories.values()) <= 1
    assert [row["owner"] for row in rows("test")[:4]] == ["shop", "school", "kitchen", "workshop"]


def test_no_problem_comes_twice() -> None:
    """Not with other names or things either."""
    known = [read(row["question"])[::2] for part in ("train", "test") for row in rows(part)]
    assert len(set(known)) == len(known) == 1200


def test_there_are_many_and_they_are_always_the_same() -> None:
    for owner in arithmetic.OWNERS:
        found = list(islice(arithmetic.problems(owner), 600))
        assert len({read(question)[::2] for question, _ in found}) == 600
        assert found[:300] == [
            (row["question"], row["answer"]) for part in ("train", "test") for row in rows(part) if row["owner"] == owner
        ]
