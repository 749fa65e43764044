"""SLoRA (2308.06522): what stage 1 may move, the switch against numpy's SVD, transposed weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, federate, make_clients, make_setup, same, tensors

from fedlora.methods import make
from fedlora.methods.slora import SLoRA
from fedlora.types import BASE

METHOD = SLoRA(density=0.1, sparse_share=0.75)  # of 4 rounds: 3
FREE = {"q": 10, "up": 24}  # of 96 and 240


def world(**options):
    return make_setup(make_clients((2, 2, 2, 2)), **options)


def test_stage_one_moves_the_same_free_entries_of_every_client_and_nothing_else():
    setup = world()
    for optimizer in ("sgd", "adamw"):
        trainer = Trainer(setup, optimizer=optimizer, weight_decay=0.5)
        federate(METHOD, setup, 3, trainer=trainer)
        places = set()
        assert len(trainer.log) == 12
        for _, ask, done in trainer.log:
            assert ask.roles == {(BASE, "W")} and not ask.slots and not done.slots
            assert set(done.full) == {"q.weight", "up.weight"}  # no bias
            masks = {m: ask.mask[BASE, "W"][f"{m}.weight"] for m in SHAPES}
            assert {m: int(mask.sum()) for m, mask in masks.items()} == FREE
            places.add(b"".join(mask.numpy().tobytes() for mask in masks.values()))
            for m, mask in masks.items():
                assert not done.full[f"{m}.weight"][~mask].any() and done.full[f"{m}.weight"][mask].all()
        assert len(places) == 1


def test_places_come_from_the_seed():
    def places(seed):
        trainer = Trainer(world(seed=seed))
        federate(METHOD, trainer.setup, 1, trainer=trainer)
        return trainer.log[0][1].mask[BASE, "W"]["q.weight"]

    assert torch.equal(places(0), places(0)) and not torch.equal(places(0), places(1))


def test_in_stage_one_the_model_is_the_weighted_mean_of_the_clients():
    setup = world()
    trainer = Trainer(setup)
    run = federate(METHOD, setup, 2, trainer=trainer)
    n = np.array([c.num_examples for c in setup.clients])
    for t in (1, 2):
        trained = [done.full["up.weight"].numpy() for _, _, done in trainer.log[4 * (t - 1) : 4 * t]]
        expected = np.einsum("k,koi->oi", n / n.sum(), np.stack(trained))
        np.testing.assert_allclose(dense(METHOD.deploy(run.states[t]), setup)["up.weight"], expected, atol=1e-12)
        assert not METHOD.deploy(run.states[t]).slots


@pytest.mark.parametrize("rank", [1, 2, 8, 12])
def test_at_the_switch_the_adapter_is_the_best_of_its_rank_and_the_weights_go_back(rank):
    setup = make_setup(make_clients((rank,) * 2))
    trainer = Trainer(setup)
    run = federate(METHOD, setup, 3, trainer=trainer)
    last = {c.id: done.full for c, _, done in trainer.log[-2:]}
    model = METHOD.deploy(run.states[3])
    assert not model.full and not model.base.pairs and not model.base.dense
    for m in SHAPES:
        ideal = (10 * last[0][f"{m}.weight"].numpy() + 40 * last[1][f"{m}.weight"].numpy()) / 50
        U, S, Vt = np.linalg.svd(ideal, full_matrices=False)
        got = dense(model, setup)[f"{m}.weight"]
        np.testing.assert_allclose(got, (U[:, :rank] * S[:rank]) @ Vt[:rank], atol=1e-10)
        np.testing.assert_allclose(((got - ideal) ** 2).sum(), (S[rank:] ** 2).sum(), atol=1e-10)
        A = run.states[3].shared.A[m].numpy()
        alive = min(rank, A.shape[1])  # every rank that there is room for can train
        np.testing.assert_allclose(A[:alive] @ A[:alive].T, np.eye(alive), atol=1e-10)
    assert run.states[3].shared.scale == 4.0 / rank and not run.states[3].W


def test_a_weight_that_is_stored_the_other_way_round_gives_the_same_function():
    """As GPT-2's; with a square module, where no shape can tell."""
    shapes = {"m": (6, 6)}
    plain = make_setup(make_clients((2, 2)), shapes=shapes)
    turned = replace(plain, transposed=frozenset({"m"}))
    method = SLoRA(density=0.3, sparse_share=0.75)
    for setup, flip in ((plain, False), (turned, True)):
        run = federate(method, setup, 3)
        before = run.states[2]
        stage1 = dense(method.deploy(before), setup)["m.weight"]
        replies = [r for _, r in run.rounds[3]]
        still = [replace(r, up=replace(r.up, W={"m": torch.zeros_like(r.up.W["m"])})) for r in replies]
        state, _ = method.aggregate(before, iter(still), 3)
        U, S, Vt = np.linalg.svd(stage1.T if flip else stage1)
        np.testing.assert_allclose(dense(method.deploy(state), setup)["m.weight"], (U[:, :2] * S[:2]) @ Vt[:2], atol=1e-10)


def test_after_the_switch_it_is_fedit():
    setup = world()
    run = federate(METHOD, setup, 3)
    one = federate(METHOD, setup, 5, resume=(3, run.states[3], run.held[3]))
    fedit = make("fedit", {})
    two = federate(fedit, setup, 5, resume=(3, run.states[3].shared, dict.fromkeys(range(4))))
    assert same(one.states[-1].shared, two.states[-1])


def test_places_never_travel():
    run = federate(METHOD, world(), 3)
    for order, reply in (pair for exchanged in run.rounds for pair in exchanged):
        assert all(x.dtype.is_floating_point for x in tensors((order.down, reply.up)))


@pytest.mark.parametrize(
    "rounds, share, expected", [(1, 0.5, 0), (2, 0.1, 1), (10, 0.1, 1), (50, 0.1, 5), (4, 1.0, 3), (9, 0.0, 0)]
)
def test_stage_one_is_a_share_of_the_rounds_but_never_all(rounds, share, expected):
    assert SLoRA(sparse_share=share).init(world(rounds=rounds)).sparse_rounds == expected


@pytest.mark.parametrize("settings", [{"density": 0.0}, {"density": 1.5}, {"sparse_share": -0.1}, {"sparse_share": 1.1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="lies in"):
        make("slora", settings)
