"""FLoRA (2409.05976). Modules: q (12, 8) and up (20, 12)."""

import numpy as np
import pytest
import torch
from toy import Trainer, dense, federate, make_clients, make_setup, same

from fedlora.methods.flora import FLoRA, Up, draw
from fedlora.types import SHARED, Client, Reply

SHAPES = {"q": (12, 8), "up": (20, 12)}
METHOD = FLoRA()


def uploads(setup, seed: int = 0, order: str = "C"):
    rng = np.random.default_rng(seed)
    for c in setup.clients:
        A = {m: torch.tensor(rng.normal(size=(c.rank, i))) for m, (_, i) in SHAPES.items()}
        B = {m: torch.tensor(rng.normal(size=(o, c.rank))) for m, (o, _) in SHAPES.items()}
        yield Reply(c, Up(A, B))


@pytest.mark.parametrize("ranks", [(1, 2, 4), (2, 2), (8, 3, 8), (1,)], ids=str)
def test_the_base_takes_up_the_weighted_sum_of_all_products(ranks):
    """s_k = 4 / r_k and w_k = n_k / n, each exactly once; also where the stack is wider than a module."""
    setup = make_setup(make_clients(ranks, (10, 30, 60)))
    replies = list(uploads(setup))
    state, _ = METHOD.aggregate(METHOD.init(setup), iter(replies), 1)
    got, n = dense(METHOD.deploy(state), setup), sum(r.client.num_examples for r in replies)
    for m in SHAPES:
        want = sum(r.client.num_examples / n * 4.0 / r.client.rank * r.up.B[m].numpy() @ r.up.A[m].numpy() for r in replies)
        np.testing.assert_allclose(got[f"{m}.weight"], want, rtol=0, atol=1e-12)
    assert not METHOD.deploy(state).slots  # B starts at zero again, so nothing stands beside the base


def test_the_stack_is_as_it_was_sent_while_it_is_narrow_and_no_wider_than_the_module_after():
    setup = make_setup(make_clients((2, 3), (10, 30)))
    one, two = uploads(setup)
    state, _ = METHOD.aggregate(METHOD.init(setup), iter([one, two]), 1)
    (pair,) = METHOD.send(state, setup.clients[0], 1).base.pairs
    for m in SHAPES:
        assert torch.equal(pair.A[m], torch.cat([one.up.A[m], two.up.A[m]]))
        torch.testing.assert_close(pair.B[m][:, :2], 0.25 * 4 / 2 * one.up.B[m])
        torch.testing.assert_close(pair.B[m][:, 2:], 0.75 * 4 / 3 * two.up.B[m])
    setup = make_setup(make_clients((6, 5), (10, 30)), shapes=SHAPES | {"wide": (60, 40)})
    replies = [
        Reply(r.client, Up(r.up.A | {"wide": torch.ones(r.client.rank, 40)}, r.up.B | {"wide": torch.ones(60, r.client.rank)}))
        for r in uploads(setup)
    ]
    state, _ = METHOD.aggregate(METHOD.init(setup), iter(replies), 1)
    (pair,) = METHOD.send(state, setup.clients[0], 1).base.pairs
    assert {m: len(A) for m, A in pair.A.items()} == {"q": 8, "up": 11, "wide": 11}


def test_every_client_and_round_draws_its_own_A_and_a_restart_draws_it_again():
    setup = make_setup(make_clients((2, 2, 4)))
    trainer = Trainer(setup)
    federate(METHOD, setup, 3, trainer=trainer)
    starts = [ask.slots[SHARED] for _, ask, _ in trainer.log]
    assert len(starts) == 9
    for m, (_, d_in) in SHAPES.items():
        first = {tuple(s.A[m][0].tolist()) for s in starts}
        assert len(first) == 9
        everything = torch.cat([s.A[m].flatten() for s in starts])
        assert everything.abs().max() <= d_in**-0.5 and everything.abs().max() > 0.9 * d_in**-0.5
        assert not any(s.B[m].any() for s in starts)
    again = Trainer(setup)
    federate(METHOD, setup, 1, trainer=again)
    assert all(same(a.slots, b.slots) for (_, a, _), (_, b, _) in zip(trainer.log, again.log, strict=False))


def test_A_depends_on_the_runs_seed_and_keeps_dtype_and_scale():
    client = Client(3, 4, 10)
    held = [METHOD.hold(make_setup([client], seed=s, dtype=torch.float32), client) for s in (0, 0, 1)]
    one, two, other = (draw(h, client.rank, 5) for h in held)
    assert same(one, two) and not torch.equal(one.A["q"], other.A["q"])
    assert one.A["q"].dtype == torch.float32 and one.B["up"].shape == (20, 4) and one.scale == 1.0
    assert sum(x.numel() for x in (*held[0].empty.A.values(), *held[0].empty.B.values())) == 0  # nothing to keep but the seed


def test_every_client_receives_the_whole_stack_also_of_others():
    """The client of rank 1 gets all seven ranks, and one that was never there gets the stacks of all rounds."""
    setup = make_setup(make_clients((1, 2, 4)), shapes=SHAPES | {"wide": (60, 40)})
    run = federate(METHOD, setup, 3, lambda t: setup.clients if t == 3 else setup.clients[:2])
    downs = {c.id: METHOD.send(run.states[2], c, 3).base for c in setup.clients}
    assert [len(downs[k].pairs) for k in (0, 1, 2)] == [1, 1, 2] and [downs[k].since for k in (0, 1, 2)] == [1, 1, 0]
    assert {len(p.A["wide"]) for p in downs[2].pairs} == {3}
    assert len(METHOD.send(run.states[3], setup.clients[0], 4).base.pairs[-1].A["wide"]) == 7
