"""Laws of runs in which half of the clients take part, drawn anew each round: averaging rules, who came first, sixty rounds."""

from collections.abc import Iterator
from dataclasses import fields, replace

import ideals
import numpy as np
import pytest
import torch
from cases import ROWS, Row
from laws import (
    every_row,
    law,
    long_row,
    outcome,
    some,
    standard,
    standard_with_requests,
    through_the_wire,
    trained_change,
    truncated,
    world,
)
from served import answers, rounds
from toy import Trainer, dense, deployed, distance, federate, play, same, tensors, weighted

from fedlora import methods, seeds
from fedlora.config import resolve
from fedlora.errors import BadInput
from fedlora.gather.lifted import lifted_mean
from fedlora.runs.hierarchy import fold_linear
from fedlora.server.loop import Server
from fedlora.transforms import pipeline
from fedlora.types import BASE, ClassMixtures, Client, Nothing, Observe, Reply, Setup, Train, asks_of, own_model

LONG = 60


def half(setup: Setup, seed: int = 0):
    """Two of four, drawn anew each round."""

    def sample(t: int) -> list[Client]:
        drawn = seeds.generator(seed, "half", t).permutation(len(setup.clients))[: len(setup.clients) // 2]
        return [setup.clients[i] for i in sorted(drawn)]

    return sample


def judged(row: Row, count: int, sample, slower: float = 1.0) -> Iterator[tuple[int, dict, dict, float]]:
    """A run, round by round: what the paper's rule makes of what the clients trained, what is deployed, and how large that is."""
    method, setup = world(row)
    trainer, played, run = Trainer(setup, lr=slower * row.lr, steps_per_epoch=1), [], federate(method, setup, 0)
    for t in range(1, count + 1):
        asked, before = len(trainer.log), method.deploy(run.states[-1])
        run = federate(method, setup, t, sample(setup), trainer, resume=(t - 1, run.states[-1], run.held[-1]))
        assert not any(run.refused)
        replies = [reply for _, reply in run.rounds[-1]]
        got = outcome(row, method.deploy(run.states[-1]), setup)
        if row.grouped and not row.by_role:
            models = {c.id: deployed(method, run.states[-1], c, run.held[-1][c.id]) for c in setup.clients}
            got = {f"client {id}: {name}": x for id, model in models.items() for name, x in dense(model, setup).items()}
        if row.ideal is not None:
            played.append(ideals.of(setup, t, before, trainer.log[asked:], trainer.merged, replies))
            ideal = row.ideal(played)
        else:
            changes = [trained_change(trainer, r.client, row, t) for r in replies]
            ideal = weighted(row.weights(replies), [{n: c[n] for n in got if n in c} for c in changes])
            ideal = truncated(ideal, max(row.ranks)) if row.truncated else ideal
        trainer.log.clear()
        yield t, ideal, {n: x for n, x in got.items() if n in ideal}, max(float(np.abs(x).max()) for x in got.values())


# ---- 11. the averaging rule ---------------------------------------------------------------------------------------------------


@every_row
@law(11, exempt="ideal")
def test_law_11_the_server_averages_as_its_paper_says(row):
    assert row.ideal is not None or row.exact_here or row.by_role
    for _, ideal, got, _ in judged(row, 5, some):
        assert distance(ideal, got) < 1e-12


# ---- 12. sampling -------------------------------------------------------------------------------------------------------------


ALL = (0, 1, 2, 3)


def shape_of(row: Row, setup: Setup, method, run) -> list:
    """What clients end with, but for the numbers: slots, roles, shapes, gates."""
    models = [deployed(method, run.states[-1], c, run.held[-1][c.id]) for c in setup.clients]
    slots = [
        {s: [(r, m, tuple(x.shape)) for r in "ABCD" for m, x in f.role(r).items()] for s, f in x.slots.items()} for x in models
    ]
    return [(s, type(x.gate), sorted(x.full)) for s, x in zip(slots, models, strict=True)]


@long_row
@law(12)
def test_law_12_nothing_depends_on_who_came_first(row):
    """One client alone, or the others before it, then everybody: all end with models of one form, and groups are the same."""
    method, setup = world(row)
    ended = []
    for order in ([(0,), (1, 2, 3)], [(3,), (0, 1, 2)], [(1, 2, 3), (0,)], [ALL, ALL]):
        present = [*order, ALL, ALL]
        run = federate(method, setup, 4, lambda t, p=present: [setup.clients[i] for i in p[t - 1]], Trainer(setup, lr=row.lr))
        assert not any(run.refused)
        models = [deployed(method, run.states[-1], c, run.held[-1][c.id]) for c in setup.clients]
        together = [[same(x.slots, y.slots) and same(x.gate, y.gate) for y in models] for x in models] if row.grouped else None
        ended.append((shape_of(row, setup, method, run), together))
    assert all(each == ended[0] for each in ended)


@every_row
@law(12)
def test_law_12_who_sits_out_keeps_what_is_its_own(row):
    method, setup = world(row)
    run = federate(method, setup, 8, half(setup), Trainer(setup, lr=row.lr))
    been: set[int] = set()
    for t in range(1, 9):
        here = {reply.client.id for _, reply in run.rounds[t]}
        been |= here
        for c in [c for c in setup.clients if c.id in been - here]:
            assert same(run.held[t][c.id], run.held[t - 1][c.id])
            before, after = (deployed(method, run.states[i], c, run.held[i][c.id]) for i in (t - 1, t))
            for slot in row.own:
                assert same(after.slots[slot], before.slots[slot])
            if row.keeps:
                assert same(after.slots, before.slots)


@every_row
@law(12)
def test_law_12_a_lost_attempt_changes_nothing(row):
    """All replies of an attempt are lost, and the next one has them: the same bits as if it had been the first."""
    method, setup = world(row, rounds=3)
    one = _with_lost(method, setup, row, lost=())
    two = _with_lost(method, setup, row, lost=(2,))
    assert same(one, two)


@long_row
@law(12)
def test_law_12_whatever_a_client_lost_of_what_it_was_sent_it_trains_to_the_same(row):
    """Two clients, in each of four rounds: with what the state says that it has, and with a base at each version it ever had
    and nothing else, but for what it holds."""
    method, setup = world(row)
    trainer, run = Trainer(setup, lr=row.lr), federate(method, setup, 0)
    start = trainer.pretrained, {m: torch.zeros_like(x) for m, x in trainer.pretrained.items()}
    bases = {c.id: {0: start} for c in setup.clients}
    compared = 0
    for t in range(1, 5):
        state, held = run.states[-1], run.held[-1]
        for c in setup.clients[:2]:
            ups = []
            for since in (None, *bases[c.id]):
                version = trainer.base.get(c.id, (0,))[0] if since is None else since
                again = Trainer(setup, lr=row.lr)
                again.base[c.id], again.merged[c.id] = (version, bases[c.id][version][0]), bases[c.id][version][1]
                ups.append(play(method, again, method.send(state, c, t, since), held[c.id], c, t)[0])
            for up in ups[1:]:
                assert type(up) is type(ups[0])
                for one, other in zip(tensors(up), tensors(ups[0]), strict=True):
                    np.testing.assert_allclose(one.double().numpy(), other.double().numpy(), rtol=0, atol=1e-11)
                compared += 1
        run = federate(method, setup, t, half(setup), trainer, resume=(t - 1, state, held))
        for id, (version, W) in trainer.base.items():
            bases[id][version] = W, trainer.merged[id]
    assert compared >= 8


# ---- 9. linear ----------------------------------------------------------------------------------------------------------------


def models_of(method, setup: Setup, state, held, heard: set[int], round: int) -> list[dict]:
    """The functions of the common model and of each client's own that was heard."""
    own = [c for c in setup.clients if c.id in heard and method.FACTS.personal]
    return [dense(m, setup) for m in (method.deploy(state), *(own_model(method, state, held[c.id], c, round) for c in own))]


@every_row
@law(9)
def test_law_9_where_it_is_linear_the_lifted_mean_of_all_ups_is_as_good_as_each(row):
    method, setup, run = standard(row)
    facts, apart, heard = method.FACTS, [], set[int]()
    for t in range(1, 6):
        replies = [reply for _, reply in run.rounds[t] if type(reply.up) is not Nothing]
        heard |= {reply.client.id for reply in replies}
        if not replies:
            continue
        state, held = run.states[t - 1], run.held[t]
        try:
            ranks = setup.all_ranks[-1] if facts.holders else None
            mean = lifted_mean(((facts.weight(method, r.client), r.up) for r in replies), ranks)
            made = (method.aggregate(state, iter(each), t)[0] for each in (replies, [replace(r, up=mean) for r in replies]))
            one, two = (models_of(method, setup, each, held, heard, t + 1) for each in made)
            far = max(map(distance, one, two))
        except ValueError:  # nothing that has a mean
            far = float("inf")
        if facts.linear(method, setup, t):
            assert far < 1e-9
            if not facts.holders:  # the mean of means of edge servers is the same
                twice = fold_linear([(facts.weight(method, r.client), r.up) for r in replies], 2)
                folded = method.aggregate(state, iter([replace(r, up=twice) for r in replies]), t)[0]
                assert max(map(distance, one, models_of(method, setup, folded, held, heard, t + 1))) < 1e-9
        else:
            apart.append(far)
    assert not apart or max(apart) > 1e-4


def used(ask: Train | Observe) -> set[str]:
    """What a request uses, in the words of `Facts.asks`."""
    if isinstance(ask, Observe):
        return {"classes"} if isinstance(ask.statistic, ClassMixtures) else set()
    roles = {role for slot in ask.slots.values() for role in "CD" if slot.role(role)}
    others = {
        "mask": bool(ask.mask),
        "probe": ask.probe,
        "base": ask.base.version > 0,
        "full": bool(ask.full) or any(slot == BASE for slot, _ in ask.roles),
        "gate": ask.gate is not None,
        "penalty": ask.penalty is not None,
        "grad": ask.want_grad,
        "domains": bool(ask.data),
        "slots": len(ask.slots) > 1,
        "drop_base": ask.drop_base,
    }
    return roles | {name for name, holds in others.items() if holds}


@pytest.mark.parametrize("name", methods.names())
def test_law_9_requests_use_what_the_facts_say(name):
    """All that a method's rows and its defaults use, together, is what it claims."""
    rows = [row for row in ROWS if row.method == name]
    _, setup = world(rows[0])
    trainer, method = Trainer(setup, lr=rows[0].lr), methods.make(name, {})
    federate(method, setup, 3, half(setup), trainer)
    asked = [ask for _, ask, _ in trainer.log] + trainer.looked
    found = {word for ask in asked for word in used(ask)}
    assert found <= asks_of(method)
    for row in rows:
        of_row = {word for ask in standard_with_requests(row)[1] for word in used(ask)}
        assert of_row <= asks_of(world(row)[0])
        found |= of_row
    assert found == method.FACTS.asks


# ---- 10. a client alone ---------------------------------------------------------------------------------------------------------


@every_row
@law(10)
def test_law_10_a_client_knows_none_of_the_others(row):
    """What it holds from the start is the same where the setup has nobody else; its own model the same to the bit where what it is
    made of came as bytes."""
    method, setup, run = standard(row)
    for c in setup.clients:
        alone = replace(setup, clients=(c,), all_ranks=setup.all_ranks)
        assert same(method.hold(alone, c), method.hold(setup, c))
        if row.personal:
            here = own_model(method, run.states[-1], run.held[-1][c.id], c, 6)
            down = method.send(run.states[-1], c, 6, since=0)
            there = method.own(through_the_wire(down, method), through_the_wire(run.held[-1][c.id], method), c)
            assert same(there, here)


def _with_lost(method, setup: Setup, row: Row, lost: tuple[int, ...]):
    """The states after three rounds of our own loop, where the first attempts of these rounds lose every reply."""
    transport = _Lossy(method, setup, Trainer(setup, lr=row.lr), set(lost))
    played = rounds(method, setup, Server(0, method.init(setup)), transport, half(setup))
    servers = [server for server, _, _ in played]
    return [server.state for server in servers], [transport.kept[c.id, servers[-1].accepted.get(c.id, 0)] for c in setup.clients]


class _Lossy:
    """Clients are played from what they kept in the round that the ask names."""

    def __init__(self, method, setup, trainer, lost):
        self.method, self.trainer, self.lost = method, trainer, lost
        self.kept = {(c.id, 0): method.hold(setup, c) for c in setup.clients}

    def exchange(self, asks):
        for ask in asks:
            id, t = ask.client.id, ask.round
            up, self.kept[id, t] = play(self.method, self.trainer, ask.down, self.kept[id, ask.held], ask.client, t)
            if t not in self.lost:
                yield from answers([ask], [Reply(ask.client, up)])
        self.lost.discard(asks[0].round)


# ---- 13. sixty rounds ---------------------------------------------------------------------------------------------------------


@long_row
@law(13, exempt="ideal")
def test_law_13_sixty_rounds_in_which_half_take_part(row):
    """Each round as in laws 1 and 11, and nothing drifts: logs that were folded, bases that were topped up, ranks that differ."""
    largest = 0.0
    for _, ideal, got, size in judged(row, LONG, half, slower=0.2):
        assert distance(ideal, got) < 1e-10 * max(1.0, size)
        largest = size
    assert np.isfinite(largest)


def dense_changes(up, setup: Setup) -> dict[tuple[str, str], np.ndarray]:
    """(field, module) -> an Up's changes where they belong: entries that an index leaves out are zero."""
    kinds = {f.name: f.metadata for f in fields(up) if "kind" in f.metadata}
    index = {meta["dims"][0]: name for name, meta in kinds.items() if meta["kind"] == "index"}
    out = {}
    for name, meta in kinds.items():
        for m, x in (getattr(up, name) if meta["kind"] == "change" else {}).items():
            x = x.double().numpy()
            for i, axis in enumerate(meta["dims"]):
                if axis in index:
                    where = np.flatnonzero(getattr(up, index[axis])[m].numpy())
                    whole = np.zeros((*x.shape[:i], len(getattr(up, index[axis])[m]), *x.shape[i + 1 :]))
                    whole[(slice(None),) * i + (where,)] = x
                    x = whole
            out[name, m] = x
    return out


@pytest.mark.slow
@every_row
@law(13)
def test_law_13_with_error_feedback_nothing_is_lost_in_sixty_rounds(row):
    """Of every client and every entry: all that was received and all that it remembers add up to all that it wanted to send."""
    method, setup = world(row)
    try:
        transforms = pipeline.make(resolve({"transform": [{"name": "topk", "density": 0.3}]}).transform, method, 0)
    except BadInput as refused:
        assert "as a value" in str(refused) or "error_feedback" in str(refused)
        return
    memory: dict[int, dict] = {c.id: {} for c in setup.clients}
    wanted: dict[tuple, np.ndarray] = {}
    received: dict[tuple, np.ndarray] = {}

    def through(order, up):
        sent, memory[order.client.id] = transforms.pack(up, memory[order.client.id], order.round, order.client)
        got = transforms.unpack(sent)
        for total, each in ((wanted, up), (received, got)):
            for key, x in dense_changes(each, setup).items():
                total[order.client.id, *key] = total.get((order.client.id, *key), 0.0) + x
        return got

    run = federate(method, setup, LONG, half(setup), Trainer(setup, lr=0.2 * row.lr, steps_per_epoch=1), tamper=through)
    assert not any(run.refused) and len(wanted) > 0
    for (id, name, m), x in wanted.items():
        kept = memory[id].get(f"{name} {m}")
        remembered = np.zeros_like(x) if kept is None else kept.double().numpy().reshape(x.shape)
        np.testing.assert_allclose(received[id, name, m] + remembered, x, atol=1e-9 * max(1.0, np.abs(x).max()))
