"""What a run folder holds of the server and of what clients keep, whichever version wrote it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedlora import wire
from fedlora.clients.state import ClientState, Location, StateStore, read
from fedlora.config import Config
from fedlora.server import checkpoint
from fedlora.server.checkpoint import Saved
from fedlora.server.sampling import accepted_by, sampler
from fedlora.summary import read_rows
from fedlora.types import Client, Method

CHECKPOINT = "checkpoint"  # of the server
STATES = "states"  # what clients keep


def load_saved(run: Path, config: Config, clients: Sequence[Client], method: Method, round: int | None = None) -> Saved | None:
    """The newest checkpoint that is whole, or that of a round, with all that its clients keep. Where it does not say whose replies
    counted, the rows do. BadInput when there is none but damaged ones."""
    states = StateStore(run / STATES, wire.message_classes(method))

    def whole(saved: Saved) -> Saved:
        if not saved.server.accepted:
            accepted = accepted_by(read_rows(run)[: saved.server.round], sampler(clients, config.seed, config.clients.sample))
            saved = replace(saved, server=replace(saved.server, accepted=accepted))
        for client in saved.server.accepted if config.clients.names is None else ():  # else each keeps it on its own machine
            state_of(run, saved, method, client, states)
        return saved

    return checkpoint.load(run / CHECKPOINT, method, round, whole)


def state_of(run: Path, saved: Saved, method: Method, client: int, states: StateStore | None = None) -> ClientState:
    """What a client keeps, as the checkpoint has it. ValueError where that is damaged or gone.

    Args:
        states: those of the run, where they are at hand.
    """
    classes = wire.message_classes(method)
    if saved.kept is not None:  # an earlier version, which says nothing of a client that keeps nothing
        place = saved.kept.get(client)
        return ClientState() if place is None else read(run / CHECKPOINT, Location(*place), classes)
    round = saved.server.accepted[client]
    state = (states or StateStore(run / STATES, classes)).get(client, round)
    if state is None:
        raise ValueError(f"what client {client} kept in round {round} is damaged or gone from {STATES}/")
    return state


def adopt(run: Path, saved: Saved, method: Method, states: StateStore) -> None:
    """Take over what clients keep from a checkpoint of an earlier version."""
    if saved.kept is not None:
        for client, round in saved.server.accepted.items():
            if round not in states.rounds(client):
                states.put(client, round, state_of(run, saved, method, client))
        states.flush()
