"""docs/configuration.md is what the models of the configuration say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tiny
from annotated_types import Ge, Gt
from pydantic import Field

from fedlora.reference import described, possible, reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date_and_says_something_of_every_key() -> None:
    found = reference()
    silent = [line for line in found.splitlines() if line.startswith("- ") and ": *" in line]
    assert not silent, f"no description, which belongs under Attributes of its class: {silent}"
    assert PAGE.read_text() == found, "out of date; run: python -m fedlora.reference > docs/configuration.md"


def test_help_keys_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = tiny.console(monkeypatch, capsys, tmp_path)("run", "--help-keys")
    assert status == 0 and out == PAGE.read_text() and not err


@dataclass(frozen=True)
class Example:
    """Something.

    Attributes:
        one, two: what they
            are. What one does: nothing.
        three: the last.
    """

    one: int
    two: int
    three: int


@dataclass(frozen=True)
class Brief:
    """a: this. b_c: that: 3."""

    a: int
    b_c: int


def test_what_docstrings_say() -> None:
    said = "what they are. What one does: nothing."
    assert described(Example) == {"one": said, "two": said, "three": "the last."}
    assert described(Brief) == {"a": "this.", "b_c": "that: 3."}


def test_types_in_words() -> None:
    assert possible(Annotated[int, Gt(0)] | None) == "an integer above 0"
    assert possible(str | list[Annotated[float, Ge(0)]]) == "a text, or a list, each a number of at least 0"
    assert possible(Annotated[float, Field(ge=0, lt=1)]) == "a number of at least 0 and below 1"
    assert possible(Literal["a", "b"]) == "`a` or `b`"
