"""The laws that every method obeys, over every row of `cases.py`, in float64 unless said otherwise."""

import copy
import re
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from cases import ROWS, Row, Start
from laws import (
    every_row,
    function,
    law,
    long_row,
    outcome,
    some,
    standard,
    third_round,
    through_the_wire,
    trained_change,
    truncated,
    without_own,
    world,
)
from toy import (
    SHAPES,
    Trainer,
    dense,
    deployed,
    distance,
    federate,
    make_clients,
    make_setup,
    play,
    same,
    tensors,
    top_up,
    weighted,
)

from fedlora import wire
from fedlora.check import refuse, unasked
from fedlora.methods import names
from fedlora.types import GATE, Factors, Model, Reply

# ---- the table -----------------------------------------------------------------------------------------------------------


def test_every_method_has_a_row():
    assert {row.method for row in ROWS} == set(names())


@every_row
def test_facts_say_what_the_row_says(row):
    facts = row.make().FACTS
    assert (facts.exact, facts.mixed_ranks, facts.personal) == (row.exact, row.mixed_ranks, row.personal)
    assert facts.title and facts.upload and facts.download and facts.server
    if re.fullmatch(r"\d{4}\.\d{5}", facts.paper):
        assert facts.year == 2000 + int(facts.paper[:2])


@every_row
def test_personal_methods_deploy_different_models_and_others_one(row):
    method, setup, run = standard(row)
    common = method.deploy(run.states[-1])
    same_for_all = all(same(deployed(method, run.states[-1], c, run.held[-1][c.id]), common) for c in setup.clients)
    assert same_for_all != row.personal


# ---- 1. the dense oracle ----------------------------------------------------------------------------------------------------


@every_row
@law(1, exempt="exact_with")
def test_law_1_the_update_is_the_mean_of_the_clients_updates_where_exact(row):
    method, setup = world(row)
    trainer, largest = Trainer(setup), 0.0
    run, heard = federate(method, setup, 0), {}
    for t in range(1, 6):
        run = federate(method, setup, t, some(setup), trainer, resume=(t - 1, run.states[-1], run.held[-1]))
        now = {r.client.id: (r, trained_change(trainer, r.client, row, t)) for _, r in run.rounds[-1]}
        heard = heard | now if row.remembers else now
        replies, changes = map(list, zip(*heard.values(), strict=True))
        if row.by_role:
            ideal, got = weighted(row.weights(replies), changes), outcome(row, method.deploy(run.states[-1]), setup)
            assert distance(ideal, got) < 1e-12
            assert distance(ideal, changes[0]) > 1e-4 or t > 3
            continue
        ideal = weighted(row.weights(replies), [{name: change[name] for name in setup.params} for change in changes])
        got = dense(method.deploy(run.states[-1]), setup)
        if row.truncated:
            rank = max(row.ranks)
            largest = max(largest, distance(ideal, got))
            for name in (f"{m}.weight" for m in SHAPES):
                tail = np.linalg.svd(ideal[name], compute_uv=False)[rank:]
                np.testing.assert_allclose(((ideal[name] - got[name]) ** 2).sum(), (tail**2).sum(), atol=1e-12)
            ideal = truncated(ideal, rank)
        if row.exact_here:
            assert distance(ideal, got) < 1e-12
        else:
            largest = max(largest, distance(ideal, got))
    if (row.truncated or not row.exact_here) and not row.by_role:
        assert largest > 1e-3


# ---- 2. aggregation ---------------------------------------------------------------------------------------------------------


def after(row: Row, method, setup, state, replies, client=None) -> dict[str, np.ndarray]:
    held = None if client is None else method.hold(setup, client)
    return outcome(row, deployed(method, method.aggregate(state, iter(replies), row.at)[0], client, held, row.at + 1), setup)


@every_row
@law(2, exempt="grouped")
def test_law_2_the_order_of_clients_does_not_matter(row):
    method, setup, run, replies, _ = third_round(row)
    state = run.states[row.at - 1]
    if row.grouped:  # who a reply is from decides what group its change is added to, so the replies change places and not owners
        for places, client in ((p, c) for p in ([3, 2, 1, 0], [1, 3, 0, 2]) for c in setup.clients):
            permuted = [replies[i] for i in places]
            expected = after(row, method, setup, state, replies, client)
            assert distance(after(row, method, setup, state, permuted, client), expected) < 1e-12
        return
    expected = after(row, method, setup, state, replies)
    for ids in ([3, 2, 1, 0], [1, 3, 0, 2]):
        permuted = sorted(
            (Reply(replace(r.client, id=i), r.up) for i, r in zip(ids, replies, strict=True)), key=lambda r: r.client.id
        )
        assert distance(after(row, method, setup, state, permuted), expected) < 1e-12


@every_row
@law(2)
def test_law_2_scaling_all_numbers_of_examples_does_not_matter(row):
    method, setup, run, replies, _ = third_round(row)
    state = run.states[row.at - 1]
    scaled = [
        Reply(replace(c, num_examples=7 * c.num_examples, domains={t: 7 * n for t, n in c.domains.items()}), r.up)
        for r in replies
        for c in [r.client]
    ]
    for client in setup.clients if row.grouped else [None]:
        assert distance(after(row, method, setup, state, scaled, client), after(row, method, setup, state, replies, client)) < 1e-12


@every_row
@law(2, exempt="grouped")
def test_law_2_identical_ups_give_that_up(row):
    method, setup, run, replies, _ = third_round(row)
    state, largest = run.states[row.at - 1], 0
    for reply in replies:
        client, ids = None, [0, 1, 2]
        if row.grouped:  # of the same group: others start elsewhere
            client, down = reply.client, method.send(state, reply.client, row.at)
            ids = [c.id for c in setup.clients if same(method.send(state, c, row.at), down)]
            largest = max(largest, len(ids))
        copies = [Reply(replace(reply.client, id=i, num_examples=5 + i), reply.up) for i in ids]
        assert distance(after(row, method, setup, state, copies, client), after(row, method, setup, state, [reply], client)) < 1e-12
    assert largest > 1 or not row.grouped


@every_row
@law(2, exempt="cuts")
def test_law_2_one_client_alone_gives_its_own_update(row):
    method, setup, run, replies, trained = third_round(row)
    state = run.states[row.at - 1]
    errors = [
        distance(after(row, method, setup, state, [r], r.client if row.grouped else None), trained[r.client.id]) for r in replies
    ]
    assert max(errors) > 1e-3 if row.cuts else max(errors) < 1e-12


# ---- 3. purity --------------------------------------------------------------------------------------------------------------


@every_row
@law(3)
def test_law_3_no_function_changes_its_inputs(row):
    method, setup, run = standard(row)
    for t in range(1, 5):
        state, held, exchanged = run.states[t - 1], run.held[t - 1], run.rounds[t]
        inputs = state, held, exchanged
        before = copy.deepcopy(inputs)
        for order, reply in exchanged:
            method.send(state, order.client, t)
            trainer = Trainer(setup)
            top_up(trainer, method, state, order)
            play(method, trainer, order.down, held[order.client.id], order.client, t)
            deployed(method, state, reply.client, held[reply.client.id], t)
        method.aggregate(state, iter([reply for _, reply in exchanged]), t)
        assert same(inputs, before)


@every_row
@law(3)
def test_law_3_calls_repeat_bit_for_bit(row):
    _, setup, one = standard(row)
    two = federate(row.make(), setup, 5, some(setup), Trainer(setup, lr=row.lr))
    assert same((one.states, one.held, one.rounds), (two.states, two.held, two.rounds))


@every_row
@law(3)
def test_law_3_everything_survives_the_wire_bit_for_bit(row):
    method, _, run = standard(row)
    downs = [order.down for exchanged in run.rounds for order, _ in exchanged]
    ups = [reply.up for exchanged in run.rounds for _, reply in exchanged]
    for x in [*run.states, *run.held, *downs, *ups]:
        assert same(through_the_wire(x, method), x)


@long_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@law(3)
def test_law_3_a_run_over_the_wire_equals_one_in_memory_bit_for_bit(row, dtype):
    method, setup = world(row, dtype=dtype)
    one = federate(method, setup, 4, some(setup))
    two = federate(method, setup, 4, some(setup), carry=lambda message: through_the_wire(message, method))
    assert same((two.states, two.held), (one.states, one.held))


@long_row
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@law(3)
def test_law_3_a_run_stopped_at_any_round_and_resumed_equals_the_uninterrupted_one(row, optimizer):
    method, setup = world(row)
    whole = federate(method, setup, 4, some(setup), Trainer(setup, optimizer=optimizer))
    for t in range(4):
        saved = through_the_wire((whole.states[t], whole.held[t]), method)
        rest = federate(method, setup, 4, some(setup), Trainer(setup, optimizer=optimizer), resume=(t, *saved))
        assert same((rest.states[-1], rest.held[-1]), (whole.states[-1], whole.held[-1]))


# ---- 4. what crosses the wire -------------------------------------------------------------------------------------------------


@every_row
@law(4, exempt="upload, download, index_bytes")
def test_law_4_only_declared_roles_go_up_and_counts_equal_the_formulas(row):
    _, setup, run = standard(row)
    last = dict.fromkeys(setup.ranks, 0)
    for t, exchanged in enumerate(run.rounds):
        for order, reply in exchanged:
            client, up = order.client, reply.up
            kinds = {f.name: f.metadata.get("kind") for f in fields(up) if tensors(getattr(up, f.name))}
            sent = {name for name, kind in kinds.items() if kind not in ("index", "statistic")}
            assert None not in kinds.values()
            assert sent == ({"full"} if row.slot == "base" else row.roles(t))
            assert wire.measure(up).numbers == row.upload(setup, client, t, up)
            assert wire.measure(order.down).numbers == row.download(setup, client, t, last[client.id])
            assert wire.measure(up).values == 8 * wire.measure(up).numbers
            assert wire.measure(up).indices == row.index_bytes(setup)
            for message in (up, order.down):
                assert wire.measure(message).total == len(wire.encode(message))
            last[client.id] = t
    assert all(last.values())


# ---- 5. what moves ----------------------------------------------------------------------------------------------------------


@every_row
@law(5, exempt="trains, recast")
def test_law_5_only_trained_roles_change(row):
    method, setup = world(row)
    trainer = Trainer(setup)
    run = federate(method, setup, 0)
    for t in range(1, 5):
        asked = len(trainer.log)
        run = federate(method, setup, t, some(setup), trainer, resume=(t - 1, run.states[-1], run.held[-1]))
        every = frozenset().union(*(ask.roles for _, ask, _ in trainer.log[asked:]))
        for _, ask, _ in trainer.log[asked:]:
            if row.trains:  # in parts: one after the other, or as many as a client's budget allows
                assert ask.roles <= every <= row.trained(t)
                assert every == row.trained(t) or len(some(setup)(t)) < len(setup.clients)
            elif row.grouped:  # of one slot, its group's
                assert {role for _, role in ask.roles} == row.roles(t)
                assert len({slot for slot, _ in ask.roles} - {GATE}) == 1
            else:
                assert ask.roles == row.trained(t)
        if row.grouped:
            continue
        before, now = (method.deploy(state).slots for state in run.states)
        assert before.keys() == now.keys() or t == row.switch
        pairs = [(s, r) for s in before.keys() & now.keys() for r in "ABCD"]
        resting = [(s, r) for s, r in pairs if (s, r) not in row.trained(t) and r not in row.recast]
        for slot, role in resting:
            assert same(getattr(now[slot], role), getattr(before[slot], role))


@every_row
@law(5)
def test_law_5_round_one_is_alive_in_every_module(row):
    method, setup, run = standard(row)
    change = function(row, method, setup, run.states[1], run.held[1])
    assert distance(function(row, method, setup, run.states[0], run.held[0]), dict.fromkeys(change, 0.0)) == 0.0
    for m in SHAPES:
        assert np.abs(change[f"{m}.weight"]).max() > 1e-3


@every_row
@law(5, exempt="idle")
def test_law_5_zero_local_steps_leave_the_deployed_function_unchanged(row):
    """With one rank for all: with mixed ranks FlexLoRA truncates and HetLoRA dilutes, see their own files."""
    method, setup = world(row, ranks=[max(row.ranks)] * 4)
    run = federate(method, setup, 3, trainer=Trainer(setup, lr=row.lr))
    expected = function(row, method, setup, run.states[-1], run.held[-1])
    idle = federate(method, setup, 7, some(setup), Trainer(setup, steps_per_epoch=0), resume=(3, run.states[-1], run.held[-1]))
    functions = [function(row, method, setup, state, held) for state, held in zip(idle.states, idle.held, strict=True)]
    assert all(distance(each, expected) < 1e-12 for each in functions) or not row.idle
    assert row.idle or distance(functions[-1], expected) > 1e-3  # an exemption is needed
    assert distance(expected, dict.fromkeys(expected, 0.0)) > 0.05


# ---- 6. robustness ------------------------------------------------------------------------------------------------------------


@every_row
@law(6, exempt="mixed_ranks")
def test_law_6_mixed_ranks_work_or_are_refused_by_the_methods_name(row):
    method, setup = world(row, ranks=[1, 3, 2, 4])
    if row.mixed_ranks:
        run = federate(method, setup, 3, some(setup))
        assert all(torch.isfinite(t).all() for t in tensors(run.states))
    else:
        with pytest.raises(ValueError, match=re.escape(method.FACTS.title)):
            method.init(setup)


@long_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@law(6)
def test_law_6_the_dtype_is_kept(row, dtype):
    method, setup = world(row, dtype=dtype)
    run = federate(method, setup, 4, some(setup))
    model = deployed(method, run.states[-1], setup.clients[0], run.held[-1][0])
    floats = [t.dtype for t in tensors([run.states, run.held, run.rounds, model]) if t.is_floating_point()]
    assert set(floats) == {dtype}


@long_row
@pytest.mark.parametrize(
    "ranks, examples",
    [((1, 1), (10, 10)), ((8, 8), (10, 40)), ((14, 14), (10, 40)), ((2,), (10,)), ((2, 2), (1, 40))],
    ids=["rank one", "rank min(d)", "rank above min(d)", "one client", "one example"],
)
@law(6)
def test_law_6_extreme_sizes(row, ranks, examples):
    method, setup = row.make(), make_setup(make_clients(ranks, examples))
    run = federate(method, setup, 4, trainer=Trainer(setup, lr=row.lr))
    assert not any(run.refused)
    change = function(row, method, setup, run.states[-1], run.held[-1], id=len(ranks) - 1)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-3 for n, x in change.items() if n.endswith("weight"))


def first_tensor(up):
    """(field, module) of the first tensor of numbers in an Up that is not empty."""
    return next(
        (f.name, m) for f in fields(up) if f.metadata["kind"] != "index" for m, t in getattr(up, f.name).items() if t.numel()
    )


def with_tensor(up, change):
    name, m = first_tensor(up)
    return replace(up, **{name: {**getattr(up, name), m: change(getattr(up, name)[m])}})


def without_module(up):
    name, m = first_tensor(up)
    return replace(up, **{name: {k: v for k, v in getattr(up, name).items() if k != m}})


BAD = {
    "finite": lambda up: with_tensor(up, lambda t: torch.full_like(t, torch.nan)),
    "expected": lambda up: with_tensor(up, lambda t: torch.cat([t, t])),
    "axes": lambda up: with_tensor(up, lambda t: t[None]),
    "floating-point": lambda up: with_tensor(up, lambda t: t.long()),
    "not a tensor": lambda up: with_tensor(up, lambda t: t.tolist()),
    "lacks": without_module,
    "unexpected": lambda up: replace(up, **{first_tensor(up)[0]: {**getattr(up, first_tensor(up)[0]), "other": torch.ones(1)}}),
    "not a mapping": lambda up: replace(up, **{first_tensor(up)[0]: [1.0]}),
    "no message": lambda up: Factors(),
    "empty": lambda up: type(up)(),
}


@long_row
@pytest.mark.parametrize("word", BAD)
@law(6)
def test_law_6_a_bad_reply_is_refused_and_the_others_count(row, word):
    method, setup, before, _, _ = third_round(row)
    culprit = setup.clients[1]

    def tamper(order, up):
        return BAD[word](up) if order.client == culprit else up

    resume = (row.at - 1, before.states[row.at - 1], before.held[row.at - 1])
    run = federate(method, setup, row.at, tamper=tamper, resume=resume)
    without = federate(method, setup, row.at, lambda t: [c for c in setup.clients if c != culprit], resume=resume)
    why = run.refused[-1]
    assert list(why) == [culprit.id] and word in why[culprit.id] and "\n" not in why[culprit.id]
    assert same(run.states[-1], without.states[-1])
    assert same(run.held[-1][culprit.id], before.held[row.at - 1][culprit.id])
    assert same(run.held[-1], without.held[-1])


@every_row
@law(6)
def test_law_6_a_good_reply_is_not_refused_but_an_undeclared_tensor_is(row):
    method, setup, run = standard(row)
    assert not any(run.refused)
    order, reply = run.rounds[2][0]
    assert refuse(reply.up, method, setup, order.client) is None
    assert refuse(run.states[-1], method, setup, order.client) is not None
    assert refuse(method, method, setup, order.client) is not None
    assert refuse(type(reply.up), method, setup, order.client) is not None
    assert is_dataclass(reply.up)


@every_row
@law(6)
def test_law_6_a_reply_that_lacks_a_field_is_refused_and_the_others_count(row):
    """Every single field left out, and, where the fields change from round to round, the answer to another round: whatever is
    not refused can be aggregated."""
    method, setup, run = standard(row)
    everything = {t: [reply for _, reply in played] for t, played in enumerate(run.rounds) if t}
    for t, replies in everything.items():
        state = run.states[t - 1]
        assert unasked(replies[0].up, method, state, replies[0].client, t) is None
        others = [r for u in everything if u != t for r in everything[u] if r.client.id == replies[0].client.id]
        emptied = [replace(replies[0], up=replace(replies[0].up, **{f.name: {}})) for f in fields(replies[0].up) if f.metadata]
        for bad in (*others, *emptied):
            if refuse(bad.up, method, setup, bad.client) or unasked(bad.up, method, state, bad.client, t):
                continue
            method.aggregate(state, iter([bad, *replies[1:]]), t)


# ---- 7. clients that skip rounds ------------------------------------------------------------------------------------------------


def ranks_of(slots) -> dict[tuple[str, str], set[bytes]]:
    """Slot and module -> its ranks, each by the bits of its row of A and its column of B."""

    def bits(f: Factors, m: str, i: int) -> bytes:
        return f.A[m][i].numpy().tobytes() + f.B[m][:, i].contiguous().numpy().tobytes()

    return {(s, m): {bits(f, m, i) for i in range(len(f.A[m]))} for s, f in slots.items() for m in f.A}


@long_row
@law(7, exempt="starts")
def test_law_7_a_client_that_skips_rounds_starts_where_one_that_did_not_starts(row):
    """Sixteen clients, every pattern of presence over four rounds; all are there in the fifth. Client 0 is always there."""
    method = row.make()
    setup = make_setup(make_clients([max(row.ranks)] * 16, tasks=row.tasks))
    initial, been = method.deploy(method.init(setup)).slots, set()
    trainer, run = Trainer(setup), federate(method, setup, 0)
    compared = 0
    for t in range(1, 6):
        asked = len(trainer.log)
        present = [c for c in setup.clients if t == 5 or not c.id >> (t - 1) & 1]
        run = federate(method, setup, t, lambda _, present=present: present, trainer, resume=(t - 1, run.states[-1], run.held[-1]))
        first = {}
        for client, ask, _ in trainer.log[asked:]:
            slots = ask.slots if row.starts is Start.PERSONAL else without_own(row, ask.slots)
            first.setdefault(client.id, (slots, ask.full, trainer.base[client.id][1]))
        assert list(first) == [c.id for c in present]
        if row.starts is Start.GROUP:
            common = method.deploy(run.states[0]).slots
            for client in present:
                asks = [ask for c, ask, _ in trainer.log[asked:] if c.id == client.id]
                starts = [slot for ask in asks for slot in ask.slots.values()]
                group = list(deployed(method, run.states[0], client, run.held[0][client.id], t).slots.values())
                new = [[*x.values()] * len(asks) for x in (initial, common)]
                assert same(starts, group) or (client.id not in been and any(same(starts, x) for x in new))
                compared += 1
            been |= {c.id for c in present}
            continue
        for id, (slots, full, merged) in first.items():
            assert same((full, merged), first[0][1:])
            if row.starts is Start.OWN:  # each draws its own, and none of it counts yet
                assert distance(dense(Model(slots), setup), dense(Model(), setup)) == 0.0
            elif row.starts is Start.PERSONAL:
                assert same(slots, deployed(method, run.states[0], setup.clients[id], run.held[0][id], t).slots)
            elif row.starts is Start.PART:
                there = ranks_of(method.deploy(run.states[0]).slots)
                assert all(chosen <= there[key] for key, chosen in ranks_of(slots).items())
            else:
                assert same(slots, first[0][0])
            compared += 1
        if row.starts is Start.DEPLOYED:
            assert same(first[0][0], method.deploy(run.states[0]).slots)
    assert compared == 4 * 8 + 16
