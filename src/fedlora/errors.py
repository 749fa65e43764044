"""What ends a run, said in one line: bad input, which a person can mend, and a failure on the way."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class BadInput(ValueError):
    """What was wrong, where, and what is possible, in one line. The command line prints it and exits with status 2."""


class NoModel(BadInput):
    """There is no such model here."""


class RunFailed(RuntimeError):
    """Why a run cannot go on, in one line. What is complete is kept; the command line prints the line and exits with status 1."""


def unknown(kind: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a name that is not in a list: with the nearest names, or the whole list when none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"possible: {', '.join(names)}"
    return BadInput(f"unknown {kind} '{name}'; {hint}")


def in_python(text: str) -> str:
    """A message whose options of the command line are the arguments of functions; whole commands stay as they are."""
    if "fedlora run" in text or "fedlora compare" in text:
        return text
    return re.sub(r"--(out|to|client|domain|html|jobs)\b", r"\1", text.replace("--resume", "resume=True"))


def first_line(error: object) -> str:
    """The first line of what another library or machine said, for a message of ours: nothing in it moves a terminal's cursor."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return "".join(c if c.isprintable() else " " for c in line)


def brief(x: object, limit: int = 60) -> str:
    """A value in a message: no more than the beginning of a line."""
    return " ".join(repr(x).split())[:limit]


def some(names: Sequence[str], shown: int = 1) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
