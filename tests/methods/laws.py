"""What the laws share: a row's world, the names of laws in their failures, and what a round is judged by."""

from functools import cache, wraps

import numpy as np
import pytest
from cases import ROWS, Row, takes_part
from toy import Trainer, dense, deployed, federate, make_clients, make_setup

from fedlora import wire
from fedlora.types import ByDomain, Client, Model

FIRST = {id(row) for row in {row.method: row for row in reversed(ROWS)}.values()}  # of each method
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
# For what takes long: in the fast suite a row a method, in the slow tests the others.
long_row = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if id(row) in FIRST else pytest.mark.slow) for row in ROWS], ids=str
)


def law(number: int, exempt: str = ""):
    """A failing law says whose it is, which, and what a row declares where it does not hold as it stands."""

    def numbered(test):
        @wraps(test)
        def held(row, *args, **others):
            try:
                return test(row, *args, **others)
            except AssertionError as error:
                hint = f"; a row declares another form of it by its field {exempt} in cases.py" if exempt else ""
                error.add_note(f"law {number} does not hold for {row}{hint}")
                raise

        return held

    return numbered


def world(row: Row, ranks=None, **options):
    setup = make_setup(make_clients(ranks or row.ranks, tasks=row.tasks), **options)
    return row.make(), setup


def some(setup):
    """Half of the clients, others in every round."""

    def sample(t: int) -> list[Client]:
        return [c for c in setup.clients if takes_part(c.id, t)]

    return sample


@cache
def standard_with_requests(row: Row):
    """Five rounds of a row with `some` clients: (method, setup, run), and what was asked of the clients."""
    method, setup = world(row)
    trainer = Trainer(setup, lr=row.lr)
    run = federate(method, setup, 5, some(setup), trainer)
    return (method, setup, run), [*(ask for _, ask, _ in trainer.log), *trainer.looked]


def standard(row: Row):
    """The first of these."""
    return standard_with_requests(row)[0]


@cache
def third_round(row: Row):
    """A method, its setup, two rounds with everybody, the replies of a third, and what each client had trained in it. Where a row
    says so, another round than the third."""
    method, setup = world(row)
    trainer = Trainer(setup)
    run = federate(method, setup, row.at, trainer=trainer)
    trained = {c.id: trained_change(trainer, c, row, row.at) for c in setup.clients}
    return method, setup, run, [reply for _, reply in run.rounds[row.at]], trained


def through_the_wire(x, method):
    return wire.decode(wire.encode(x), wire.message_classes(method))


def without_own(row: Row, slots):
    """The slots that clients do not keep to themselves."""
    return {name: slot for name, slot in slots.items() if name not in row.own}


def trained_change(trainer: Trainer, client: Client, row: Row, round: int) -> dict[str, np.ndarray]:
    """How far a client's model was from the pre-trained one when its last training, in this round, ended: its base, its parameters,
    and its slots but for those that it keeps to itself. Where the slot that travels and its own train one after the other, both
    from what was received, it is the training of the one that travels."""
    drop_base = [ask.drop_base for c, ask, _ in trainer.log if c.id == client.id][-1]
    travels = {slot for slot, _ in row.trained(round)} & {row.slot} if row.by_role else set()
    asked = [(ask, done) for c, ask, done in trainer.log if c.id == client.id and not ask.probe]
    by_task = {ask.data: done for ask, done in asked if travels <= {slot for slot, _ in ask.roles}}
    trained = list(by_task.values())[-1]
    if row.by_role:
        return outcome(row, Model(trained.slots), trainer.setup)
    model = Model(without_own(row, trained.slots), full=trained.full, gate=trained.gate, drop_base=drop_base)
    change = dense(model, trainer.setup)
    if len(by_task) > 1:  # an adapter a task
        slots = {task: next(iter(done.slots.values())) for task, done in by_task.items()}
        change = dense(Model(slots, gate=ByDomain({task: task for task in slots})), trainer.setup)
    for m, merged in trainer.merged[client.id].items():
        change[f"{m}.weight"] = change[f"{m}.weight"] + merged.numpy()
    return change


def outcome(row: Row, model: Model, setup) -> dict[str, np.ndarray]:
    """What the server is judged by: the function of its model, or, where that is nothing without a client's part, the roles that
    travel."""
    if not row.by_role:
        return dense(model, setup)
    slot = model.slots[row.slot]
    return {f"{role} of {m}": x.double().numpy() for role in sorted(row.roles(1)) for m, x in slot.role(role).items()}


def function(row: Row, method, setup, state, held, id: int = 0) -> dict[str, np.ndarray]:
    """What a round is judged by: the function of the deployed model; where that is nothing by itself, of a client's own."""
    client = setup.clients[id]
    own = row.by_role or row.grouped
    return dense(deployed(method, state, client, held[client.id]) if own else method.deploy(state), setup)


def truncated(change: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """The best approximation of every weight at a rank, by numpy."""
    out = dict(change)
    for name, W in change.items():
        if W.ndim == 2:
            U, S, Vt = np.linalg.svd(W, full_matrices=False)
            out[name] = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return out
