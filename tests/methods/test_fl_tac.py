"""FL-TAC (2404.15384): adapters find their cluster again, and every owner gets the mean of its own."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, deployed, distance, federate, make_clients, make_setup, play, same

from fedlora import wire
from fedlora.errors import BadInput
from fedlora.methods.fedit import FedIT
from fedlora.methods.fl_tac import FLTAC, Up
from fedlora.types import SHARED, ByDomain, Client, Factors, Reply

MIXED = [("x",), ("x", "y"), ("y", "z"), ("z",), ("x", "z"), ("y",)]


def world(tasks=MIXED, count=6, **settings):
    return FLTAC(**settings), make_setup(make_clients([2] * count, tasks=tasks))


def whole(f: Factors) -> np.ndarray:
    return np.concatenate([x.double().numpy().ravel() for part in (f.A, f.B) for x in part.values()])


def random_factors(setup, seed: int, spread: float = 1.0, around: Factors | None = None) -> Factors:
    g = torch.Generator().manual_seed(seed)

    def drawn(shape, centre):
        return spread * torch.randn(shape, generator=g, dtype=torch.float64) + (0.0 if centre is None else centre)

    A = {m: drawn((2, i), around and around.A[m]) for m, (_, i) in SHAPES.items()}
    B = {m: drawn((o, 2), around and around.B[m]) for m, (o, _) in SHAPES.items()}
    return Factors(A, B, setup.fresh(2).scale)


def upload(method, state, client: Client, adapters: list[Factors]) -> Reply:
    """What a client sends when its training ended with these adapters."""
    starts = method.send(state, client, 1).adapters
    A = {m: torch.stack([f.A[m] - s.A[m] for f, s in zip(adapters, starts, strict=True)]) for m in SHAPES}
    B = {m: torch.stack([f.B[m] - s.B[m] for f, s in zip(adapters, starts, strict=True)]) for m in SHAPES}
    return Reply(client, Up(A, B))


@pytest.mark.parametrize("uniform", [False, True])
def test_separated_tasks_are_recovered_and_averaged_by_their_examples(uniform: bool) -> None:
    method, setup = world(uniform_weights=uniform)
    state = method.init(setup)
    centres = {task: random_factors(setup, i) for i, task in enumerate("xyz")}
    made = {
        (c.id, task): random_factors(setup, 100 * c.id + ord(task), 0.02, centres[task])
        for c in setup.clients
        for task in c.domains
    }
    replies = [upload(method, state, c, [made[c.id, task] for task in c.domains]) for c in setup.clients]
    state, diagnostics = method.aggregate(state, iter(replies), 1)
    assert diagnostics["purity"] == diagnostics["adjusted_rand"] == 1.0
    for task in "xyz":
        owners = [c for c in setup.clients if task in c.domains]
        weights = [1.0 if uniform else c.domains[task] for c in owners]
        expected = sum(w * whole(made[c.id, task]) for w, c in zip(weights, owners, strict=True)) / sum(weights)
        for c in owners:
            place = list(c.domains).index(task)
            np.testing.assert_allclose(whole(method.send(state, c, 1).adapters[place]), expected, atol=1e-12)
            assert diagnostics["clusters"][str(c.id)][place] == state.clusters[c.id][place]


def test_weights_differ_between_the_two_means() -> None:
    results = []
    for uniform in (False, True):
        method, setup = world([("x",), ("y",)], 4, uniform_weights=uniform)
        run = federate(method, setup, 2)
        results.append(dense(deployed(method, run.states[-1], setup.clients[0]), setup))
    assert distance(*results) > 1e-3


def test_in_training_different_tasks_fall_apart() -> None:
    method, setup = world()
    run = federate(method, setup, 3)
    state, diagnostics = method.aggregate(run.states[2], iter([reply for _, reply in run.rounds[3]]), 3)
    assert diagnostics["purity"] == diagnostics["adjusted_rand"] == 1.0
    assert len({j for clusters in state.clusters.values() for j in clusters}) == 3


def test_a_message_holds_an_adapter_a_task_and_no_name_of_a_task() -> None:
    method, setup = world([("secret-one", "secret-two"), ("secret-two",)])
    run = federate(method, setup, 2)
    for exchanged in run.rounds[1:]:
        for order, reply in exchanged:
            assert all(len(x) == len(order.client.domains) for x in (*reply.up.A.values(), *reply.up.B.values()))
            assert [f.name for f in fields(reply.up)] == ["A", "B"]
            tree = wire.decode(wire.encode(reply.up), wire.message_classes(method))
            assert "secret" not in repr(tree) and set(tree.A) == set(SHAPES)


def test_each_adapter_trains_on_its_own_tasks_examples_only() -> None:
    method, setup = world()
    trainer = Trainer(setup)
    run = federate(method, setup, 0)
    client = setup.clients[1]
    play(method, trainer, method.send(run.states[0], client, 1), None, client)
    assert [ask.data for _, ask, _ in trainer.log] == ["x", "y"]
    assert all(list(ask.slots) == [SHARED] for _, ask, _ in trainer.log)


@pytest.mark.parametrize("who", [lambda t: [0, 1, 2, 3], lambda t: [[0, 1], [2, 3], [1, 3]][t % 3]], ids=["all", "some"])
def test_with_one_task_it_is_fedit(who) -> None:
    setup = make_setup(make_clients([2] * 4))
    runs = [federate(method, setup, 4, lambda t: [setup.clients[i] for i in who(t)]) for method in (FLTAC(), FedIT())]
    for mine, theirs in zip(*(run.states for run in runs), strict=True):
        for client in (None, *setup.clients):
            gap = distance(dense(deployed(FLTAC(), mine, client), setup), dense(FedIT().deploy(theirs), setup))
            assert gap < 1e-12


def test_names_of_clusters_do_not_depend_on_who_holds_what() -> None:
    """The same adapters under other owners: every owner gets the mean of what lay with its own."""
    method, setup = world([("x",), ("y",)], 6)
    state = method.init(setup)
    centres = [random_factors(setup, 1), random_factors(setup, 2)]
    made = [random_factors(setup, 50 + i, 0.05, centres[i % 2]) for i in range(6)]
    equal = [replace(c, num_examples=60, domains=dict.fromkeys(c.domains, 60)) for c in setup.clients]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 1, 4, 3, 0]):
        replies = [upload(method, state, c, [made[i]]) for c, i in zip(equal, order, strict=True)]
        after, _ = method.aggregate(state, iter(replies), 1)
        for c, i in zip(equal, order, strict=True):
            expected = np.mean([whole(made[j]) for j in range(6) if j % 2 == i % 2], axis=0)
            np.testing.assert_allclose(whole(method.send(after, c, 1).adapters[0]), expected, atol=1e-12)


# ---- some of the clients a round ----------------------------------------------------------------------------------------


def adapter(method, state, reply: Reply, place: int) -> Factors:
    """What a client's training of one of its tasks ended with."""
    start = method.send(state, reply.client, 1).adapters[place]
    A, B = ({m: x[m] + up[m][place] for m in SHAPES} for x, up in ((start.A, reply.up.A), (start.B, reply.up.B)))
    return Factors(A, B, start.scale)


def holds_others(method, before, after, replies: list[Reply], owners: list[Client]) -> dict[tuple[int, int], bool]:
    """Owner and place -> whether another task's adapter has a part in its mean, of those whose mean is another than before. Uploads
    are independent vectors, so what each contributed to a mean is found by least squares."""
    given = [(task, whole(adapter(method, before, r, i))) for r in replies for i, task in enumerate(r.client.domains)]
    vectors = np.stack([x for _, x in given], axis=1)
    assert np.linalg.matrix_rank(vectors) == len(given)
    out = {}
    for c in owners:
        for i, (task, had, has) in enumerate(
            zip(c.domains, method.send(before, c, 1).adapters, method.send(after, c, 1).adapters, strict=True)
        ):
            if not same(had, has):
                parts, *_ = np.linalg.lstsq(vectors, whole(has), rcond=None)
                np.testing.assert_allclose(vectors @ parts, whole(has), atol=1e-9)
                out[c.id, i] = any(abs(p) > 1e-6 for p, (other, _) in zip(parts, given, strict=True) if other != task)
    return out


@pytest.mark.parametrize(("tasks", "count", "a_round"), [("xyz", 12, 4), ("xyz", 12, 6), ("xy", 8, 4)])
def test_with_sampling_nobody_holds_another_tasks_adapter_and_who_sat_out_holds_what_it_held(tasks, count, a_round) -> None:
    """Also after rounds that lack a task, in which K-means splits the others."""
    lacking = 0
    for seed in (3, 5):
        method, setup = FLTAC(), make_setup(make_clients([2] * count, tasks=[(t,) for t in tasks]), seed=seed)

        def sample(t: int, setup=setup, seed=seed) -> list[Client]:
            return [setup.clients[i] for i in np.random.default_rng([seed, t]).permutation(count)[:a_round]]

        run, wrong = federate(method, setup, 10, sample), {}
        replies = [[reply for _, reply in played] for played in run.rounds]
        here = [{r.client.id for r in played} for played in replies]
        for t in range(1, 11):
            owners = [c for c in setup.clients if c.id in set().union(*here[: t + 1])]
            wrong |= holds_others(method, run.states[t - 1], run.states[t], replies[t], owners)
            assert sum(wrong.values()) / len(wrong) == 0.0, f"seed {seed}, round {t}"
            lacking += len({task for r in replies[t] for task in r.client.domains}) < len(tasks)
        for t in range(1, 11):
            before, after = run.states[t - 1], run.states[t]
            for c in (c for c in setup.clients if c.id not in here[t]):
                assert same(method.send(after, c, 1), method.send(before, c, 1))
                assert same(deployed(method, after, c), deployed(method, before, c))
            # Every mean that is held is there once, and no other.
            held = {id(f) for c in setup.clients if c.id in after.clusters for f in method.send(after, c, 1).adapters}
            assert held == {id(mean.adapter) for mean in after.means} and len(held) == len(after.means)
        _, diagnostics = method.aggregate(run.states[9], iter(replies[10]), 10)
        assert (diagnostics["purity"], diagnostics["mixed"]) == (1.0, 0.0)
        assert sorted(map(int, diagnostics["clusters"])) == sorted(set().union(*here))
    assert lacking > 0


def test_clustering_distances_would_tell_old_from_new() -> None:
    """The paper's vectors, where clients take part unequally often."""
    setup = make_setup(make_clients([2] * 12, tasks=[("x",), ("y",), ("z",)]))
    mixed = []
    for by_direction in (True, False):
        method = FLTAC(by_direction=by_direction)
        run = federate(method, setup, 3, lambda t: [setup.clients[i] for i in np.random.default_rng([0, t]).permutation(12)[:6]])
        mixed.append(method.aggregate(run.states[2], iter([reply for _, reply in run.rounds[3]]), 3)[1]["mixed"])
    assert mixed[0] == 0.0 < mixed[1]


def test_diagnostics_tell_the_truth_about_all_owners() -> None:
    """Owners 0 of x and 1 of y upload what is alike, and so do 2 of x and 3 of y. Then 0 is alone, and gets its own back: its
    mean is pure again, while 1 still holds one that is half of another task."""
    method, setup = world([("x",), ("y",)], 4, uniform_weights=True)
    state = method.init(setup)
    centres = [random_factors(setup, 1), random_factors(setup, 1), random_factors(setup, 2), random_factors(setup, 2)]
    made = [random_factors(setup, 10 + i, 0.01, centre) for i, centre in enumerate(centres)]
    replies = [upload(method, state, c, [f]) for c, f in zip(setup.clients, made, strict=True)]
    state, diagnostics = method.aggregate(state, iter(replies), 1)
    assert (diagnostics["purity"], diagnostics["mixed"]) == (0.5, 1.0)
    assert diagnostics["adjusted_rand"] == pytest.approx((0 - 2 * 2 / 6) / (2 - 2 * 2 / 6))  # no pair of six is together in both
    state, diagnostics = method.aggregate(state, iter([upload(method, state, setup.clients[0], [random_factors(setup, 3)])]), 1)
    assert diagnostics["purity"] == pytest.approx((1 + 3 * 0.5) / 4) and diagnostics["mixed"] == 3 / 4
    assert sorted(diagnostics["clusters"]) == ["0", "1", "2", "3"]
    # One of x and one of y, who have different weights, are all there is in a cluster: the shares are those of the mean.
    weighted, state = FLTAC(), method.init(setup)
    sizes = [c.num_examples for c in setup.clients]
    _, diagnostics = weighted.aggregate(
        state, iter([upload(method, state, c, [f]) for c, f in zip(setup.clients, made, strict=True)]), 1
    )
    shares = [sizes[i] / (sizes[i] + sizes[i ^ 1]) for i in range(4)]
    assert diagnostics["purity"] == pytest.approx(np.mean(shares))


def test_no_more_adapters_than_clusters_are_each_their_own() -> None:
    method, setup = world([("x",), ("y",), ("z",)], 3)
    state = method.init(setup)
    made = [random_factors(setup, 1), random_factors(setup, 2, 0.001, random_factors(setup, 1)), random_factors(setup, 3)]
    state, _ = method.aggregate(state, iter([upload(method, state, c, [f]) for c, f in zip(setup.clients, made, strict=True)]), 1)
    for c, f in zip(setup.clients, made, strict=True):
        np.testing.assert_allclose(whole(method.send(state, c, 1).adapters[0]), whole(f), atol=1e-12)


def test_a_newcomer_starts_from_the_seeds_adapter_and_the_common_model_is_the_mean_of_all_that_is_held() -> None:
    method, setup = world([("x",), ("y",)], 4)
    run = federate(method, setup, 2, lambda t: setup.clients[:3])
    state = run.states[2]
    assert same(method.send(state, setup.clients[3], 1).adapters, (setup.fresh(2),))
    assert same(deployed(method, state, setup.clients[3]).slots, {SHARED: setup.fresh(2)})
    held = [whole(f) for c in setup.clients[:3] for f in method.send(state, c, 1).adapters]
    np.testing.assert_allclose(whole(method.deploy(state).slots[SHARED]), np.mean(held, axis=0), atol=1e-12)


def test_every_client_is_evaluated_with_its_own_adapters() -> None:
    method, setup = world()
    run = federate(method, setup, 2)
    state, client = run.states[2], setup.clients[2]
    model = deployed(method, state, client)
    assert isinstance(model.gate, ByDomain) and list(model.gate.slots) == ["y", "z"]
    for task, start in zip(client.domains, method.send(state, client, 1).adapters, strict=True):
        assert same(model.slots[model.gate.slots[task]], start)
    single = deployed(method, state, setup.clients[0])
    assert single.gate is None and same(list(single.slots.values()), list(method.send(state, setup.clients[0], 1).adapters))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput):
        FLTAC(tries=0)
