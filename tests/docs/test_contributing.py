"""CONTRIBUTING.md names files and folders that are there, each of which says at its top what it does."""

import ast
import re
from pathlib import Path

import fedlora

SOURCE = Path(fedlora.__file__).parent
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
METHOD = {"tests/methods/test_<name>.py"}  # a contributor's own


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:[\w<>]+/)*[\w<>]+(?:\.py|/))`", TEXT)) - METHOD
    assert len(named) > 40
    for name in named:
        assert any((place / name).exists() for place in (SOURCE, ROOT, ROOT / "tests" / "methods")), name


def test_the_way_of_an_update_leads_through_files_that_say_what_they_do() -> None:
    (picture,) = re.findall(r"## The way of one update.*?```\n(.*?)```", TEXT, re.DOTALL)
    steps = re.findall(r"\b([a-z]+/(?:[a-z]+|\*))", picture)
    assert len(steps) > 15 and {step.split("/")[0] for step in steps} >= {"server", "gather", "transports", "clients", "runs"}
    for step in steps:
        file = SOURCE / f"{step}.py" if not step.endswith("*") else SOURCE / step.removesuffix("*") / "__init__.py"
        assert ast.get_docstring(ast.parse(file.read_text())), step
