"""FedHM (2111.14655): factorised models of a share of the full rank, against numpy."""

import numpy as np
import pytest
import torch
from toy import SHAPES, Trainer, dense, distance, federate, make_clients, make_setup

from fedlora.methods import make
from fedlora.methods.fedhm import FedHM
from fedlora.types import SHARED, ProductDecay, Train

SETUP = make_setup(make_clients((1, 2, 4, 3)))


@pytest.mark.parametrize(
    "client, ranks", [(0, {"q": 2, "up": 3}), (1, {"q": 3, "up": 4}), (2, {"q": 6, "up": 9}), (3, {"q": 4, "up": 7})]
)
def test_a_client_gets_the_best_approximation_at_its_share(client, ranks):
    """Shares of 8 and 12: 0.75, in proportion to the ranks 1, 2, 4, 3, at least 0.25."""
    method = FedHM(rank_share=0.75)
    down = method.send(method.init(SETUP), SETUP.clients[client], 1)
    for m, q in ranks.items():
        W, B, A = SETUP.base(m).numpy(), down.B[m].numpy(), down.A[m].numpy()
        assert B.shape[1] == A.shape[0] == q
        np.testing.assert_allclose(((W - B @ A) ** 2).sum(), (np.linalg.svd(W, compute_uv=False)[q:] ** 2).sum(), atol=1e-12)
        np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-12)  # the singular values are shared evenly
    assert down.scale == 1.0


def test_at_full_rank_the_clients_get_W_itself():
    method, setup = FedHM(rank_share=1.0), make_setup(make_clients((2, 2)))
    down = method.send(method.init(setup), setup.clients[0], 1)
    for m in SHAPES:
        np.testing.assert_allclose(down.B[m] @ down.A[m], setup.base(m), atol=1e-12)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_server_averages_the_whole_matrices(share):
    run = federate(FedHM(rank_share=share), SETUP, 2)
    for m in SHAPES:
        products = [reply.up.B[m].numpy() @ reply.up.A[m].numpy() for _, reply in run.rounds[2]]
        np.testing.assert_allclose(run.states[2].W[m], np.average(products, axis=0, weights=[1, 4, 2, 3]), atol=1e-12)


def test_the_deployed_model_is_W_in_the_place_of_the_pretrained_weights():
    method = FedHM()
    run = federate(method, SETUP, 2)
    change = dense(method.deploy(run.states[2]), SETUP)
    for m in SHAPES:
        np.testing.assert_allclose(change[f"{m}.weight"], run.states[2].W[m] - SETUP.base(m), atol=1e-12)
    assert distance(dense(method.deploy(run.states[0]), SETUP), {n: 0 * x for n, x in change.items()}) == 0.0


def test_without_training_a_round_loses_the_tail_and_no_more():
    setup = make_setup(make_clients((2, 2)))
    run = federate(FedHM(), setup, 2, trainer=Trainer(setup, steps_per_epoch=0))
    for m, (d_out, d_in) in SHAPES.items():
        S = np.linalg.svd(setup.base(m).numpy(), compute_uv=False)[min(d_out, d_in) // 2 :]
        for t in (1, 2):  # the second round has nothing more to lose
            np.testing.assert_allclose(((run.states[t].W[m] - setup.base(m)) ** 2).sum(), (S**2).sum(), atol=1e-12)


def test_clients_train_without_the_base_under_the_decay_of_the_product():
    trainer = Trainer(SETUP)
    federate(FedHM(decay=0.3), SETUP, 1, trainer=trainer)
    for _, ask, _ in trainer.log:
        assert ask.drop_base and ask.penalty == ProductDecay(SHARED, 0.3) and set(ask.slots) == {SHARED}


def test_the_decay_shrinks_the_product():
    runs = [federate(FedHM(decay=decay), SETUP, 2) for decay in (0.0, 1.0)]
    norms = [sum(float(torch.linalg.norm(W)) for W in run.states[2].W.values()) for run in runs]
    assert norms[1] < 0.9 * norms[0]


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"rank_share": 0.1}, "least_share"),
        ({"rank_share": 1.5}, "rank_share"),
        ({"least_share": 0.0}, "least_share"),
        ({"decay": -1.0}, "decay"),
    ],
)
def test_impossible_settings_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        make("fedhm", settings)


def test_the_toy_world_drops_its_base_where_it_is_asked_to():
    trainer, client = Trainer(SETUP), SETUP.clients[1]
    down = FedHM().send(FedHM().init(SETUP), client, 1)
    done = trainer(client, Train({SHARED: down}, frozenset({(SHARED, "A")}), max_steps=1, drop_base=True))
    data = {m: (X.numpy(), Y.numpy()) for m, (X, Y) in trainer.data[client.id].items()}
    loss = sum(((X @ (down.B[m] @ down.A[m]).numpy().T - Y) ** 2).sum() / len(X) for m, (X, Y) in data.items())
    assert done.loss == pytest.approx(loss, rel=1e-12)


def test_a_wide_module_is_cut_as_well_as_a_tall_one():
    setup = make_setup(make_clients((2, 2)), shapes={"m": (5, 9)})
    down = FedHM(rank_share=0.6).send(FedHM(rank_share=0.6).init(setup), setup.clients[0], 1)
    U, S, Vt = np.linalg.svd(setup.base("m").numpy(), full_matrices=False)
    np.testing.assert_allclose(down.B["m"] @ down.A["m"], (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-12)
    np.testing.assert_allclose(down.B["m"].T @ down.B["m"], np.diag(S[:3]), atol=1e-12)
    np.testing.assert_allclose(down.A["m"] @ down.A["m"].T, np.diag(S[:3]), atol=1e-12)
