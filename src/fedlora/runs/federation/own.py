"""A client's own model, written on its own machine from what lies there: `fedlora federate export`."""

from pathlib import Path
from typing import Any

from fedlora import wire
from fedlora.clients.node import SCORED
from fedlora.clients.serve import classes
from fedlora.clients.state import ClientState, StateStore
from fedlora.errors import BadInput, first_line
from fedlora.messages import ScoreAsk
from fedlora.models import peft
from fedlora.runs.export import write_folder
from fedlora.runs.federation import outline
from fedlora.runs.federation.folder import Federation, Home, number_of, roster
from fedlora.runs.federation.node import own_config
from fedlora.runs.prepare import has_own_models, load_pretrained, make_method, make_task
from fedlora.runs.roster import Roster
from fedlora.runs.saved import STATES
from fedlora.wire import message_classes


def export(home: Home, name: str, to: Path, merged: bool = False) -> tuple[str, str, int]:
    """Write the model on which a client was scored last, its own where the method gives it one.

    Returns:
        "adapter" or "model"; whose it is, in words; and after how many rounds.

    Raises:
        BadInput: it was not scored yet, what it keeps is gone, or no folder can hold the model.
    """
    if to.exists():
        raise BadInput(f"{to} exists already; give another --to")
    what = home.read()
    if what["name"] != name:
        raise BadInput(f"{home.path} is the home of {what['name']}, not of {name}")
    federation = Federation(Path(what["federation"]))
    config = own_config(federation, what["data"], what["model"])
    method: Any = make_method(config)
    try:
        ask: ScoreAsk = wire.decode((home.path / SCORED).read_bytes(), classes(method))
    except FileNotFoundError as error:
        raise BadInput(
            f"{home.path}: {name} was not scored yet, so there is no model of it here; wait for a round to end"
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{home.path / SCORED}: damaged ({first_line(error)}); it is written anew in the next round") from error
    kept: ClientState | None = ClientState()
    if has_own_models(config) and ask.held:
        kept = StateStore(home.path / STATES, message_classes(method)).get(ask.client.id, ask.held)
    if kept is None:
        raise BadInput(f"{home.path}: what it kept in round {ask.held} is gone")
    result = method.own(ask.down, kept.held, ask.client) if ask.model is None else ask.model
    if not peft.has_fixed_weights(result):
        raise BadInput("this model weighs its adapters anew for each input, and neither an adapter nor a whole model can hold that")
    expected = outline.read(federation)
    pretrained = load_pretrained(config, expected.schema)
    merged = merged or not peft.is_adapter(result)
    names = config.clients.names or []
    everybody = Roster(
        expected.schema,
        tuple(roster(config)),
        tuple(names),
        tuple(0 for _ in names),
        make_task(config).bind(expected.schema).metrics,
        max_length=expected.max_length,
        padding=expected.padding,
    )
    number = number_of(config, name) if ask.model is None else None
    write_folder(config, everybody, pretrained, result, kept.head or ask.head, to, merged, [], number)
    whose = f"{name} alone" if ask.model is None else "everybody"
    return "model" if merged else "adapter", whose, ask.round - 1
