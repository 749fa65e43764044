"""Bytes from other machines: real messages of every method, damaged at random. Reading them gives a tree or a ValueError, takes no
more memory than is stated, and what does not fit is refused by the server in a sentence."""

import random
import resource
from functools import cache

import pytest
import torch
from cases import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import standard

from fedlora import wire
from fedlora.check import refuse
from fedlora.clients.serve import classes
from fedlora.messages import Answer, Envelope
from fedlora.types import Reply

TREE = 1 << 22  # bytes of a header, as the server of a federation allows
TIMES = 8  # a bool takes a byte in memory and a bit on its way


@cache
def world(name: str):
    """A method, its setup, the classes of its messages, and real answers and states as bytes."""
    row = next(row for row in ROWS if row.method == name)
    method, setup, run = standard(row)
    answers = [
        wire.encode(Answer(Envelope(1, t), reply.client.id, reply)) for t in range(1, len(run.rounds)) for _, reply in run.rounds[t]
    ]
    asks = [wire.encode(ask.down) for t in range(1, len(run.rounds)) for ask, _ in run.rounds[t]]
    return method, setup, classes(method), answers[:4] + asks[:2]


NAMES = sorted({row.method for row in ROWS})


def damaged(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """The bytes after a few mishaps: bits that flip, numbers that grow, pieces that are lost, doubled or another message's."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(found) + 1)
        match draw.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(found):
                found[at] = draw.choice((0, 255, 0x7F, 0x80, 48, 57))
            case 2:
                del found[at : at + draw.choice((1, 8, 64))]
            case 3:
                found[at:at] = found[at : at + draw.choice((1, 8, 64))]
            case 4:
                other = draw.choice(others)
                start = draw.randrange(len(other))
                found[at : at + 16] = other[start : start + 16]
            case 5:
                found[:8] = draw.choice((len(found), 2**31, 2**63 - 1, draw.randrange(4096))).to_bytes(8, "little")
        if not found:
            return b""
    return bytes(found)


def read(name: str, data: bytes) -> None:
    """As the server reads an answer: decoded, then checked. Nothing but a ValueError comes out."""
    method, setup, known, _ = world(name)
    try:
        answer = wire.decode(data, known, TREE)
    except ValueError:
        return
    held = sum(t.nbytes for t in wire.tensors_of(answer)) if not isinstance(answer, torch.Tensor) else answer.nbytes
    assert held <= TIMES * len(data)
    if isinstance(answer, Answer) and isinstance(answer.body, Reply):
        why = refuse(answer.body.up, method, setup, setup.clients[0])
        assert why is None or (isinstance(why, str) and "\n" not in why)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), st.integers(0, 5), st.integers(0, 2**32))
def test_a_damaged_message_is_read_or_refused(name: str, which: int, seed: int) -> None:
    messages = world(name)[3]
    read(name, damaged(messages[which % len(messages)], messages, random.Random(seed)))


def test_the_messages_are_read_as_they_are() -> None:
    for name in NAMES:
        method, setup, known, messages = world(name)
        for data in messages:
            tree = wire.decode(data, known, TREE)
            if isinstance(tree, Answer):
                assert isinstance(tree.body, Reply)
                own = setup.clients[tree.client]
                assert refuse(tree.body.up, method, setup, own) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_million_damaged_messages(name: str) -> None:
    """A million over all methods, and little memory for them: at most 200 MB more than before."""
    messages = world(name)[3]
    draw = random.Random(name)
    read(name, messages[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(-(-1_000_000 // len(NAMES))):
        read(name, damaged(messages[i % len(messages)], messages, draw))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
