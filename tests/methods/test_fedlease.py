"""FedLEASE (2509.15087): clusters of clients by their B, an expert a cluster, a router among them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from toy import SHAPES, Trainer, dense, deployed, distance, federate, make_clients, make_setup, play, same

from fedlora import wire
from fedlora.check import refuse
from fedlora.errors import BadInput
from fedlora.methods import make
from fedlora.methods.fedit import FedIT
from fedlora.methods.fedlease import Down, FedLEASE, Up
from fedlora.types import GATE, SHARED, Mix, Reply, Router

THREE = [("x",), ("y",), ("z",)]


def world(tasks=THREE, count=9, rounds=4, shapes=SHAPES, **settings):
    return FedLEASE(**settings), make_setup(make_clients([2] * count, tasks=tasks), shapes, rounds=rounds)


def random_up(seed: int, spread: float = 1.0, near: Up | None = None) -> Up:
    g = torch.Generator().manual_seed(seed)

    def drawn(role: str, m: str, *shape: int):
        x = spread * torch.randn(shape, generator=g, dtype=torch.float64)
        return x if near is None else x + getattr(near, role)[m]

    return Up({m: drawn("A", m, 2, i) for m, (_, i) in SHAPES.items()}, {m: drawn("B", m, o, 2) for m, (o, _) in SHAPES.items()})


def cosine_distance(x: Up, y: Up) -> float:
    pairs = [(x.B[m].numpy().ravel(), y.B[m].numpy().ravel()) for m in SHAPES]
    return float(np.mean([1 - np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))


def founded(method, setup, ups: list[Up]):
    """The state and diagnostics after these warm-ups."""
    return method.aggregate(method.init(setup), iter([Reply(c, up) for c, up in zip(setup.clients, ups, strict=True)]), 1)


# ---- warm-up and clusters -----------------------------------------------------------------------------------------------


def test_the_number_of_experts_is_the_best_silhouette_of_the_average_linkage() -> None:
    for seed in range(6):
        method, setup = world(count=7, max_experts=5)
        ups = [random_up(10 * seed + i, 0.4, random_up(1000 + (i + seed) % 3)) for i in range(7)]
        d = np.array([[cosine_distance(x, y) if x is not y else 0.0 for y in ups] for x in ups])
        tree, scores = linkage(squareform(d, checks=False), method="average"), {}
        for m in range(2, 6):
            labels = fcluster(tree, m, criterion="maxclust")
            scores[m] = silhouette_score(d, labels, metric="precomputed")
        best = max(scores, key=scores.__getitem__)
        state, diagnostics = founded(method, setup, ups)
        assert len(state.experts) == diagnostics["experts"] == best
        assert diagnostics["silhouettes"] == pytest.approx({str(m): score for m, score in scores.items()})
        np.testing.assert_allclose(diagnostics["distances"].numpy(), d, atol=1e-12)
        labels = fcluster(tree, best, criterion="maxclust")
        for i in range(7):
            for j in range(7):
                assert (state.clusters[i] == state.clusters[j]) == (labels[i] == labels[j])


def test_A_and_the_scale_of_B_do_not_matter_for_the_clusters() -> None:
    method, setup = world(count=7)
    ups = [random_up(i, 0.4, random_up(1000 + i % 3)) for i in range(7)]
    other = [replace(up, A=random_up(77 + i).A, B={m: (i + 1) * x for m, x in up.B.items()}) for i, up in enumerate(ups)]
    assert founded(method, setup, ups)[0].clusters == founded(method, setup, other)[0].clusters


@pytest.mark.parametrize("uniform", [True, False])
def test_an_expert_is_the_mean_of_its_clusters_warm_ups(uniform: bool) -> None:
    method, setup = world(count=6, experts=3, uniform_weights=uniform)
    ups = [random_up(i, 0.1, random_up(1000 + i % 3)) for i in range(6)]
    state, _ = founded(method, setup, ups)
    for c in setup.clients[:3]:
        mates = [setup.clients[c.id], setup.clients[c.id + 3]]
        assert state.clusters[mates[0].id] == state.clusters[mates[1].id]
        w = [1.0 if uniform else mate.num_examples for mate in mates]
        expert = state.experts[state.clusters[c.id]]
        for m in SHAPES:
            for role in "AB":
                mean = sum(x * getattr(ups[mate.id], role)[m].numpy() for x, mate in zip(w, mates, strict=True)) / sum(w)
                np.testing.assert_allclose(getattr(expert, role)[m], getattr(setup.fresh(2), role)[m].numpy() + mean, atol=1e-12)


def test_warm_up_is_a_share_of_the_run_inside_the_first_round() -> None:
    for rounds, share, expected in [(25, 0.2, 10), (2, 0.2, 2), (10, 0.5, 10), (4, 0.0, 2)]:
        method, setup = world(rounds=rounds, warmup=share)
        trainer = Trainer(setup)
        run = federate(method, setup, 2, trainer=trainer)
        warm, later = [ask for _, ask, _ in trainer.log[:9]], [ask for _, ask, _ in trainer.log[9:]]
        assert {ask.epochs for ask in warm} == {expected} and {ask.epochs for ask in later} == {None}
        assert all(list(ask.slots) == [SHARED] and same(ask.slots[SHARED], setup.fresh(2)) for ask in warm)
        assert all(order.down == Down(expected) for order, _ in run.rounds[1])


def test_clusters_are_those_of_the_tasks_and_stay() -> None:
    method, setup = world()
    run = federate(method, setup, 4)
    first = run.states[1].clusters
    assert {len({first[c.id] for c in setup.clients if task in c.domains}) for task in "xyz"} == {1}
    assert all(state.clusters == first for state in run.states[2:])
    _, diagnostics = method.aggregate(run.states[0], iter([reply for _, reply in run.rounds[1]]), 1)
    assert diagnostics["experts"] == 3 and diagnostics["purity"] == 1.0


def test_training_of_round_two_starts_from_the_clusters_mean() -> None:
    """Not from the client's own warm-up, as the public code does; and no expert still has B = 0."""
    method, setup = world()
    trainer = Trainer(setup)
    run = federate(method, setup, 2, trainer=trainer)
    for client, ask, _ in trainer.log[9:]:
        for j, expert in enumerate(run.states[1].experts):
            assert same(ask.slots[f"expert{j}"], expert)
            assert all(bool(B.any()) for B in expert.B.values())
        assert ask.gate.own == f"expert{run.states[1].clusters[client.id]}"


# ---- before there are clusters --------------------------------------------------------------------------------------------

FOUR = [("w",), ("x",), ("y",), ("z",)]


def draw(setup, count: int, seed: int):
    """Who takes part: so many clients a round, drawn anew."""
    n = len(setup.clients)
    return lambda t: [setup.clients[i] for i in sorted(np.random.default_rng([seed, t]).permutation(n)[:count])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_of_sixteen_a_round_make_the_clusters_of_their_tasks_whoever_came_first(seed: int) -> None:
    method, setup = world(FOUR, 16, rounds=120, warmup=0.02)
    trainer = Trainer(setup)
    run = federate(method, setup, 60, draw(setup, 2, seed), trainer)
    been, own = set(), {}
    for t in range(1, 61):
        state, warm = run.states[t], [(c, done) for c, ask, done in trainer.log if list(ask.slots) == [SHARED]]
        been |= {order.client.id for order, _ in run.rounds[t]}
        if len(been) < 16:
            assert not state.experts and set(state.waiting) == been
        else:
            break
    assert len(state.experts) == 4 and not state.waiting and t < 60
    for task in "wxyz":
        assert len({state.clusters[c.id] for c in setup.clients if task in c.domains}) == 1
    assert run.states[60].clusters == state.clusters
    own = {c.id: done.slots[SHARED] for c, done in warm}  # each client's newest, once
    assert len(warm) == 2 * t > len(own) == 16
    for j, expert in enumerate(state.experts):
        mates = [own[i] for i in range(16) if state.clusters[i] == j]
        for m in SHAPES:
            for role in "AB":
                mean = np.mean([f.role(role)[m].numpy() for f in mates], axis=0)
                np.testing.assert_allclose(expert.role(role)[m], mean, atol=1e-12)


def test_who_is_drawn_again_goes_on_with_its_own_adapter_for_a_round() -> None:
    method, setup = world(rounds=10, min_clients=9)
    trainer = Trainer(setup)
    run = federate(method, setup, 3, lambda t: setup.clients[:1] if t != 2 else setup.clients[3:4], trainer)
    first, _, again = trainer.log
    assert first[1].epochs == 4 and again[1].epochs == setup.epochs  # the warm-up's two rounds of ten, then one
    assert same(first[1].slots[SHARED], setup.fresh(2))
    for m in SHAPES:
        np.testing.assert_allclose(again[1].slots[SHARED].B[m], first[2].slots[SHARED].B[m], atol=1e-12)
    assert set(run.states[3].waiting) == {0, 3} and same(run.states[3].waiting[3], run.states[2].waiting[3])
    assert same(wire.decode(wire.encode(run.states[3]), wire.message_classes(method)), run.states[3])
    for c, done in ((setup.clients[0], again[2]), (setup.clients[3], trainer.log[1][2])):
        model = deployed(method, run.states[3], c)
        assert model.gate is None
        for m in SHAPES:
            np.testing.assert_allclose(model.slots[SHARED].B[m], done.slots[SHARED].B[m], atol=1e-12)
    assert same(
        deployed(method, run.states[3], setup.clients[1], method.hold(setup, setup.clients[1])).slots, {SHARED: setup.fresh(2)}
    )


def test_clusters_do_not_depend_on_the_order_in_which_clients_came() -> None:
    ups = [random_up(i, 0.4, random_up(1000 + i % 3)) for i in range(7)]
    ends = []
    for order in ([[0, 1, 2, 3, 4, 5, 6]], [[0, 3], [1, 6], [2, 4], [5]], [[5], [4, 6], [3], [0, 1, 2]]):
        method, setup = world(count=7, rounds=20)
        state = method.init(setup)
        for ids in order:
            assert not state.experts
            state, diagnostics = method.aggregate(state, iter([Reply(setup.clients[i], ups[i]) for i in sorted(ids)]), 1)
        ends.append((state.clusters, state.experts, state.routers))
        assert diagnostics["experts"] == len(state.experts) > 1
    assert same(ends[1], ends[0]) and same(ends[2], ends[0])


@pytest.mark.parametrize(
    ("settings", "founded_at"), [({}, 6), ({"min_clients": 4}, 2), ({"min_clients": 7}, 4), ({"min_clients": 99}, 0)]
)
def test_when_clusters_are_made(settings: dict, founded_at: int) -> None:
    """Two new clients a round, of 20: by default by half of twelve rounds, never before three have warmed up."""
    method, setup = world(count=20, rounds=12, **settings)
    state = method.init(setup)
    for t in range(1, 8):
        here = setup.clients[2 * t - 2 : 2 * t]
        state, _ = method.aggregate(state, iter([Reply(c, random_up(c.id, 0.4, random_up(1000 + c.id % 3))) for c in here]), t)
        assert bool(state.experts) == (0 < founded_at <= t)
        if t == founded_at:
            assert set(state.clusters) == set(range(2 * t))


def test_one_client_a_round_is_no_cluster_before_there_are_three() -> None:
    method, setup = world(count=9, rounds=2)
    state = method.init(setup)
    for c in setup.clients[:3]:
        assert not state.experts
        state, _ = method.aggregate(state, iter([Reply(c, random_up(c.id))]), 1)
    assert set(state.clusters) == {0, 1, 2}


def test_who_has_no_data_is_not_waited_for() -> None:
    method, setup = world(count=9, rounds=20)
    clients = [replace(c, num_examples=0, domains={}) if c.id > 5 else c for c in setup.clients]
    setup = replace(setup, clients=tuple(clients))
    state, _ = method.aggregate(method.init(setup), iter([Reply(c, random_up(c.id)) for c in clients[:6]]), 1)
    assert state.experts


def test_what_a_client_must_send() -> None:
    method, setup = world(min_clients=8)
    run = federate(method, setup, 2, lambda t: setup.clients[:8])
    sends, client, late = method.FACTS.sends, setup.clients[0], setup.clients[8]
    assert sends(method, run.states[0], client, 1) == {"A", "B"}
    assert sends(method, run.states[1], client, 2) == {"A", "B", "G"} and sends(method, run.states[1], late, 2) == {"A", "B"}
    alone = FedLEASE(experts=1)
    assert alone.FACTS.sends(alone, founded(alone, setup, [random_up(i) for i in range(9)])[0], client, 2) == {"A", "B"}


# ---- rounds -------------------------------------------------------------------------------------------------------------


def test_only_the_own_expert_and_the_router_train() -> None:
    method, setup = world()
    trainer = Trainer(setup)
    federate(method, setup, 2, trainer=trainer)
    for _, ask, done in trainer.log[9:]:
        own = ask.gate.own
        assert ask.roles == {(own, "A"), (own, "B"), (GATE, "G")}
        assert set(ask.gate.others) == set(ask.slots) - {own} and len(ask.gate.others) == 2
        for name, slot in ask.slots.items():
            assert same(done.slots[name], slot) == (name != own)
        for m, (_, d_in) in SHAPES.items():
            assert ask.gate.G[m].shape == (5, d_in)
            assert not torch.equal(done.gate.G[m], ask.gate.G[m])


@pytest.mark.parametrize("uniform", [True, False])
def test_expert_and_router_are_means_over_their_cluster_and_others_keep(uniform: bool) -> None:
    method, setup = world(uniform_weights=uniform)
    run = federate(method, setup, 1)
    present = [c for c in setup.clients if c.id in (0, 3, 1)]  # two of x, one of y, none of z
    trainer = Trainer(setup)
    run = federate(method, setup, 2, lambda t: present, trainer, resume=(1, run.states[1], run.held[1]))
    before, now = run.states
    ended = {c.id: done for c, _, done in trainer.log}
    for task, owners in (("x", [0, 3]), ("y", [1]), ("z", [])):
        j = before.clusters["xyz".index(task)]
        if not owners:
            assert same(now.experts[j], before.experts[j]) and same(now.routers[j], before.routers[j])
            continue
        w = [1.0 if uniform else setup.clients[i].num_examples for i in owners]
        for m in SHAPES:
            for got, parts in (
                (now.experts[j].A[m], [ended[i].slots[f"expert{j}"].A[m] for i in owners]),
                (now.experts[j].B[m], [ended[i].slots[f"expert{j}"].B[m] for i in owners]),
                (now.routers[j][m], [ended[i].gate.G[m] for i in owners]),
            ):
                mean = sum(x * p.numpy() for x, p in zip(w, parts, strict=True)) / sum(w)
                np.testing.assert_allclose(got, mean, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_with_one_expert_it_is_fedit_with_uniform_weights(count: int) -> None:
    """Forced, and by itself where there are at most two clients. The warm-up is FedIT's first round when it is as long."""
    settings = {"experts": 1} if count > 2 else {}
    setup = make_setup(make_clients([2] * count, examples=(20,)))
    method = FedLEASE(warmup=0.0, **settings)
    mine, theirs = (federate(each, setup, 4) for each in (method, FedIT()))
    for t in range(1, 5):
        model = deployed(method, mine.states[t], setup.clients[0])
        assert model.gate is None
        assert distance(dense(model, setup), dense(FedIT().deploy(theirs.states[t]), setup)) < 1e-12
    assert all(not reply.up.G for _, reply in mine.rounds[4])


def test_clients_that_are_all_alike_make_one_expert() -> None:
    method, setup = world(count=5)
    up = random_up(3)
    state, _ = founded(method, setup, [up] * 5)
    assert len(state.experts) == 1 and set(state.clusters.values()) == {0}
    zero = Up(up.A, {m: torch.zeros_like(x) for m, x in up.B.items()})
    assert len(founded(method, setup, [zero] * 5)[0].experts) == 1


def test_who_comes_late_warms_up_and_joins_the_nearest_experts_cluster() -> None:
    method, setup = world(min_clients=8)
    late = setup.clients[8]  # of task z
    trainer = Trainer(setup)
    run = federate(method, setup, 3, lambda t: setup.clients[: 9 if t > 1 else 8], trainer)
    assert late.id not in run.states[1].clusters and run.held[1][late.id] is not None
    assert method.send(run.states[1], late, 2).warmup and not method.send(run.states[1], late, 2).experts
    assert run.states[2].clusters[late.id] == run.states[2].clusters[2] and run.held[2][late.id] is None
    assert len(method.send(run.states[2], late, 3).experts) == 3
    without = method.aggregate(run.states[1], iter([r for _, r in run.rounds[2] if r.client != late]), 2)[0]
    assert same(without.experts, run.states[2].experts)  # it counts from its next round on


def test_modules_and_experts_with_zeros_and_two_digits_in_their_names_keep_apart() -> None:
    """The public code replaces every "0" in a name by the group's digit."""
    shapes = {"layers.0.q": (12, 8), "layers.10.q": (12, 8), "layers.20.up": (20, 12)}
    method, setup = world([(f"t{i}",) for i in range(12)], 12, shapes=shapes, experts=12)
    trainer = Trainer(setup)
    run = federate(method, setup, 2, trainer=trainer)
    state = run.states[2]
    assert sorted(set(state.clusters.values())) == list(range(12))
    for client in setup.clients:
        (done,) = [d for c, ask, d in trainer.log[12:] if c == client]
        own = state.clusters[client.id]
        assert list(done.slots) == [f"expert{j}" for j in range(12)]
        for m in shapes:
            np.testing.assert_allclose(state.experts[own].B[m], done.slots[f"expert{own}"].B[m], atol=1e-12)


def test_routers_are_alive_from_the_start() -> None:
    """From zero they would never move: all places chosen are the own expert's, whose weights sum to 1."""
    method, setup = world()
    run = federate(method, setup, 2)
    for before, now in zip(run.states[1].routers, run.states[2].routers, strict=True):
        for m in SHAPES:
            assert before[m].any() and float((now[m] - before[m]).abs().max()) > 1e-6
    assert same(run.states[1].routers[0], run.states[1].routers[1])  # one draw for all


def test_a_router_of_another_size_does_not_count_and_a_too_large_one_is_refused() -> None:
    method, setup = world()
    run = federate(method, setup, 1)
    state, client = run.states[1], setup.clients[0]
    good, _ = play(method, Trainer(setup), method.send(state, client, 1), None, client)
    mates = [c for c in setup.clients[1:] if state.clusters[c.id] == state.clusters[0]]
    honest = [Reply(c, play(method, Trainer(setup), method.send(state, c, 1), None, c)[0]) for c in mates]
    expected, _ = method.aggregate(state, iter(honest), 1)
    for G in ({}, {m: torch.cat([x, x[:2]]) for m, x in good.G.items()}):
        bad = replace(good, G=G)
        assert refuse(bad, method, setup, client) is None  # no check knows how many experts there are
        assert same(method.aggregate(state, iter([Reply(client, bad), *honest]), 1)[0].experts, expected.experts)
    huge = replace(good, G={m: x.repeat(4, 1) for m, x in good.G.items()})
    assert "places" in refuse(huge, method, setup, client)


def test_what_is_deployed() -> None:
    method, setup = world(renormalise=False)
    run = federate(method, setup, 2, lambda t: setup.clients[:8])
    state = run.states[2]
    for client in setup.clients[:8]:
        gate = deployed(method, state, client).gate
        assert isinstance(gate, Router) and gate.own == f"expert{state.clusters[client.id]}" and not gate.renormalise
        assert same(gate.G, state.routers[state.clusters[client.id]])
    sizes = [list(state.clusters.values()).count(j) for j in range(3)]
    assert method.deploy(state).gate.own == f"expert{sizes.index(max(sizes))}"
    assert not isinstance(method.deploy(state).gate, Mix)
    assert list(method.deploy(run.states[0]).slots) == [SHARED]


@pytest.mark.parametrize("bad", [{"min_clients": 0}, {"max_experts": 1}, {"experts": 0}, {"warmup": -0.1}, {"warmup": 1.5}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(BadInput):
        make("fedlease", bad)
