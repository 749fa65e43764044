"""`refuse` on declarations of every kind, and on whatever a hostile client may put anywhere."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest
import torch
from cases import ROWS
from toy import SHAPES, federate, make_clients, make_setup

from fedlora.algebra.tensors import flat
from fedlora.check import refuse
from fedlora.types import Factors, Facts, Tensors, change, index, value

SETUP = make_setup(make_clients((3, 2)))
CLIENT = SETUP.clients[0]  # of rank 3


@dataclass(frozen=True)
class Up:
    core: Tensors = value("rank", "rank")
    rows: Tensors = change("some", "in")
    stack: Tensors = change("experts", "out", "free")
    other: Tensors = change("free", "out")
    which: Tensors = index("some", "all")
    full: Tensors = value("*")
    note: Any = None


@dataclass(frozen=True)
class Declares:
    FACTS: ClassVar = Facts(
        "Declares",
        "",
        2024,
        True,
        True,
        False,
        "",
        "",
        "",
        lambda method, setup, client: {"some": range(1, 5), "all": 6, "experts": 2},
    )


def good() -> Up:
    which = torch.tensor([True, False, True, False, False, True])
    return Up(
        core={m: torch.ones(3, 3) for m in SHAPES},
        rows={m: torch.ones(3, i).double() for m, (_, i) in SHAPES.items()},
        stack={m: torch.ones(2, o, i).bfloat16() for m, (o, i) in SHAPES.items()},  # "free" is d_in in one module, d_in in the next
        other={m: torch.ones(i, o) for m, (o, i) in SHAPES.items()},
        which=dict.fromkeys(SHAPES, which),
        full={name: torch.ones(shape) for name, shape in SETUP.params.items()},
        note=(1, "two", None),
    )


def entry(field: str, t: Any, module: str = "q") -> Up:
    return replace(good(), **{field: {**getattr(good(), field), module: t}})


def test_what_fits_the_declarations_passes_and_so_does_a_part_of_it():
    assert refuse(good(), Declares(), SETUP, CLIENT) is None
    assert refuse(Up(core=good().core), Declares(), SETUP, CLIENT) is None
    assert refuse(Up(full=good().full), Declares(), SETUP, CLIENT) is None


MASK = torch.zeros(6).bool()


@pytest.mark.parametrize(
    "up, said",
    [
        (entry("core", torch.ones(2, 2)), "field 'core', 'q': 'rank' is 2, expected 3"),
        (entry("core", torch.ones(3, 2)), "field 'core', 'q': 'rank' is 2, expected 3"),
        (entry("rows", torch.ones(3, 9)), "field 'rows', 'q': 'in' is 9, expected 8"),
        (entry("rows", torch.ones(0, 8)), "field 'rows', 'q': 'some' is 0, expected 1 to 4"),
        (entry("rows", torch.ones(5, 8)), "field 'rows', 'q': 'some' is 5, expected 1 to 4"),
        (entry("rows", torch.ones(4, 8)), "field 'which', 'q': 'some' is 3, but 4 in another field"),
        (entry("stack", torch.ones(3, 12, 8)), "field 'stack', 'q': 'experts' is 3, expected 2"),
        (entry("other", torch.ones(7, 12)), "field 'other', 'q': 'free' is 7, expected 8"),
        (entry("which", torch.ones(6)), "field 'which', 'q': it is torch.float32 with 1 axes, expected torch.bool with 1"),
        (entry("which", torch.ones(6, 1).bool()), "field 'which', 'q': it is torch.bool with 2 axes, expected torch.bool with 1"),
        (entry("which", torch.ones(7).bool()), "field 'which', 'q': 'some' is 7, expected 1 to 4"),
        (entry("which", torch.ones(3).bool()), "field 'which', 'q': 'all' is 3, expected 6"),
        (entry("full", torch.ones(8, 12), "q.weight"), "field 'full', 'q.weight': its shape is (8, 12), expected (12, 8)"),
        (entry("full", torch.ones(12, 1), "q.bias"), "field 'full', 'q.bias': it has 2 axes, expected 1"),
        (entry("full", torch.ones(12), "q"), "field 'full' has an unexpected entry 'q'"),
        (replace(good(), full={"q.weight": torch.ones(12, 8)}), "field 'full' lacks 'q.bias'"),
        (replace(good(), rows={"q": torch.ones(3, 8)}), "field 'rows' lacks 'up'"),
        (entry("rows", torch.ones(3, 8).half()), "field 'rows', 'q': it is torch.float16, expected a floating-point number"),
        (replace(good(), note=torch.ones(1)), "field 'note' holds more than plain finite values"),
        (replace(good(), note=Factors({"q": torch.ones(1)})), "field 'note' holds more than plain finite values"),
        (replace(good(), note=float("nan")), "field 'note' holds more than plain finite values"),
        (replace(good(), note=("a", [torch.ones(1)])), "field 'note' holds more than plain finite values"),
        (Up(which=dict.fromkeys(SHAPES, MASK.clone().index_fill(0, torch.tensor([0]), True))), "it is empty"),
        (Up(), "it is empty"),
        (None, "it is a NoneType, which is no message of Declares"),
        (Up, "it is a type, which is no message of Declares"),
        (Factors(), "it is a Factors, which is no message of Declares"),
        (Declares(), "it is a Declares, which is not what Declares uploads"),
    ],
)  # fmt: skip
def test_the_reason_says_where_and_what_was_expected(up, said):
    assert refuse(up, Declares(), SETUP, CLIENT) == said


def test_a_flat_field_is_looked_at_like_its_tensors():
    def flattened(up: Up) -> Up:
        return replace(up, **{f.name: flat(part) for f in fields(up) if isinstance(part := getattr(up, f.name), dict)})

    assert refuse(flattened(good()), Declares(), SETUP, CLIENT) is None
    for field, t in (("core", torch.ones(3, 2)), ("core", torch.full((3, 3), torch.nan)), ("stack", torch.ones(3, 12, 8)),
                     ("full", torch.full((12,), -torch.inf)), ("which", torch.ones(7).bool())):  # fmt: skip
        module = "q.bias" if field == "full" else "q"
        bad = entry(field, t, module)
        why = refuse(bad, Declares(), SETUP, CLIENT)
        assert why is not None and f"'{field}', '{module}'" in why
        assert refuse(flattened(bad), Declares(), SETUP, CLIENT) == why
    core = good().core
    turned = replace(good(), core=flat(dict(reversed(core.items()))))  # the order of modules says nothing
    assert refuse(turned, Declares(), SETUP, CLIENT) is None
    halves = replace(good(), core=flat({m: x.half() for m, x in core.items()}))
    assert "torch.float16" in str(refuse(halves, Declares(), SETUP, CLIENT))


class Unprintable:
    def __repr__(self) -> str:
        return "line\nline" * 1000


JUNK = [
    None, True, 3, float("nan"), "text", b"b", [], [1.0], (), {}, {"q": 1}, {1: 2}, {"a\nb": torch.ones(1)},
    {None: None},
    object(), Unprintable(), {Unprintable(): 1}, Factors(), Up,
    torch.ones(()), torch.ones(0), torch.ones(1), torch.ones(1, 1, 1, 1),
    torch.ones(3, 8, dtype=torch.complex64), torch.ones(12, 2).to_sparse(), torch.empty(2, 8, device="meta"),
    torch.full((12, 2), torch.inf), torch.ones(4, dtype=torch.int64), torch.ones(5).bool(), torch.ones(1).expand(10**6),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_junk_anywhere_is_refused_in_one_line(row):
    method, setup = row.make(), make_setup(make_clients(row.ranks))
    order, reply = federate(method, setup, 1).rounds[1][0]
    up, client = reply.up, order.client
    for f in (f for f in fields(up) if getattr(up, f.name)):
        part = getattr(up, f.name)
        for junk in JUNK:
            for bad in ({**part, next(iter(part)): junk}, {**part, "line\nline": junk}, junk):
                why = refuse(replace(up, **{f.name: bad}), method, setup, client)
                emptied = isinstance(bad, dict) and not bad and any(getattr(up, g.name) for g in fields(up) if g.name != f.name)
                fits = bad is not junk and isinstance(junk, torch.Tensor) and junk.shape == next(iter(part.values())).shape == (0,)
                assert emptied or fits or (isinstance(why, str) and "\n" not in why and len(why) < 300)
    for junk in JUNK:
        assert isinstance(refuse(junk, method, setup, client), str)
