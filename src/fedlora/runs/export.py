"""The result of a run, in the formats that others read: a PEFT adapter, or the whole model."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlora.config import Config, read_run
from fedlora.errors import BadInput, some
from fedlora.models import peft
from fedlora.models.cut import Cut, can_be_cut, cut
from fedlora.models.load import PACKAGED, Given, Pretrained, holds_model, revision_of
from fedlora.models.quantised import dequantised
from fedlora.runs import card
from fedlora.runs.prepare import has_own_models, load_pretrained, make_method, make_task, with_source
from fedlora.runs.roster import Roster, read_roster
from fedlora.runs.saved import load_saved, state_of
from fedlora.summary import read_metrics, read_rows, to_written
from fedlora.tasks.base import Result
from fedlora.types import BaseUpdate, Model, Tensors, own_model

if TYPE_CHECKING:
    from fedlora.runs.trainers import TrainerClient


def write_result(
    config: Config,
    roster: Roster,
    result: Model,
    head: Tensors,
    rows: Sequence[Mapping[str, Any]],
    out: Path,
    given: Given | None = None,
    outlined: Pretrained | None = None,
) -> str:
    """Write `adapter/` under `out`, or `model/` where the result is no fixed low-rank change; returns which. What depends on the
    input has no such format, and is in the checkpoint only: "checkpoint". An adapter needs a base that others can find.

    Args:
        outlined: the model where its weights are not here: a dense change is then an adapter of full rank, and what changes more
            than the adapted layers stays in the checkpoint.
    """
    if outlined is not None and result.base.dense:
        result = replace(result, slots={"": peft.one_slot(result)}, base=BaseUpdate(), gate=None)
    name = "checkpoint"
    if peft.has_fixed_weights(result) and (outlined is None or peft.is_adapter(result)):
        pretrained, merged = (outlined, False) if outlined is not None else _base(config, roster, result, False, given)
        name = "model" if merged else "adapter"
        write_folder(config, roster, pretrained, result, head, out / name, merged, rows, None)
    for other in {"adapter", "model"} - {name}:  # of a run that went on: its result of fewer rounds had another format
        shutil.rmtree(out / other, ignore_errors=True)
    return name


def export(
    run: Path,
    to: Path,
    client: int | str | None,
    merged: bool,
    given: Given | None = None,
    clients: "Sequence[TrainerClient]" = (),
    rank: int | None = None,
    tell: Callable[[str], None] = print,
) -> str:
    """Export what a run has learned so far; with a client, that client's own model. Returns "adapter" or "model".

    Args:
        given: the model, where it is at hand.
        clients: those with trainers of their own, where they are at hand.
        rank: to which an adapter is cut; without it nothing is cut.
        tell: hears what a cut takes away, and that this is nobody's model, a line each.

    Raises:
        BadInput: `run` is no run folder or has no checkpoint yet, `to` exists, there is no such client, the method has no
            personal models, or the result depends on the input; a rank is given and there is no adapter to cut.
    """
    if to.exists():
        raise BadInput(f"{to} exists already; give another --to")
    if rank is not None and rank < 1:
        raise BadInput(f"--rank {rank}: an adapter has a rank of at least 1")
    if rank is not None and merged:
        raise BadInput(f"--rank {rank} with --merged: a whole model has no rank; give one of them")
    if read_run(run).train.trainer is not None:
        from fedlora.runs import trainers

        trainers.export(run, to, clients, client, merged)
        return "adapter"
    id = None if client is None else which_client(run, client)
    config, roster, result, head = read_result(run, id)
    if not peft.has_fixed_weights(result):
        raise BadInput(
            f"{run}: this model weighs its adapters anew for each input (or has one for each domain), and neither an adapter nor a "
            "whole model can hold that; `fedlora predict` uses it"
        )
    if rank is not None and not can_be_cut(result):
        raise BadInput(
            f"--rank {rank}: {run} trained the weights themselves, and not an adapter that could be cut; leave --rank out"
        )
    config = located(config, run)
    lost = None
    if rank is not None:
        result, lost = cut(result, rank)
    pretrained, merged = _base(config, roster, result, merged, given)
    if lost is not None:
        if merged:
            raise BadInput(f"--rank {rank}: others do not have the base of {run}, so it leaves no adapter; leave --rank out")
        tell(str(lost))
    rows = to_written(read_rows(run), read_metrics(run)[0])
    write_folder(config, roster, pretrained, result, head, to, merged, rows, id, lost)
    if id is None and has_own_models(config):
        tell("note: clients end with models of their own here, and this is what they share alone, not scored; name one of them")
    return "model" if merged else "adapter"


def model_of(run: Path, client: int | str | None = None, given: Given | None = None) -> Any:
    """The model that a run has learned, for inference: under PEFT where it is an adapter, else whole. BadInput: see `export`."""
    with tempfile.TemporaryDirectory() as place:
        kind = export(run, Path(place) / "result", client, False, given)
        config = located(read_run(run), run)
        pretrained = load_pretrained(config, read_roster(run / "federation.json").schema, given)
        found = peft.read(pretrained, Path(place) / "result", kind == "adapter")
    return found.eval()


def _base(config: Config, roster: Roster, result: Model, merged: bool, given: Given | None) -> tuple[Pretrained, bool]:
    """The model that a result goes on, and whether it is merged into it, as is wished or must be: then nothing is quantised."""
    merged = merged or not peft.is_adapter(result)
    if merged:
        config = config.model_copy(update={"model": config.model.model_copy(update={"quantise": None})})
    pretrained = load_pretrained(config, roster.schema, given)
    if merged:  # a checkpoint may have quantised weights of its own
        pretrained = replace(pretrained, model=dequantised(pretrained.model))
    return pretrained, merged or not _has_base(pretrained, given)


def _has_base(pretrained: Pretrained, given: Given | None) -> bool:
    """Whether others have, or its owner has, the model that an adapter goes on."""
    return bool(pretrained.source) or given is not None


def read_result(run: Path, client_id: int | None = None) -> tuple[Config, Roster, Model, Tensors]:
    """The configuration, the clients, the learned model and the trained head (or nothing) of a run folder. With a validation
    part the model is that of the best round by it."""
    config, roster = read_run(run), read_roster(run / "federation.json")
    method = make_method(config)
    saved = load_saved(run, config, roster.clients, method)
    if saved is None:
        raise BadInput(f"{run} has no checkpoint yet: no round is complete")
    written = to_written(read_rows(run)[: saved.server.round], roster.metrics[0])
    if len(written) < saved.server.round:
        saved = load_saved(run, config, roster.clients, method, len(written)) or saved
    if client_id is None:
        return config, roster, method.deploy(saved.server.state), saved.server.head
    if client_id not in range(len(roster.clients)):
        raise BadInput(f"--client {client_id}: the run has clients 0 to {len(roster.clients) - 1}")
    if not has_own_models(config):
        raise BadInput(
            f"--client {client_id}: {method.FACTS.title} with a {config.model.head.value} head trains one model for all; "
            "leave --client out"
        )
    if config.clients.names is not None:
        raise BadInput(
            f"--client {client_id}: what a client of a federation keeps is on its own machine; there, fedlora federate export "
            "writes its model"
        )
    server = saved.server
    if client_id not in server.accepted:
        raise BadInput(f"--client {client_id}: this client has not taken part in any round yet")
    kept = state_of(run, saved, method, client_id)
    model = own_model(method, server.state, kept.held, roster.clients[client_id], server.round + 1)
    return config, roster, model, kept.head or server.head


def which_client(run: Path, client: int | str) -> int:
    """The number of the client that is called so, or has that number. BadInput says which there are."""
    roster = read_roster(run / "federation.json")
    if client in roster.names:
        return roster.names.index(str(client))
    if str(client).isdecimal() and int(client) < len(roster.names):
        return int(client)
    last = len(roster.names) - 1
    raise BadInput(f"--client {client}: the run has clients 0 to {last}: {some(roster.names, 10)}")


def located(config: Config, run: Path) -> Config:
    """The configuration with its model where it is: a relative path is looked for here, then beside each folder that `run` lies
    in, so that a run can be used from elsewhere."""
    source = config.model.source
    if source in PACKAGED or Path(source).exists():
        return config
    found = next((place / source for place in run.resolve().parents if holds_model(place / source)), None)
    return config if found is None else with_source(config, found)


def write_folder(
    config: Config,
    roster: Roster,
    pretrained: Pretrained,
    result: Model,
    head: Tensors,
    to: Path,
    merged: bool,
    rows: Sequence[Mapping[str, Any]],
    client: int | None,
    lost: Cut | None = None,
) -> None:
    """Built beside its place and renamed, so that it is never half there."""
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    pretrained, revision = _with_head(pretrained, head), revision_of(config.model.source)
    if merged:
        peft.save_model(pretrained, result, part)
    else:
        peft.save_adapter(pretrained, result, part, revision)
    limit = roster.max_length or min(config.data.max_length, pretrained.processor.model_max_length)
    task = make_task(config)
    task.save_processor(pretrained, limit, roster.padding, part)
    result_of = Result(pretrained, roster.schema, limit, roster.padding, merged)
    ranks = () if merged else peft.ranks_in(part)
    facts = card.Facts(config, roster, task.card(result_of), result_of, rows, client, revision, ranks, lost)
    (part / "fedlora.json").write_text(card.as_json(facts))
    (part / "README.md").write_text(card.model_card(facts))
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner's eyes only
    shutil.rmtree(to, ignore_errors=True)
    part.rename(to)


def _with_head(pretrained: Pretrained, head: Tensors) -> Pretrained:
    parameters = dict(pretrained.model.named_parameters())
    with torch.no_grad():
        for name, value in head.items():
            parameters[name].copy_(value)
    return pretrained
