"""The result of a run, in the formats that others read: a PEFT adapter, or the whole model."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fedlora.config import Config, Head, read_recipe, resolve
from fedlora.engine import card, checkpoint, wire
from fedlora.engine.federation import Roster, load_pretrained, make_method, make_trainer, read_roster, try_pretrained
from fedlora.engine.kept import Kept, Shelf
from fedlora.engine.record import Row, read_rows
from fedlora.errors import BadInput
from fedlora.models import peft
from fedlora.models.load import Pretrained
from fedlora.training.encode import encode
from fedlora.training.trainer import Question
from fedlora.types import Model, Tensors


def write_result(config: Config, roster: Roster, result: Model, head: Tensors, rows: Sequence[Row], out: Path) -> str:
    """Write `adapter/` under `out`, or `model/` where the result is no fixed low-rank change; returns which. What depends on the
    input has no such format, and is in the checkpoint only: "checkpoint"."""
    if not peft.has_fixed_weights(result):
        return "checkpoint"
    name = "adapter" if peft.is_adapter(result) else "model"
    _write_folder(config, roster, result, head, out / name, name == "model", rows, None)
    return name


def export(run: Path, to: Path, client_id: int | None, merged: bool) -> str:
    """Export what a run has learned so far; with a client, that client's own model. Returns "adapter" or "model".

    Raises:
        BadInput: `run` is no run folder or has no checkpoint yet, `to` exists, there is no such client, the method has no
            personal models, or the result depends on the input.
    """
    if to.exists():
        raise BadInput(f"{to} exists already; give another --to")
    config, roster, result, head = read_result(run, client_id)
    if not peft.has_fixed_weights(result):
        raise BadInput(
            f"{run}: this model weighs its adapters anew for each input (or has one for each task), and neither an adapter nor a "
            "whole model can hold that; `fedlora predict` uses it"
        )
    merged = merged or not peft.is_adapter(result)
    _write_folder(config, roster, result, head, to, merged, read_rows(run / "metrics.jsonl"), client_id)
    return "model" if merged else "adapter"


def read_result(run: Path, client_id: int | None = None) -> tuple[Config, Roster, Model, Tensors]:
    """The configuration, the clients, the learned model and the trained head (or nothing) of a run folder."""
    file = run / "config.toml"
    if not file.exists():
        raise BadInput(f"{run} is no run folder: it has no config.toml")
    config, roster = resolve(read_recipe(str(file))), read_roster(run / "federation.json")
    method = make_method(config)
    saved = checkpoint.load(run / "checkpoint", method)
    if saved is None:
        raise BadInput(f"{run} has no checkpoint yet: no round is complete")
    if client_id is None:
        return config, roster, method.deploy(saved.server.state), saved.server.head
    if client_id not in range(len(roster.clients)):
        raise BadInput(f"--client {client_id}: the run has clients 0 to {len(roster.clients) - 1}")
    if not (method.FACTS.personal or config.model.head is Head.PERSONAL):
        raise BadInput(
            f"--client {client_id}: {method.FACTS.title} with a {config.model.head.value} head trains one model for all; "
            "leave --client out"
        )
    # Nobody's is there where the server holds all that a method knows of a client.
    if saved.places and client_id not in saved.places:
        raise BadInput(f"--client {client_id}: this client has not taken part in any round yet")
    kept = Shelf(run / "checkpoint", wire.message_classes(method), saved.places).get(client_id) or Kept()
    model = method.deploy(saved.server.state, roster.clients[client_id], kept.held)
    return config, roster, model, kept.head or saved.server.head


def predict(run: Path, texts: list[str], note: Callable[[str], None] = lambda text: None) -> list[tuple[str, float]]:
    """The trained model's label for each text, and its probability; `note` hears what a user should know."""
    config, roster, result, head = read_result(run)
    pretrained = load_pretrained(config, roster)
    findings = try_pretrained(config, pretrained)
    data = encode(pretrained.tokenizer, texts, np.zeros(len(texts), dtype=np.int64), roster.max_length or findings.limit)
    if data.cut:
        note(f"{data.cut:,} of {len(texts):,} texts are longer than {roster.max_length or findings.limit} tokens, and cut")
    (logits,) = make_trainer(config, pretrained, findings).logits([Question(result, head, data)])
    best = torch.from_numpy(logits).softmax(dim=1).max(dim=1)
    return [(roster.label_names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def _write_folder(
    config: Config, roster: Roster, result: Model, head: Tensors, to: Path, merged: bool, rows: Sequence[Row], client: int | None
) -> None:
    """Built beside its place and renamed, so that it is never half there."""
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    pretrained = _with_head(load_pretrained(config, roster), head)
    if merged:
        peft.save_model(pretrained, result, part)
    else:
        peft.save_adapter(pretrained, result, part)
    tokenizer = pretrained.tokenizer
    limit = roster.max_length or min(config.data.max_length, tokenizer.model_max_length)
    tokenizer.model_max_length, tokenizer.padding_side = limit, "left" if roster.padding == "left" else "right"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # what the model was given in training
    tokenizer.save_pretrained(part)
    facts = card.Facts(config, roster.label_names, pretrained, limit, roster.padding, merged, rows[-1] if rows else None, client)
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
