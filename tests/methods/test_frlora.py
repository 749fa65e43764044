"""FRLoRA (ICLR 2025). Modules: q (12, 8) and up (20, 12)."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from toy import Trainer, dense, dense_slot, federate, make_clients, make_setup, same

from fedlora import wire
from fedlora.methods.frlora import FRLoRA, Up, starting_factors
from fedlora.types import SHARED, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}
METHOD = FRLoRA()


def world(rank: int = 2, **options):
    return make_setup(make_clients((rank,) * 4), **options)


def test_the_start_is_the_principal_part_of_every_weight_and_the_function_is_unchanged():
    setup = world(3)
    state = METHOD.init(setup)
    start, change = state.start, dense(METHOD.deploy(state), setup)
    for m in SHAPES:
        U, S, Vt = np.linalg.svd(setup.base(m).numpy(), full_matrices=False)
        np.testing.assert_allclose(dense_slot(start, m), (U[:, :3] * S[:3]) @ Vt[:3], rtol=0, atol=1e-12)
        for gram in (start.B[m].T @ start.B[m], start.A[m] @ start.A[m].T):  # (S / s)^1/2 on either side, s = 4/3
            np.testing.assert_allclose(gram.numpy(), np.diag(S[:3] * 3 / 4), rtol=0, atol=1e-12)
        assert not change[f"{m}.weight"].any()


def test_clients_and_server_start_from_the_same_bits():
    setup = world()
    assert all(same(METHOD.hold(setup, c), METHOD.init(setup).start) for c in setup.clients)
    other = world(seed=1)
    assert not torch.equal(METHOD.hold(other, other.clients[0]).A["q"], METHOD.hold(setup, setup.clients[0]).A["q"])
    low = world(dtype=torch.float32)
    assert METHOD.hold(low, low.clients[0]).A["q"].dtype == torch.float32  # and not what was computed for another run


def test_every_round_starts_at_the_same_factors_and_the_residual_weights():
    setup = world()
    trainer = Trainer(setup)
    run = federate(METHOD, setup, 3, trainer=trainer)
    start = starting_factors(setup, 2)
    assert len(trainer.log) == 12
    for _, ask, done in trainer.log:
        assert same(ask.slots[SHARED], start) and not same(done.slots[SHARED], start)
    # The base of the last round, at every client: W - s B0 A0 and two rounds of s (B A - B0 A0).
    for m in SHAPES:
        want = -dense_slot(start, m)
        for t in (1, 2):
            A = start.A[m].numpy() + np.mean([reply.up.A[m].numpy() for _, reply in run.rounds[t]], axis=0)
            B = start.B[m].numpy() + np.mean([reply.up.B[m].numpy() for _, reply in run.rounds[t]], axis=0)
            want = want + 2.0 * B @ A - dense_slot(start, m)
        assert {version for version, _ in trainer.base.values()} == {3}
        for merged in trainer.merged.values():
            np.testing.assert_allclose(merged[m].numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_merged_is_the_product_of_the_means(uniform):
    setup, rng = world(), np.random.default_rng(0)
    method = FRLoRA(uniform_weights=uniform)
    state = method.init(setup)
    replies = [
        Reply(
            c,
            Up(
                {m: torch.tensor(rng.normal(size=(2, i))) for m, (_, i) in SHAPES.items()},
                {m: torch.tensor(rng.normal(size=(o, 2))) for m, (o, _) in SHAPES.items()},
            ),
        )
        for c in setup.clients
    ]
    w = np.array([1.0 if uniform else c.num_examples for c in setup.clients])
    got = dense(method.deploy(method.aggregate(state, iter(replies), 1)[0]), setup)
    for m in SHAPES:
        A = state.start.A[m].numpy() + np.tensordot(w / w.sum(), [r.up.A[m].numpy() for r in replies], 1)
        B = state.start.B[m].numpy() + np.tensordot(w / w.sum(), [r.up.B[m].numpy() for r in replies], 1)
        np.testing.assert_allclose(got[f"{m}.weight"], 2.0 * B @ A - dense_slot(state.start, m), rtol=0, atol=1e-12)


def test_the_sum_over_rounds_outgrows_the_rank_of_a_client():
    setup = world(1)
    run = federate(METHOD, setup, 4)
    ranks = [np.linalg.matrix_rank(dense(METHOD.deploy(s), setup)["up.weight"], tol=1e-9) for s in run.states]
    assert ranks[0] == 0 and ranks[1] == 2 and ranks[4] > 2 and all(a <= b for a, b in pairwise(ranks))


def test_what_clients_compute_themselves_is_not_sent():
    setup = world(1)
    run = federate(METHOD, setup, 2)
    first = METHOD.send(run.states[0], setup.clients[0], 1)
    assert wire.measure(first).numbers == 0 and (first.base.since, first.base.version) == (0, 1)
    late = METHOD.send(run.states[2], setup.clients[0], 3)  # was in round 2: knows versions 1 and 2
    assert (late.base.since, late.base.version) == (2, 3)
    start = run.states[0].start
    for m in SHAPES:
        assert late.base.pairs[0].A[m].shape[0] == 1
        assert not torch.equal(late.base.pairs[0].A[m], start.A[m])


def test_a_rank_above_the_smaller_side_has_nothing_to_add():
    setup = make_setup(make_clients((10, 10)))
    start = METHOD.init(setup).start
    assert start.B["q"].shape == (12, 10) and not start.B["q"][:, 8:].any()
    np.testing.assert_allclose(dense_slot(start, "q"), setup.base("q").numpy(), rtol=0, atol=1e-12)
