"""FedAvg with full fine-tuning (1602.05629)."""

import torch
from toy import Trainer, federate, make_clients, make_setup, tensors

from fedlora.methods.fedavg import FedAvg, State, Up
from fedlora.types import FULL, Reply, Train

METHOD = FedAvg()


def test_by_hand():
    """Changes 4 and 8 with n = 1 and 3 move a parameter by 7; once more from there by 7."""
    setup = make_setup(make_clients((1, 1), (1, 3)), shapes={"m": (1, 1)})
    replies = [Reply(c, Up({"m.weight": torch.tensor([[x]])})) for c, x in zip(setup.clients, (4.0, 8.0), strict=True)]
    state, _ = METHOD.aggregate(METHOD.init(setup), iter(replies), 1)
    assert state.full["m.weight"].item() == 7.0
    state, _ = METHOD.aggregate(state, iter(replies), 1)
    assert state.full["m.weight"].item() == 14.0


def test_every_parameter_trains_and_none_comes_down_in_round_one():
    setup = make_setup(make_clients((1, 2)))
    run = federate(METHOD, setup, 2)
    assert [tensors(order.down) for order, _ in run.rounds[1]] == [[], []]
    assert all(order.down == run.states[1] for order, _ in run.rounds[2])
    for name in setup.params:  # the biases too
        assert torch.count_nonzero(run.states[1].full[name])
    assert METHOD.init(setup) == State()


def test_one_client_is_central_training():
    setup = make_setup(make_clients((1,), (30,)), epochs=2)
    run = federate(METHOD, setup, 3)
    central = Trainer(setup)(setup.clients[0], Train({}, FULL, epochs=6)).full
    for name in setup.params:
        torch.testing.assert_close(run.states[-1].full[name], central[name], rtol=0, atol=1e-12)
