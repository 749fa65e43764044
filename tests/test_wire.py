import gc
import json
import math
import random
import weakref
import zlib
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from toy import same

from fedlora import wire
from fedlora.algebra.tensors import Flat, flat
from fedlora.methods import make
from fedlora.types import BaseUpdate, Client, Factors, Model


class Colour(Enum):
    RED = "red"
    BLUE = 2


class Mode(StrEnum):
    FAST = "fast"


@dataclass(frozen=True)
class Leaf:
    x: Any = None
    y: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Strict:
    n: int

    def __post_init__(self) -> None:
        if self.n.bit_length() > 8:  # an AttributeError for anything but an int
            raise ValueError("n is too large")


CLASSES = [Colour, Mode, Leaf, Strict]


def again(x: Any) -> Any:
    return wire.decode(wire.encode(x), CLASSES)


# ---- what goes in comes out -------------------------------------------------------------------------------------------------


BITS = {
    torch.float64: [0.1, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308],
    torch.float32: [0.1, -0.0, math.inf, -math.inf, 1e-45, 3.4e38],
    torch.bfloat16: [0.1, -0.0, math.inf, 1e-40, 3e38],
    torch.float16: [0.1, -0.0, math.inf, 6e-8],
    torch.int64: [0, -1, 2**63 - 1, -(2**63)],
    torch.int32: [0, -1, 2**31 - 1, 7],
    torch.uint8: [0, 255, 1, 128],
    torch.int8: [-128, 127, 0, -1],
    torch.bool: [True, False, True, True, False, False, True, False, True],
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_tensors_of_every_dtype_keep_every_bit(dtype):
    x = torch.tensor(BITS[dtype], dtype=dtype)
    for t in (x, x[0], x[:0], x[:0].reshape(0, 3), x[:4].reshape(2, 2).T, x.expand(3, -1), x[::2]):
        assert same(again(t), t)


def test_a_nan_stays_a_nan():
    assert math.isnan(again(math.nan)) and torch.isnan(again(torch.tensor([math.nan]))).all()


@pytest.mark.parametrize(
    "x",
    [
        None, True, False, 0, -1, 2**80, 1.5, -0.0, 0.1, math.inf, 5e-324, "", "a\x00b\n'\"", "é\ud800",
        [], (), {}, [1, [2, (3,)]], (None, ()), {1: "int", "1": "str", (1, 2): "tuple", None: 0},
        Colour.RED, Colour.BLUE, Mode.FAST, {Mode.FAST: Colour.RED}, Leaf(), Leaf(Leaf(1, {2: 3})),
        Client(3, 4, 5, ("a", "b")), Factors({"m": torch.ones(2, 3)}, {"m": torch.zeros(4, 2)}, 0.1),
        flat({"a b": torch.ones(2, 3), "": torch.arange(4.0), "none": torch.ones(0, 5), "one": torch.ones(())}), flat({}),
        Model({"s": Factors()}, BaseUpdate(1, 2, (Factors(),), {"m": torch.ones(1)}), {"p": torch.ones(())}),
    ],
    ids=repr,
)  # fmt: skip
def test_every_kind_of_value_comes_back_with_its_type(x):
    assert same(again(x), x)


def test_a_tensor_that_occurs_twice_is_stored_once_and_shared_again():
    t = torch.randn(1000)
    one, two = Leaf(t), Leaf(t, {"again": t})
    assert wire.measure(two).values == wire.measure(one).values == 4000
    back = again(two)
    assert back.x is back.y["again"]
    assert wire.measure(two).numbers == 1000
    assert wire.measure((t, t.clone())).values == 8000


def test_trees_that_differ_in_plain_values_only_are_not_taken_for_each_other():
    """1, True and 1.0 are equal and have one hash; headers are remembered."""
    for x in (1, True, 1.0, "1", None, 0, False, -0.0, 0.0, Mode.FAST, "fast"):
        assert same(again([x, {x: x}]), [x, {x: x}])
        assert wire.measure([x, {x: x}]).total == len(wire.encode([x, {x: x}]))


def test_flat_tensors_weigh_what_they_hold_and_less_of_a_header():
    tensors = {f"layer.{i}.weight": torch.randn(3, i) for i in range(1, 40)}
    one, whole = wire.measure(tensors), wire.measure(flat(tensors))
    assert (whole.values, whole.numbers) == (one.values, one.numbers) and whole.header < one.header
    assert whole.total == len(wire.encode(flat(tensors)))
    back = again(flat(tensors))
    assert isinstance(back, Flat) and same(dict(back), tensors)


def test_masks_take_a_bit_an_entry():
    mask = {"a": torch.rand(3, 11) > 0.5, "b": torch.rand(7) > 0.5}
    size = wire.measure(mask)
    assert (size.values, size.indices) == (0, 5 + 1)
    assert same(again(mask), mask)


def test_a_message_that_was_measured_is_let_go():
    """At once, not when the garbage collector comes by: one may hold a whole model."""
    gc.disable()
    try:
        t = torch.ones(3)
        gone = weakref.ref(t)
        wire.measure({"a": [t, flat({"b": t})]})
        wire.encode(Leaf(t))
        del t
        assert gone() is None
    finally:
        gc.enable()


def test_values_indices_and_header_are_told_apart():
    tree = {
        "f": torch.ones(10),
        "d": torch.ones(3, dtype=torch.float64),
        "i": torch.ones(7, dtype=torch.int32),
        "m": torch.ones(9).bool(),
    }
    size = wire.measure(tree)
    assert (size.values, size.indices) == (10 * 4 + 3 * 8, 7 * 4 + 2)
    assert size.total == size.values + size.indices + size.header == len(wire.encode(tree))
    assert wire.measure(tree).numbers == 13
    assert wire.Size(1, 2, 3) + wire.Size(10, 20, 30) == wire.Size(11, 22, 33)


def test_gradients_do_not_travel():
    t = torch.ones(3, requires_grad=True)
    assert not again(t * 2).requires_grad


@pytest.mark.parametrize(
    "x",
    [{1, 2}, b"bytes", np.float32(1), object(), lambda: 0, torch.ones(2, dtype=torch.complex64)],
    ids=lambda x: type(x).__name__,
)
def test_what_cannot_travel_is_refused_by_name(x):
    with pytest.raises(TypeError, match="cannot travel"):
        wire.encode({"a": [x]})


def trees() -> st.SearchStrategy[Any]:
    def tensor(seed: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(np.random.default_rng(seed).integers(0, 100, shape)).to(dtype)

    plain = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=5)
        | st.sampled_from([*Colour, *Mode])
    )
    leaves = plain | st.builds(tensor, st.integers(0, 99), st.lists(st.integers(0, 9), max_size=3), st.sampled_from(list(BITS)))
    keys = st.integers() | st.text(max_size=5) | st.tuples(st.text(max_size=2), st.integers())
    return st.recursive(
        leaves,
        lambda x: (
            st.lists(x, max_size=4)
            | st.lists(x, max_size=4).map(tuple)
            | st.dictionaries(keys, x, max_size=4)
            | st.builds(Leaf, x, x)
        ),
        max_leaves=20,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees())
def test_random_trees_come_back_and_are_measured_exactly(tree):
    data = wire.encode(tree)
    assert same(wire.decode(data, CLASSES), tree)
    assert wire.measure(tree).total == len(data)
    assert wire.encode(tree) == data


@pytest.mark.parametrize("n", [1, 10, 100, 10**3, 10**4, 10**5, 10**6])
def test_measure_is_exact_at_every_length_of_the_offsets(n):
    tree = {
        "a": torch.zeros(n),
        "b": torch.zeros(n).bool(),
        "c": torch.zeros(2 * n, dtype=torch.int8),
        "d": torch.zeros(n).double(),
    }
    assert wire.measure(tree).total == len(wire.encode(tree))


# ---- hostile bytes ----------------------------------------------------------------------------------------------------------


SAMPLE = Leaf(
    {
        "q": torch.arange(12.0).reshape(4, 3),
        "up": torch.arange(10.0).double(),
        "v": flat({"a": torch.ones(2, 2), "b": torch.ones(1)}),
    },
    {"mask": torch.tensor([True, False, True]), 3: [Colour.RED, 1.5, (None, Client(1, 2, 3))], "n": Strict(7)},
)


def forge(tree: Any, tensors: Any = (), **buffers: torch.Tensor) -> bytes:
    """A message with this header, whatever it says."""
    text = tree if isinstance(tree, bytes) else zlib.compress(json.dumps({"tree": tree, "tensors": tensors}).encode())
    return save({"tree": torch.frombuffer(bytearray(text), dtype=torch.uint8), **buffers})


def refused(data: bytes, match: str | None = None) -> None:
    with pytest.raises(ValueError, match=match):
        wire.decode(data, CLASSES)


def test_the_forge_makes_good_messages_too():
    assert wire.decode(forge({"l": [1, {"t": 0}]}, [["float32", 2]], float32=torch.tensor([1.0, 2.0])), [])[1].tolist() == [
        1.0,
        2.0,
    ]


def test_every_truncation_is_refused():
    data = wire.encode(SAMPLE)
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0")


def test_flipped_bytes_give_a_tree_or_a_ValueError_and_nothing_else():
    data, rng, damaged = wire.encode(SAMPLE), random.Random(0), 0
    for _ in range(1000):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            wire.decode(bytes(bad), CLASSES)
        except ValueError:
            damaged += 1
    assert damaged > 300


JUNK = [
    None, True, -1, 0, 10**30, "x", "float32", [], [[]], {}, {"a": 1, "b": 2},
    {"t": 0}, {"t": 99}, {"t": -1}, {"t": "0"}, {"f": "0x1p99999"}, {"f": 1}, {"f": "x"},
    {"l": 3}, {"l": {}}, {"u": [None, None]}, {"m": [[1]]}, {"m": [[{"l": []}, 1]]}, {"m": 3},
    {"d": []}, {"d": ["Leaf"]}, {"d": ["Leaf", 1, 2, 3]}, {"d": [["Leaf"], 1, 2]}, {"d": ["Strict", None]}, {"d": ["Strict", 999]},
    {"v": 3}, {"v": []}, {"v": [0]}, {"v": [0, ["a", 4], ["a", 1]]}, {"v": [0, [1, 5]]}, {"v": [-1, ["a", 5]]},
    {"e": ["Colour", "green"]}, {"e": ["Colour"]}, {"e": ["Leaf", 1]}, {"d": ["Colour", 1]},
]  # fmt: skip


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def put(node: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = put(node[path[0]], path[1:], new)
    return copy


def test_a_header_with_junk_anywhere_gives_a_tree_or_a_ValueError_and_nothing_else():
    buffers = load(wire.encode(SAMPLE))
    header = json.loads(zlib.decompress(buffers.pop("tree").numpy().tobytes()))
    damaged = 0
    for path in places(header):
        for junk in JUNK:
            text = zlib.compress(json.dumps(put(header, path, junk)).encode())
            try:
                wire.decode(forge(text, **buffers), CLASSES)
            except ValueError:
                damaged += 1
    assert damaged > 1000


@pytest.mark.parametrize(
    "data, match",
    [
        (b"", None),
        (b"\xff" * 64, None),
        (save({"other": torch.ones(1)}), "not a fedlora message"),
        (save({"tree": torch.ones(3)}), "not a fedlora message"),
        (forge(b"no zlib at all"), None),
        (forge(zlib.compress(b"no json")), None),
        (forge(zlib.compress(b'{"tree": 1, "tensors": []}')[:-3]), "cut off"),
        (forge(1, complex128=torch.ones(1)), "not a fedlora message"),
        (forge({"d": ["Popen", "ls"]}), "'Popen' is not allowed"),
        (forge({"d": ["Client", 1, 2]}), "Client has 4 fields, the message gives 2"),
        (forge({"d": ["Client", 1, 2, 3, 4, 5]}), "Client has 4 fields, the message gives 5"),
        (forge({"z": 1}), "unknown node 'z'"),
        (forge([1, 2]), "bare list"),
        (forge({"t": 0}, [["float32", 10**12]], float32=torch.ones(4)), "larger than its buffer"),
        (forge({"t": 0}, [["bool", 10**15]], bool=torch.ones(4).byte()), "larger than its buffer"),
        (forge({"t": 0}, [["float32", *[2**62] * 4]], float32=torch.ones(4)), "larger than its buffer"),
        (forge({"t": 0}, [["float32", 0, 2**70]], float32=torch.ones(0)), None),
        (forge({"t": 0}, [["float32", *[10**300] * 1000]], float32=torch.ones(4)), "impossible"),
        (forge({"t": 0}, [["float32", *[2] * 1000, 0]], float32=torch.ones(0)), "impossible"),
        (forge({"t": 0}, [["float32", -4]], float32=torch.ones(4)), "impossible"),
        (forge({"t": 0}, [["float32", 2.0]], float32=torch.ones(4)), "impossible"),
        (forge({"t": 0}, [["float64", 4]], float32=torch.ones(4)), "impossible"),
        (forge({"t": 0}, [["float32", 4]], float32=torch.ones(4).double()), "not a fedlora message"),
        (forge({"t": 0}, [["float32", 2, 2]], float32=torch.ones(2, 2)), "not a fedlora message"),
        (forge({"t": 0}, [["float32", 3]], float32=torch.ones(4)), "belong to no tensor"),
        (forge({"v": [0, ["a", 2]]}, [["float32", 4]], float32=torch.ones(4)), "parts it says"),
        (forge({"v": [0, ["a", 2], ["a", 4]]}, [["float32", 4]], float32=torch.ones(4)), "parts it says"),
        (forge({"v": [0, ["a", 2]]}, [["float32", 2, 2]], float32=torch.ones(4)), "parts it says"),
        (forge({"v": [0, ["a", -2, -2]]}, [["float32", 4]], float32=torch.ones(4)), "parts it says"),
        (forge({"v": [0, [7, 4]]}, [["float32", 4]], float32=torch.ones(4)), "parts it says"),
        (forge({"v": [0, ["a", 4], ["b", 2**62, 4, 0]]}, [["float32", 4]], float32=torch.ones(4)), "parts it says"),
        (forge({"v": [1, ["a", 4]]}, [["float32", 4]], float32=torch.ones(4)), None),
        (forge(1, [], float32=torch.ones(4)), "belong to no tensor"),
        (forge(zlib.compress(b"[" * 10**6)), None),
        (forge(zlib.compress(b'{"tree": ' + b'{"l":[' * 900 + b"]}" * 900 + b', "tensors": []}')), None),
    ],
)
def test_hostile_messages_are_refused(data, match):
    refused(data, match)


def test_a_decompression_bomb_is_refused_before_it_unfolds():
    bomb = zlib.compress(b" " * (wire.LARGEST_TREE + 1) + b"1", 9)
    assert len(bomb) < 100_000
    refused(forge(bomb), "too large")


def test_classes_are_those_of_the_types_and_of_the_methods_file_alone():
    allowed = {c.__name__ for c in wire.message_classes(make("lora-a2", {}))}
    assert allowed == {"Criterion", "State", "Down", "Up", "LoRAA2"}
    leaf = wire.encode(Leaf())
    with pytest.raises(ValueError, match="'Leaf' is not allowed"):
        wire.decode(leaf, [])
