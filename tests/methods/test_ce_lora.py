"""CE-LoRA (2503.23869). Modules: q (12, 8) and up (20, 12); rank 2."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Trainer, dense, deployed, distance, federate, make_clients, make_setup, same, tensors

from fedlora import wire
from fedlora.check import refuse
from fedlora.errors import BadInput
from fedlora.methods import make
from fedlora.methods.ce_lora import CELoRA, Combination, Down, Up
from fedlora.types import SHARED, ClassMixtures, Observe, Reply

CLIENTS = make_clients((2, 2, 2, 2))
SETUP = make_setup(CLIENTS)


def world_with(seed: int, shift=(0.0, 0.0, 1.0, 5.0), **settings):
    """A server that hears of four clients: (method, state, replies). Client i's one class has the mean (shift[i], 0)."""
    method, rng = CELoRA(components=1, **settings), np.random.default_rng(seed)
    state, replies = method.init(SETUP), []
    for client, x in zip(CLIENTS, shift, strict=True):
        mixtures = {
            "shares": torch.ones(1).double(),
            "weights": torch.ones(1, 1).double(),
            "means": torch.tensor([[[x, 0.0]]]).double(),
            "variances": torch.ones(1, 1, 2).double(),
        }
        C = {m: torch.from_numpy(rng.normal(size=(2, 2))) for m in SETUP.shapes}
        replies.append(Reply(client, Up(C, mixtures)))
    return method, state, replies


def C_of(replies) -> list[dict[str, np.ndarray]]:
    """What clients uploaded were changes of the identity."""
    return [{m: np.eye(2) + x.numpy() for m, x in r.up.C.items()} for r in replies]


def explicit_weights(combination: Combination, replies, shift) -> np.ndarray:
    C, n = C_of(replies), len(replies)
    M, D = np.zeros((n, n)), np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            each = [
                np.linalg.norm(a[m] @ b[m].T) ** 2 / np.linalg.norm(a[m] @ a[m].T) / np.linalg.norm(b[m] @ b[m].T)
                for a, b in [(C[i], C[j])]
                for m in a
            ]
            M[i, j] = np.mean(each)
            D[i, j] = 1 - (shift[i] - shift[j]) ** 2 / 25  # equal variances: the squared distance of the means
    S = {"sum": D + M, "product": D * M, "data": D, "model": M}[combination.value]
    return S / S.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("combination", list(Combination))
def test_every_client_gets_the_mean_of_those_like_it(combination):
    shift = (0.0, 0.0, 1.0, 5.0)
    method, state, replies = world_with(1, shift, combination=combination)
    state, diagnostics = method.aggregate(state, iter(replies), 1)
    expected = explicit_weights(combination, replies, shift)
    np.testing.assert_allclose(diagnostics["mixing"], expected, atol=1e-9)
    assert diagnostics["mixing_clients"].tolist() == diagnostics["mixing_known"].tolist() == [0, 1, 2, 3]
    C = C_of(replies)
    for client, row in zip(CLIENTS, expected, strict=True):
        down = method.send(state, client, 1)
        for m in SETUP.shapes:
            np.testing.assert_allclose(down.C[m], sum(w * c[m] for w, c in zip(row, C, strict=True)), atol=1e-9)


def test_one_client_among_strangers_trains_alone():
    """S = I: what comes back is what went up."""
    far = 1e3
    method, state, replies = world_with(2, (0.0, 0.0, 0.0, far), combination=Combination.DATA)
    state, diagnostics = method.aggregate(state, iter(replies), 1)
    np.testing.assert_allclose(diagnostics["mixing"][3], [0, 0, 0, 1], atol=1e-12)
    for m, C in C_of(replies)[3].items():
        np.testing.assert_allclose(state.means[3][m], C, atol=1e-12)


def test_equal_similarities_average_C():
    method, state, replies = world_with(2, (0.0, 0.0, 0.0, 0.0), combination=Combination.DATA)
    state, _ = method.aggregate(state, iter(replies), 1)
    for m in SETUP.shapes:
        mean = np.mean([c[m] for c in C_of(replies)], axis=0)
        assert all(np.allclose(state.means[i][m], mean, atol=1e-12) for i in range(4))


def test_a_stranger_starts_from_the_plain_mean_of_all_known_C():
    method, state, replies = world_with(3)
    first, _ = method.aggregate(state, iter(replies[:3]), 1)
    C = C_of(replies)
    for m, mean in method.send(first, CLIENTS[3], 1).C.items():
        np.testing.assert_allclose(mean, np.mean([c[m] for c in C[:3]], axis=0), atol=1e-12)
    assert method.send(first, CLIENTS[3], 1).wants_mixtures and not method.send(first, CLIENTS[0], 1).wants_mixtures
    second, _ = method.aggregate(first, iter([replies[2]]), 1)  # one of three: the others count by what they sent last
    moved = {m: first.means[2][m].numpy() + x.numpy() for m, x in replies[2].up.C.items()}
    for m, mean in method.send(second, CLIENTS[3], 1).C.items():
        np.testing.assert_allclose(mean, np.mean([C[0][m], C[1][m], moved[m]], axis=0), atol=1e-12)


@pytest.mark.parametrize("combination", list(Combination))
def test_who_sat_out_keeps_its_C_and_counts_in_the_others_by_its_last(combination):
    """Four were here; then only client 2, which does not move: its new C is a mean of all four, and theirs are as they were."""
    shift = (0.0, 0.0, 1.0, 5.0)
    method, state, replies = world_with(3, shift, combination=combination)
    first, _ = method.aggregate(state, iter(replies), 1)
    zero = {m: torch.zeros(2, 2).double() for m in SETUP.shapes}
    second, diagnostics = method.aggregate(first, iter([Reply(CLIENTS[2], Up(zero))]), 1)
    held = {c.id: method.hold(SETUP, c) for c in CLIENTS}
    for c in (CLIENTS[0], CLIENTS[1], CLIENTS[3]):
        assert same(method.send(second, c, 1), method.send(first, c, 1))
        assert same(deployed(method, second, c, held[c.id]), deployed(method, first, c, held[c.id]))
    C = C_of(replies)
    C[2] = {m: x.numpy() for m, x in first.means[2].items()}  # it started there
    again = [replace(r, up=Up({m: torch.from_numpy(c[m] - np.eye(2)) for m in c})) for r, c in zip(replies, C, strict=True)]
    row = explicit_weights(combination, again, shift)[2]
    np.testing.assert_allclose(diagnostics["mixing"], row[None], atol=1e-9)
    assert diagnostics["mixing_clients"].tolist() == [2] and diagnostics["mixing_known"].tolist() == [0, 1, 2, 3]
    for m in SETUP.shapes:
        np.testing.assert_allclose(
            method.send(second, CLIENTS[2], 1).C[m], sum(w * c[m] for w, c in zip(row, C, strict=True)), atol=1e-9
        )
    assert second.distances == first.distances and len(first.distances) == (0 if combination is Combination.MODEL else 6)


def test_what_a_client_must_send():
    method, state, replies = world_with(3)
    first, _ = method.aggregate(state, iter(replies[:3]), 1)
    sends = method.FACTS.sends
    assert sends(method, first, CLIENTS[3], 2) == {"C", "mixtures"} and sends(method, first, CLIENTS[0], 2) == {"C"}
    only_models = CELoRA(combination=Combination.MODEL)
    assert only_models.FACTS.sends(only_models, only_models.init(SETUP), CLIENTS[0], 1) == {"C"}


def test_a_client_without_classes_is_as_far_as_the_farthest():
    method, state, replies = world_with(4, combination=Combination.DATA)
    none = {name: x[:0] for name, x in replies[1].up.mixtures.items()}
    replies[1] = replace(replies[1], up=replace(replies[1].up, mixtures=none))
    assert refuse(replies[1].up, method, SETUP, CLIENTS[1]) is None
    state, diagnostics = method.aggregate(state, iter(replies), 1)
    np.testing.assert_allclose(diagnostics["mixing"][1], [0, 1, 0, 0])
    assert not method.send(state, CLIENTS[1], 1).wants_mixtures


def test_a_row_without_any_similarity_is_uniform():
    """C = 0 is like nothing, not even itself."""
    method, state, replies = world_with(4, combination=Combination.MODEL)
    replies[1] = replace(replies[1], up=Up({m: -torch.eye(2).double() for m in SETUP.shapes}))
    _, diagnostics = method.aggregate(state, iter(replies), 1)
    np.testing.assert_allclose(diagnostics["mixing"][1], [0.25] * 4)


def test_a_reply_without_the_mixtures_that_were_wanted_counts_by_its_model():
    method, state, replies = world_with(5)
    replies[2] = replace(replies[2], up=Up(replies[2].up.C))
    state, diagnostics = method.aggregate(state, iter(replies), 1)
    assert torch.isfinite(diagnostics["mixing"]).all() and method.send(state, CLIENTS[2], 1).wants_mixtures
    again, _ = method.aggregate(state, iter(world_with(5)[2]), 1)
    assert set(again.distances) == {(i, j) for j in range(4) for i in range(j)}


def test_all_three_factors_train_and_A_and_B_stay():
    """C alone would never learn: its gradient is B' ... A' and B starts at zero."""
    method = CELoRA()
    g = method.local(Down(method.init(SETUP).shared.C, wants_mixtures=True), method.hold(SETUP, CLIENTS[1]), CLIENTS[1], 1)
    trainer = Trainer(SETUP)
    assert next(g) == Observe(ClassMixtures(3), pool="first")
    ask = g.send(trainer(CLIENTS[1], Observe(ClassMixtures(3))))
    assert ask.roles == {(SHARED, role) for role in "ABC"}
    assert all(torch.equal(C, torch.eye(2).double()) for C in ask.slots[SHARED].C.values())
    with pytest.raises(StopIteration) as end:
        g.send(trainer(CLIENTS[1], ask))
    up, held = end.value.value
    assert all(x.abs().max() > 0 for x in held.B.values()) and not held.C
    sent = {x.data_ptr() for x in tensors(up)}
    assert not sent & {x.data_ptr() for x in tensors(held)}
    assert {tuple(x.shape) for x in up.C.values()} == {(2, 2)}
    assert up.mixtures["shares"].sum() == pytest.approx(1.0)


def test_personal_models_differ_in_everything_and_the_shared_one_changes_nothing():
    method = CELoRA()
    run = federate(method, SETUP, 3)
    state, held = run.states[-1], run.held[-1]
    zero = dense(method.deploy(method.init(SETUP)), SETUP)
    assert distance(dense(method.deploy(state), SETUP), zero) == 0.0
    slots = [deployed(method, state, c, held[c.id]).slots[SHARED] for c in CLIENTS]
    for role in "ABC":
        assert len({tuple(slot.role(role)["up"].flatten().tolist()) for slot in slots}) == 4
    assert distance(dense(deployed(method, state, CLIENTS[0], method.hold(SETUP, CLIENTS[0])), SETUP), zero) == 0.0


def test_a_message_is_r_squared_a_module_and_mixtures_come_once():
    run = federate(CELoRA(), SETUP, 3)
    for t in (1, 2, 3):
        for order, reply in run.rounds[t]:
            assert wire.measure(order.down).numbers == 2 * 4
            assert wire.measure(reply.up).numbers == 2 * 4 + (2 * 3 * (2 * 8 + 1) + 2 if t == 1 else 0)
    only_models = federate(CELoRA(combination=Combination.MODEL), SETUP, 1)
    assert all(wire.measure(reply.up).numbers == 8 for _, reply in only_models.rounds[1])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x: {k: v for k, v in x.items() if k != "means"}, "lacks 'means'"),
        (lambda x: x | {"labels": torch.ones(1)}, "unexpected"),
        (lambda x: x | {"means": x["means"] * torch.nan}, "finite"),
        (lambda x: x | {"weights": torch.ones(1, 2)}, "'part' is 2, expected 1"),
        (lambda x: x | {"shares": torch.ones(2)}, "'class' is 1, expected 2"),
        (lambda x: x | {"variances": torch.ones(1, 1)}, "axes"),
        (lambda x: x | {"shares": [1.0]}, "not a tensor"),
        (lambda x: [x], "not a mapping"),
    ],
)
def test_bad_mixtures_are_refused(change, word):
    method, _, replies = world_with(1)
    up = replies[0].up
    assert refuse(up, method, SETUP, CLIENTS[0]) is None
    assert word in refuse(replace(up, mixtures=change(up.mixtures)), method, SETUP, CLIENTS[0])
    assert "empty" in refuse(replace(up, C={}), method, SETUP, CLIENTS[0])


def test_settings():
    with pytest.raises(BadInput, match="components"):
        make("ce-lora", {"components": 4})
