"""Inputs that are given in Python are those that are meant: nothing is taken apart, and no name is taken for a value."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fedlora.config import SourceConfig
from fedlora.data.dataset import Schema
from fedlora.errors import BadInput
from fedlora.runs.inputs import listed

SOURCE = SourceConfig("x", text="body", label="label", image="picture")


def asked(inputs: Any, kind: str = "text", prompts: tuple[tuple[str, str], ...] = ()) -> list[Any]:
    """What a model of such inputs is asked."""
    model: Any = SimpleNamespace(
        task=SimpleNamespace(INPUT=kind), choice=SimpleNamespace(source=SOURCE), schema=Schema(prompts=prompts), domain=None
    )
    return listed(inputs, model)


def texts() -> Iterator[str]:
    yield from ("one", "two")


def test_one_alone_is_a_list_of_one() -> None:
    picture, array = Image.new("L", (2, 2)), np.zeros((2, 3), dtype=np.uint8)
    for one in ("where is my parcel", b"bytes", Path("x.png"), picture, array, np.zeros((2, 5, 3), dtype=np.uint8)):
        assert asked(one) == [one]
    assert [x.shape for x in asked(np.zeros((4, 2, 2), dtype=np.uint8))] == [(2, 2)] * 4  # a batch of grey ones


def test_a_list_is_itself_and_a_table_its_column() -> None:
    for many in (["one", "two"], ("one", "two"), texts(), np.array(["one", "two"])):
        assert asked(many) == ["one", "two"]
    assert asked([]) == []
    columns = {"body": ["one", "two"], "label": ["x", "y"]}
    rows = [{"body": "one"}, {"label": "x", "body": "two"}]
    for table in (columns, rows, pa.table(columns)):
        assert asked(table) == ["one", "two"]
    assert asked({"picture": [b"a"]}, "image") == [b"a"]
    assert asked({"question": ["why?"]}, "prompt", (("completion", "question"),)) == ["why?"]


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"body": "one text"}, "inputs: dict is no list of texts, nor a table"),
        ({"text": ["one"]}, "inputs: no column 'body', as the run's data had; it has text"),
        (5, "inputs: int is no list of texts"),
        (None, "inputs: NoneType is no list of texts"),
    ],
)
def test_what_is_no_list_is_refused(inputs: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        asked(inputs)
