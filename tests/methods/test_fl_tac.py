"""FL-TAC (2404.15384): adapters find their cluster again, and every owner gets the mean of its own."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, distance, federate, make_clients, make_setup, play, same

from fedlora.engine import wire
from fedlora.errors import BadInput
from fedlora.methods.fedit import FedIT
from fedlora.methods.fl_tac import FLTAC, Up
from fedlora.types import SHARED, ByTask, Client, Factors, Reply

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
    starts = method.send(state, client).adapters
    A = {m: torch.stack([f.A[m] - s.A[m] for f, s in zip(adapters, starts, strict=True)]) for m in SHAPES}
    B = {m: torch.stack([f.B[m] - s.B[m] for f, s in zip(adapters, starts, strict=True)]) for m in SHAPES}
    return Reply(client, Up(A, B))


@pytest.mark.parametrize("uniform", [False, True])
def test_separated_tasks_are_recovered_and_averaged_by_their_examples(uniform: bool) -> None:
    method, setup = world(uniform_weights=uniform)
    state = method.init(setup)
    centres = {task: random_factors(setup, i) for i, task in enumerate("xyz")}
    made = {
        (c.id, task): random_factors(setup, 100 * c.id + ord(task), 0.02, centres[task]) for c in setup.clients for task in c.tasks
    }
    replies = [upload(method, state, c, [made[c.id, task] for task in c.tasks]) for c in setup.clients]
    state, diagnostics = method.aggregate(state, iter(replies))
    assert diagnostics["purity"] == diagnostics["adjusted_rand"] == 1.0
    for task in "xyz":
        owners = [c for c in setup.clients if task in c.tasks]
        weights = [1.0 if uniform else c.tasks[task] for c in owners]
        expected = sum(w * whole(made[c.id, task]) for w, c in zip(weights, owners, strict=True)) / sum(weights)
        for c in owners:
            place = list(c.tasks).index(task)
            np.testing.assert_allclose(whole(method.send(state, c).adapters[place]), expected, atol=1e-12)
            assert diagnostics["clusters"][str(c.id)][place] == state.clusters[c.id][place]


def test_weights_differ_between_the_two_means() -> None:
    results = []
    for uniform in (False, True):
        method, setup = world([("x",), ("y",)], 4, uniform_weights=uniform)
        run = federate(method, setup, 2)
        results.append(dense(method.deploy(run.states[-1], setup.clients[0]), setup))
    assert distance(*results) > 1e-3


def test_in_training_different_tasks_fall_apart() -> None:
    method, setup = world()
    run = federate(method, setup, 3)
    state, diagnostics = method.aggregate(run.states[2], iter([reply for _, reply in run.rounds[3]]))
    assert diagnostics["purity"] == diagnostics["adjusted_rand"] == 1.0
    assert len({j for clusters in state.clusters.values() for j in clusters}) == 3


def test_a_message_holds_an_adapter_a_task_and_no_name_of_a_task() -> None:
    method, setup = world([("secret-one", "secret-two"), ("secret-two",)])
    run = federate(method, setup, 2)
    for exchanged in run.rounds[1:]:
        for order, reply in exchanged:
            assert all(len(x) == len(order.client.tasks) for x in (*reply.up.A.values(), *reply.up.B.values()))
            assert [f.name for f in fields(reply.up)] == ["A", "B"]
            tree = wire.decode(wire.encode(reply.up), wire.message_classes(method))
            assert "secret" not in repr(tree) and set(tree.A) == set(SHAPES)


def test_each_adapter_trains_on_its_own_tasks_examples_only() -> None:
    method, setup = world()
    trainer = Trainer(setup)
    run = federate(method, setup, 0)
    client = setup.clients[1]
    play(method, trainer, method.send(run.states[0], client), None, client)
    assert [ask.data for _, ask, _ in trainer.log] == ["x", "y"]
    assert all(list(ask.slots) == [SHARED] for _, ask, _ in trainer.log)


@pytest.mark.parametrize("who", [lambda t: [0, 1, 2, 3], lambda t: [[0, 1], [2, 3], [1, 3]][t % 3]], ids=["all", "some"])
def test_with_one_task_it_is_fedit(who) -> None:
    setup = make_setup(make_clients([2] * 4))
    runs = [federate(method, setup, 4, lambda t: [setup.clients[i] for i in who(t)]) for method in (FLTAC(), FedIT())]
    for mine, theirs in zip(*(run.states for run in runs), strict=True):
        for client in (None, *setup.clients):
            gap = distance(dense(FLTAC().deploy(mine, client), setup), dense(FedIT().deploy(theirs), setup))
            assert gap < 1e-12


def test_names_of_clusters_do_not_depend_on_who_holds_what() -> None:
    """The same adapters under other owners: every owner gets the mean of what lay with its own."""
    method, setup = world([("x",), ("y",)], 6)
    state = method.init(setup)
    centres = [random_factors(setup, 1), random_factors(setup, 2)]
    made = [random_factors(setup, 50 + i, 0.05, centres[i % 2]) for i in range(6)]
    equal = [replace(c, num_examples=60, tasks=dict.fromkeys(c.tasks, 60)) for c in setup.clients]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 1, 4, 3, 0]):
        replies = [upload(method, state, c, [made[i]]) for c, i in zip(equal, order, strict=True)]
        after, _ = method.aggregate(state, iter(replies))
        for c, i in zip(equal, order, strict=True):
            expected = np.mean([whole(made[j]) for j in range(6) if j % 2 == i % 2], axis=0)
            np.testing.assert_allclose(whole(method.send(after, c).adapters[0]), expected, atol=1e-12)


def test_clusters_go_on_over_the_rounds_and_an_empty_one_keeps_its_mean() -> None:
    """In round 2 only owners of x are there, and their adapters moved a little: y's owners find y as it was."""
    method, setup = world([("x",), ("y",)], 4)
    run = federate(method, setup, 1)
    one = run.states[1]
    xs, ys = ([c for c in setup.clients if task in c.tasks] for task in "xy")
    near = [random_factors(setup, 9, 0.001, method.send(one, c).adapters[0]) for c in xs]
    replies = [upload(method, one, xs[0], [near[0]])]
    two, _ = method.aggregate(one, iter(replies))
    np.testing.assert_allclose(whole(method.send(two, xs[0]).adapters[0]), whole(near[0]), atol=1e-12)
    assert same(method.send(two, xs[1]), method.send(two, xs[0]))  # sat out, and its cluster went on without it
    for c in ys:
        assert same(method.send(two, c), method.send(one, c))


def test_no_more_adapters_than_clusters_are_each_their_own() -> None:
    method, setup = world([("x",), ("y",), ("z",)], 3)
    state = method.init(setup)
    made = [random_factors(setup, 1), random_factors(setup, 2, 0.001, random_factors(setup, 1)), random_factors(setup, 3)]
    state, _ = method.aggregate(state, iter([upload(method, state, c, [f]) for c, f in zip(setup.clients, made, strict=True)]))
    for c, f in zip(setup.clients, made, strict=True):
        np.testing.assert_allclose(whole(method.send(state, c).adapters[0]), whole(f), atol=1e-12)


def test_a_newcomer_starts_from_the_mean_of_all_clusters() -> None:
    method, setup = world([("x",), ("y",)], 4)
    run = federate(method, setup, 2, lambda t: setup.clients[:3])
    down = method.send(run.states[2], setup.clients[3])
    np.testing.assert_allclose(whole(down.adapters[0]), np.mean([whole(f) for f in run.states[2].means], axis=0), atol=1e-12)


def test_every_client_is_evaluated_with_its_own_adapters() -> None:
    method, setup = world()
    run = federate(method, setup, 2)
    state, client = run.states[2], setup.clients[2]
    model = method.deploy(state, client)
    assert isinstance(model.gate, ByTask) and list(model.gate.slots) == ["y", "z"]
    for task, start in zip(client.tasks, method.send(state, client).adapters, strict=True):
        assert same(model.slots[model.gate.slots[task]], start)
    single = method.deploy(state, setup.clients[0])
    assert single.gate is None and same(list(single.slots.values()), list(method.send(state, setup.clients[0]).adapters))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput):
        FLTAC(tries=0)
