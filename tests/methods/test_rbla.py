"""RBLA: a rank counts for those alone who have it."""

import torch
from toy import Trainer, federate, make_clients, make_setup, same

from fedlora.methods import make
from fedlora.methods.rbla import RBLA, Up
from fedlora.types import Client, Factors, Reply


def test_by_hand():
    """n = 1 and 3, ranks 1 and 2 of 3. Row 0 of A: 10 + (1*4 + 3*8)/4 = 17; row 1 is the second client's, 20 + 5; nobody has the
    third."""
    state = Factors({"m": torch.tensor([[10.0], [20.0], [30.0]])}, {"m": torch.tensor([[1.0, 2.0, 3.0]])}, 2.0)
    one = Up({"m": torch.tensor([[4.0]])}, {"m": torch.tensor([[0.0]])})
    two = Up({"m": torch.tensor([[8.0], [5.0]])}, {"m": torch.tensor([[4.0, 1.0]])})
    after, _ = RBLA().aggregate(state, iter([Reply(Client(0, 1, 1), one), Reply(Client(1, 2, 3), two)]), 1)
    assert after.A["m"].tolist() == [[17.0], [25.0], [30.0]]
    assert after.B["m"].tolist() == [[4.0, 3.0, 3.0]] and after.scale == 2.0


def test_with_equal_ranks_it_is_fedit():
    setup = make_setup(make_clients((2,) * 4))
    one, two = (federate(make(name, {}), setup, 3, trainer=Trainer(setup)).states[-1] for name in ("rbla", "fedit"))
    for m in setup.shapes:
        torch.testing.assert_close(one.A[m], two.A[m], rtol=0, atol=1e-13)
        torch.testing.assert_close(one.B[m], two.B[m], rtol=0, atol=1e-13)


def test_a_rank_of_one_client_alone_is_that_clients():
    setup = make_setup(make_clients((1, 1, 1, 3)))
    method, trainer = make("rbla", {}), Trainer(setup)
    run = federate(method, setup, 1, trainer=trainer)
    trained = next(done.slots["shared"] for client, _, done in trainer.log if client.rank == 3)
    for m in setup.shapes:
        torch.testing.assert_close(run.states[1].A[m][1:], trained.A[m][1:], rtol=0, atol=1e-13)
        torch.testing.assert_close(run.states[1].B[m][:, 1:], trained.B[m][:, 1:], rtol=0, atol=1e-13)


def test_ranks_that_no_participant_has_stay_to_the_bit():
    setup = make_setup(make_clients((1, 2, 4, 4)))
    run = federate(make("rbla", {}), setup, 2, lambda t: setup.clients if t == 1 else setup.clients[:2])
    for m in setup.shapes:
        assert same(run.states[2].A[m][2:].clone(), run.states[1].A[m][2:].clone())
        assert same(run.states[2].B[m][:, 2:].clone(), run.states[1].B[m][:, 2:].clone())
