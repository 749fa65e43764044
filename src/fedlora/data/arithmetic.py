"""Arithmetic word problems of four kinds of owners, written here: small data with natural owners, for language models.

Each owner has stories, words and operations of its own: a shop multiplies prices and gives change, a school adds and moves pupils,
a kitchen multiplies, a workshop takes away. A question is answered as in GSM8K: a step a sentence, and the result after `####`.
The data are the same everywhere and always; no two problems are one story with the same numbers, so none is in both parts.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

from fedlora.data.source import Part, Source
from fedlora.seeds import generator

NAME = "arithmetic"
TRAIN, TEST = 250, 50  # problems of each owner
SEED = 0  # of the data, not of a run
COLUMNS = ("owner", "question", "answer")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NAMES = ("Ada", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")


@dataclass(frozen=True)
class Story:
    """One kind of problem.

    Attributes:
        question: with {name}, {thing} and numbers in braces.
        numbers: each with its smallest and its largest value.
        steps: (left, operation, right, what that is); x is the result of the step before.
    """

    question: str
    numbers: Mapping[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str, str], ...]


FEW, SOME, MANY = (2, 12), (3, 40), (30, 150)

STORIES: Mapping[str, tuple[tuple[str, ...], tuple[Story, ...]]] = {
    "shop": (
        ("pens", "apples", "postcards", "candles", "lemons", "stamps", "ribbons", "notebooks"),
        (
            Story(
                "{name} buys {a} {thing} for {b} coins each. How many coins does {name} pay?",
                {"a": FEW, "b": SOME},
                (("a", "*", "b", "coins"),),
            ),
            Story(
                "{name} buys {a} {thing} for {b} coins each and pays with {c} coins. How many coins come back?",
                {"a": FEW, "b": FEW, "c": MANY},
                (("a", "*", "b", "coins for the {thing}"), ("c", "-", "x", "coins come back")),
            ),
            Story(
                "{name} buys {a} {thing} for {b} coins each and a bag for {c} coins. How many coins is that?",
                {"a": FEW, "b": FEW, "c": SOME},
                (("a", "*", "b", "coins for the {thing}"), ("x", "+", "c", "coins in all")),
            ),
            Story(
                "A box of {thing} cost {a} coins. The price falls by {b} coins. How many coins does the box cost now?",
                {"a": MANY, "b": SOME},
                (("a", "-", "b", "coins"),),
            ),
        ),
    ),
    "school": (
        ("books", "poems", "maps", "songs", "posters", "flags", "letters", "drawings"),
        (
            Story(
                "{a} girls and {b} boys of the school make {thing}. How many pupils are that?",
                {"a": SOME, "b": SOME},
                (("a", "+", "b", "pupils"),),
            ),
            Story(
                "A class has {a} {thing}, another {b} and a third {c}. How many {thing} do the classes have together?",
                {"a": SOME, "b": SOME, "c": SOME},
                (("a", "+", "b", "{thing} in two classes"), ("x", "+", "c", "{thing} in three")),
            ),
            Story(
                "{a} pupils are at school. In spring {b} pupils join, in summer {c} leave. How many pupils are there now?",
                {"a": MANY, "b": SOME, "c": SOME},
                (("a", "+", "b", "pupils in spring"), ("x", "-", "c", "pupils now")),
            ),
            Story(
                "The teacher {name} has {a} {thing} and hands {b} of them to the class. How many {thing} are left?",
                {"a": MANY, "b": SOME},
                (("a", "-", "b", "{thing} left"),),
            ),
        ),
    ),
    "kitchen": (
        ("eggs", "carrots", "tomatoes", "onions", "plums", "figs", "olives", "peppers"),
        (
            Story(
                "One pan takes {a} {thing}. How many {thing} do {b} pans take?",
                {"a": FEW, "b": SOME},
                (("b", "*", "a", "{thing}"),),
            ),
            Story(
                "{name} cooks {a} pots of soup with {b} {thing} each and puts {c} {thing} into a salad. How many {thing} is that?",
                {"a": FEW, "b": FEW, "c": SOME},
                (("a", "*", "b", "{thing} for the soup"), ("x", "+", "c", "{thing} in all")),
            ),
            Story(
                "Each guest gets {a} {thing} before the meal and {b} {thing} with it. How many {thing} do {c} guests get?",
                {"a": FEW, "b": FEW, "c": FEW},
                (("a", "+", "b", "{thing} for a guest"), ("c", "*", "x", "{thing} for all")),
            ),
            Story(
                "{name} fills {a} trays with {b} rows of {c} {thing}. How many {thing} are on the trays?",
                {"a": (2, 8), "b": (2, 8), "c": FEW},
                (("b", "*", "c", "{thing} on a tray"), ("a", "*", "x", "{thing} on all")),
            ),
        ),
    ),
    "workshop": (
        ("screws", "nails", "bolts", "hinges", "planks", "tiles", "hooks", "springs"),
        (
            Story(
                "A board is {a} cm long. {name} saws off {b} cm. How many cm are left?",
                {"a": MANY, "b": SOME},
                (("a", "-", "b", "cm left"),),
            ),
            Story(
                "A drawer holds {a} {thing}. {name} uses {b} of them on Monday and {c} on Tuesday. How many {thing} are left?",
                {"a": MANY, "b": SOME, "c": SOME},
                (("a", "-", "b", "{thing} after Monday"), ("x", "-", "c", "{thing} left")),
            ),
            Story(
                "A table needs {a} {thing}. {name} builds {b} tables out of a box of {c} {thing}. How many {thing} are left?",
                {"a": FEW, "b": FEW, "c": MANY},
                (("b", "*", "a", "{thing} for the tables"), ("c", "-", "x", "{thing} left")),
            ),
            Story(
                "A machine makes {a} {thing} an hour, and {b} of them are bad. How many good {thing} does it make in {c} hours?",
                {"a": (10, 30), "b": (2, 9), "c": FEW},
                (("a", "-", "b", "good {thing} an hour"), ("c", "*", "x", "good {thing} in all")),
            ),
        ),
    ),
}
OWNERS = tuple(STORIES)


def source() -> Source:
    """The data set: a training and a test part with the columns owner, question and answer; owners take turns."""
    return Source(NAME, _part("training", 0, TRAIN), _part("test", TRAIN, TRAIN + TEST))


def _part(name: str, first: int, last: int) -> Part:
    import pyarrow as pa

    of_each = [[(owner, *problem) for problem in islice(problems(owner), first, last)] for owner in OWNERS]
    columns = zip(*chain.from_iterable(zip(*of_each, strict=True)), strict=True)
    return Part(f"{NAME} ({name})", pa.table(dict(zip(COLUMNS, map(list, columns), strict=True))))


def problems(owner: str) -> Iterator[tuple[str, str]]:
    """Question and answer of one problem after the other: an owner's stories take turns, and none comes twice with the same
    numbers. There are well over a thousand of each owner; a story whose numbers are used up is looked for in vain."""
    things, stories = STORIES[owner]
    rng = generator(SEED, NAME, owner)
    seen: set[tuple[int, ...]] = set()
    for kind in cycle(range(len(stories))):
        story = stories[kind]
        while True:
            numbers = {name: int(rng.integers(low, high, endpoint=True)) for name, (low, high) in story.numbers.items()}
            steps = _worked(story, numbers)
            if min(result for _, result in steps) > 0 and (kind, *numbers.values()) not in seen:
                break
        seen.add((kind, *numbers.values()))
        words: dict[str, Any] = {"name": rng.choice(NAMES), "thing": rng.choice(things), **numbers}
        reasons = " ".join(text for text, _ in steps).format(**words)
        yield story.question.format(**words), f"{reasons}\n#### {steps[-1][1]}"


def _worked(story: Story, numbers: Mapping[str, int]) -> list[tuple[str, int]]:
    """The sentence of each step, and its result."""
    known, out = dict(numbers), []
    for left, sign, right, what in story.steps:
        one, two = known[left], known[right]
        known["x"] = OPERATIONS[sign](one, two)
        out.append((f"{one} {sign} {two} = {known['x']} {what}.", known["x"]))
    return out
