"""The round loop with replies that nobody would wish for: every row of `cases.py`, aggregated by our own loop.

A client is hostile, or computes in another dtype, or has diverged; the others are as they should be. Nothing that it sends may end
the run, make a number infinite, or go unnoticed.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from cases import ROWS, Row
from served import answers, rounds
from toy import Trainer, dense, deployed, distance, federate, make_clients, make_setup, play, same, tensors

from fedlora import methods, wire
from fedlora.errors import RunFailed
from fedlora.messages import TrainAsk
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedit import Up as FedITUp
from fedlora.server import spool
from fedlora.server.aggregate import OVERFLOW
from fedlora.server.loop import Server
from fedlora.types import SHARED, Client, Factors, Reply, Setup, Train, Unfit

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
CULPRIT = 1


@dataclass
class Answers:
    """A transport that answers with made replies, an attempt after the other."""

    attempts: Sequence[Sequence[Reply]]
    asks: list[Sequence[TrainAsk]] = field(default_factory=list)

    def exchange(self, asks):
        self.asks.append(asks)
        return answers(asks, self.attempts[min(self.asked, len(self.attempts)) - 1])

    @property
    def asked(self) -> int:
        return len(self.asks)


@cache
def ready(row: Row) -> tuple[Any, Setup, Any, tuple[Reply, ...]]:
    """A method in float32, its setup, its state before the round that laws are tested in, and the replies of that round."""
    method = row.make()
    setup = make_setup(make_clients(row.ranks, tasks=row.tasks), dtype=torch.float32, rounds=row.at)
    run = federate(method, setup, row.at, trainer=Trainer(setup, lr=row.lr))
    assert not any(run.refused)
    return method, setup, run.states[row.at - 1], tuple(reply for _, reply in run.rounds[row.at])


def answered(row: Row, replies: Sequence[Reply]):
    """The server after a round with these replies, and what was counted."""
    method, setup, state, _ = ready(row)
    played = list(rounds(method, setup, Server(row.at - 1, state), Answers([replies]), lambda t: setup.clients))
    assert len(played) == 1
    return played[0][0].state, played[0][1]


def changed(up: Any, f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """An Up with f done to each of its tensors of numbers."""
    new = {}
    for x in fields(up):
        part = getattr(up, x.name)
        if x.metadata.get("kind") in ("value", "change", "statistic"):
            new[x.name] = {m: f(t) if t.is_floating_point() else t for m, t in part.items()}
    return replace(up, **new)


def with_culprit(replies: Sequence[Reply], f: Callable[[Any], Any]) -> list[Reply]:
    return [replace(r, up=f(r.up)) if r.client.id == CULPRIT else r for r in replies]


def function(row: Row, state: Any, client: Client | None = None) -> dict:
    """What is deployed, where the server's part of it alone means something; else the state's own numbers."""
    method, setup, _, _ = ready(row)
    if row.by_role:
        return {str(i): t.double().numpy() for i, t in enumerate(tensors(state))}
    held = None if client is None else method.hold(setup, client)
    return dense(deployed(method, state, client, held, row.at + 1), setup)


@every_row
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.bfloat16, 0.05)], ids=str)
def test_a_reply_in_another_dtype_counts_and_the_state_keeps_its_own(row, dtype, tolerance):
    _, _, _, replies = ready(row)
    state, tally = answered(row, with_culprit(replies, lambda up: changed(up, lambda t: t.to(dtype))))
    assert not tally.failed
    assert {t.dtype for t in tensors(state) if t.is_floating_point()} == {torch.float32}
    if dtype == torch.float64:
        assert same(state, answered(row, replies)[0])
    elif not row.grouped:
        assert distance(function(row, state), function(row, answered(row, replies)[0])) < tolerance


@every_row
@pytest.mark.parametrize("size", [1e18, 1e30, 3e38])
def test_numbers_too_large_are_refused_by_name_or_stay_finite(row, size):
    method, setup, _, replies = ready(row)
    state, tally = answered(row, with_culprit(replies, lambda up: changed(up, lambda t: t.sign() * size)))
    assert set(tally.failed) <= {CULPRIT}
    assert sorted([*tally.accepted, *tally.failed]) == [c.id for c in setup.clients]
    assert all(t.isfinite().all() for t in tensors(state))
    if tally.failed:
        assert tally.failed[CULPRIT] == OVERFLOW or "finite" in tally.failed[CULPRIT]
        assert same(state, answered(row, [r for r in replies if r.client.id != CULPRIT])[0])
    assert all(
        t.isfinite().all() for c in setup.clients if c.id != CULPRIT for t in tensors(method.send(state, c, row.at)) if row.grouped
    )


@every_row
def test_what_is_no_number_is_refused_whatever_its_dtype(row):
    _, _, _, replies = ready(row)
    expected = answered(row, [r for r in replies if r.client.id != CULPRIT])[0]
    for bad in (lambda t: t * torch.nan, lambda t: t.double().sign() * 1e300 + 1e300):  # the second is a number in float64 only
        state, tally = answered(row, with_culprit(replies, lambda up, bad=bad: changed(up, bad)))
        assert list(tally.refused) == [CULPRIT] and "finite" in tally.refused[CULPRIT]
        assert same(state, expected)


@every_row
def test_a_reply_that_comes_twice_or_unasked_counts_once_or_not_at_all(row):
    _, setup, _, replies = ready(row)
    stranger = replace(replies[0], client=replace(replies[0].client, id=99))
    again = with_culprit(replies, lambda up: changed(up, lambda t: 2 * t))[CULPRIT]
    state, tally = answered(row, [stranger, *replies, again, stranger])
    assert tally.accepted == [c.id for c in setup.clients] and not tally.failed
    assert same(state, answered(row, list(reversed(replies)))[0])  # and in whatever order they come


def beyond(method: Any, setup: Setup, state: Any, reply: Reply) -> dict[str, Any]:
    """Fields that a reply does not send in answer to this state, filled with tensors of the right shape."""
    up, client = reply.up, reply.client
    kinds = {f.name: f.metadata for f in fields(up) if "kind" in f.metadata}
    sizes = {"rank": client.rank, **method.FACTS.dims(method, setup, client)}

    def size(axis: str, m: str) -> int:
        n = {**sizes, "out": setup.shapes[m][0], "in": setup.shapes[m][1]}.get(axis, 1)
        n = n[m] if isinstance(n, dict) else n
        return n if isinstance(n, int) else max(n, default=0)

    empty = [name for name, meta in kinds.items() if not getattr(up, name) and meta["kind"] in ("value", "change")]
    return {name: {m: torch.ones([size(axis, m) for axis in kinds[name]["dims"]]) for m in setup.shapes} for name in empty}


@every_row
def test_fields_that_a_round_does_not_send_are_refused(row):
    method, setup, state, replies = ready(row)
    for name, part in beyond(method, setup, state, replies[CULPRIT]).items():
        _, tally = answered(row, with_culprit(replies, lambda up, n=name, p=part: replace(up, **{n: p})))
        assert list(tally.refused) == [CULPRIT], name


def test_the_rows_that_send_fewer_fields_than_they_have_are_those_of_their_papers():
    """So that the test above tests something."""
    found = {row.method for row in ROWS if beyond(*ready(row)[:3], ready(row)[3][CULPRIT])}
    assert found >= {"rolora", "lora-a2", "fed-sb", "slora", "fedsa-lora"}


@pytest.mark.parametrize("name", ["lora-a2", "flasc"])
def test_more_entries_than_the_budget_are_refused(name):
    """LoRA-A2: r_k N ranks over all modules; FLASC: its density of all entries. Module by module every number may be chosen."""
    row = next(r for r in ROWS if r.method == name and dict(r.settings).get("density_up", 0.25) < 1 and min(r.ranks) < 4)
    _, _, _, replies = ready(row)

    def everything(up):
        full = {
            f.name: {m: torch.ones_like(t) for m, t in getattr(up, f.name).items()}
            for f in fields(up)
            if f.metadata["kind"] == "index"
        }
        axes = {f.metadata["dims"][0]: f.name for f in fields(up) if f.metadata["kind"] == "index"}
        whole = {}
        for f in fields(up):
            if f.metadata["kind"] == "change" and getattr(up, f.name):
                lengths = {axis: {m: len(t) for m, t in full[at].items()} for axis, at in axes.items()}
                whole[f.name] = {
                    m: torch.zeros([lengths[a][m] if a in lengths else n for a, n in zip(f.metadata["dims"], t.shape, strict=True)])
                    for m, t in getattr(up, f.name).items()
                }
        return replace(up, **full, **whole)

    state, tally = answered(row, with_culprit(replies, everything))
    assert list(tally.refused) == [CULPRIT] and "budget" in tally.refused[CULPRIT]
    assert same(state, answered(row, [r for r in replies if r.client.id != CULPRIT])[0])


@every_row
def test_replies_that_wait_in_a_file_give_the_same_bits(row, monkeypatch):
    _, _, _, replies = ready(row)
    expected = answered(row, replies)[0]
    monkeypatch.setattr(spool, "IN_MEMORY", 2000)  # room for one or two of the four
    assert same(answered(row, replies)[0], expected)


# ---- who made a state infinite ----------------------------------------------------------------------------------------------


def flexlora():
    return ready(next(row for row in ROWS if row.method == "flexlora"))


def scaled(reply: Reply, by: float) -> Reply:
    return replace(reply, up=changed(reply.up, lambda t: t.sign() * by))


def test_of_several_all_who_did_it_are_refused_and_nobody_else():
    """FlexLoRA multiplies B and A: 1e30 each overflows float32, 1e12 does not; a large reply is not refused for its size."""
    method, setup, state, replies = flexlora()
    bad = [scaled(replies[0], 1e30), replies[1], scaled(replies[2], 1e30), scaled(replies[3], 1e12)]
    ((server, tally, _),) = rounds(method, setup, Server(2, state), Answers([bad]), lambda t: setup.clients)
    assert tally.refused == {0: OVERFLOW, 2: OVERFLOW} and tally.accepted == [1, 3]
    ((expected, _, _),) = rounds(method, setup, Server(2, state), Answers([[bad[1], bad[3]]]), lambda t: setup.clients)
    assert same(server.state, expected.state)


@dataclass(frozen=True)
class Choosy(FedIT):
    """Fails over client 2 alone, whose reply is the smallest."""

    def aggregate(self, state, replies, round):
        came = list(replies)
        if any(r.client.id == 2 for r in came):
            raise ArithmeticError("no")
        return super().aggregate(state, iter(came), round)


def fedit_replies(setup: Setup, method: Any) -> list[Reply]:
    return [reply for _, reply in federate(method, setup, 1).rounds[1]]


def test_an_innocent_whose_reply_is_larger_is_put_back():
    setup = make_setup(make_clients((2,) * 4), rounds=1)
    replies = fedit_replies(setup, FedIT())
    small = [replace(r, up=changed(r.up, lambda t: t * 1e-3)) if r.client.id == 2 else r for r in replies]
    ((_, tally, _),) = rounds(Choosy(), setup, Server(0, Choosy().init(setup)), Answers([small]), lambda t: setup.clients)
    assert tally.refused == {2: OVERFLOW} and tally.accepted == [0, 1, 3]


@dataclass(frozen=True)
class Broken(FedIT):
    def aggregate(self, state, replies, round):
        raise KeyError("a bug")


def test_a_method_that_fails_whoever_takes_part_says_how():
    setup = make_setup(make_clients((2,) * 4), rounds=1)
    transport = Answers([fedit_replies(setup, FedIT())])
    with pytest.raises(KeyError, match="a bug"):
        list(rounds(Broken(), setup, Server(0, FedIT().init(setup)), transport, lambda t: setup.clients))


# ---- how a round ends -------------------------------------------------------------------------------------------------------


def started(attempts: Sequence[Sequence[Reply]], method: Any = None, retries: int = 1):
    method = method or FedIT()
    setup = make_setup(make_clients((2,) * 4), rounds=1)
    transport = Answers(attempts)
    return rounds(method, setup, Server(0, method.init(setup)), transport, lambda t: setup.clients, retries=retries), transport


def good() -> list[Reply]:
    return fedit_replies(make_setup(make_clients((2,) * 4)), FedIT())


def test_when_all_are_refused_the_run_stops_and_names_the_first_reason():
    bad = [replace(r, up=changed(r.up, lambda t: t * torch.nan)) for r in good()]
    played, transport = started([bad])
    with pytest.raises(RunFailed, match=r"^round 1: none of 4 replies counts: client 0: .*finite") as caught:
        next(played)
    assert "\n" not in str(caught.value) and transport.asked == 1


def test_when_all_are_lost_the_round_is_asked_for_again():
    played, transport = started([[], good()])
    (_, tally, _) = next(played)
    assert transport.asked == 2 and tally.accepted == [0, 1, 2, 3]
    played, transport = started([[]], retries=3)
    with pytest.raises(RunFailed, match=r"^round 1: none of 4 replies counts: client 0: no reply$"):
        next(played)
    assert transport.asked == 4


def test_who_is_lost_and_who_is_refused_are_told_apart():
    replies = good()
    bad = replace(replies[2], up=Unfit("its probe is not finite\nand more"))
    (_, tally, _) = next(started([[replies[0], bad]])[0])
    assert tally.refused == {2: "its probe is not finite"} and tally.lost == {1: "no reply", 3: "no reply"}
    assert tally.accepted == [0] and list(tally.failed) == [1, 2, 3]


def test_a_loss_that_is_no_number_does_not_hide_the_others():
    replies = [replace(r, loss=1.5) for r in good()]
    replies[1] = replace(replies[1], loss=float("nan"))
    (_, tally, _) = next(started([replies])[0])
    assert tally.loss / tally.examples == 1.5 and tally.accepted == [0, 1, 2, 3]


# ---- methods from elsewhere -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damped(FedIT):
    """A subclass of a packaged method in another file, whose messages are those of its base."""

    FACTS: ClassVar = FedIT.FACTS


@dataclass(frozen=True)
class Borrowing:
    """A method of its own that borrows FedIT's Up."""

    FACTS: ClassVar = FedIT.FACTS

    def init(self, setup):
        return setup.fresh(2)

    def hold(self, setup, client):
        return None

    def send(self, state, client, round, since=None):
        return state

    def local(self, down, held, client, round):
        done = (yield Train({SHARED: down}, frozenset({(SHARED, "A"), (SHARED, "B")}))).slots[SHARED]
        return FedITUp({m: done.A[m] - x for m, x in down.A.items()}, {m: done.B[m] - x for m, x in down.B.items()}), held

    def aggregate(self, state, replies, round):
        (first, *_) = replies
        return Factors({m: x + first.up.A[m] for m, x in state.A.items()}, state.B, state.scale), {}

    def deploy(self, state):
        return methods.make("fedit", {}).deploy(state)


@pytest.mark.parametrize("method", [Damped(), Borrowing()], ids=lambda m: type(m).__name__)
def test_a_subclass_and_an_up_from_a_shared_module_train(method):
    setup = make_setup(make_clients((2,) * 4), rounds=1)
    state, trainer = method.init(setup), Trainer(setup)
    replies = [Reply(c, play(method, trainer, method.send(state, c, 1), None, c)[0]) for c in setup.clients]
    ((server, tally, _),) = rounds(method, setup, Server(0, state), Answers([replies]), lambda t: setup.clients)
    assert not tally.failed and not same(server.state, state)


def test_of_two_classes_of_one_name_the_nearest_counts(monkeypatch):
    module = ModuleType("elsewhere")
    imports = "from dataclasses import dataclass\nfrom fedlora.methods.fedit import FedIT\n"
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    exec(imports + "@dataclass\nclass Up: ...\nclass Mine(FedIT): ...\n", vars(module))
    found = {c.__name__: c for c in wire.message_classes(module.Mine())}
    assert found["Up"] is module.Up and found["FedIT"] is FedIT
    assert {c.__name__: c for c in wire.message_classes(FedIT())}["Up"] is FedITUp


def test_a_helper_file_among_the_methods_is_no_method(tmp_path):
    (tmp_path / "shared_parts.py").write_text("FACTS = 1\n\n\ndef f(): ...\n")
    (tmp_path / "my_method.py").write_text("class M:\n    FACTS: ClassVar = Facts()\n")
    assert methods._defined_in(tmp_path) == ["my-method"]
