"""A model card names what a reader elsewhere can know, and says what the run was."""

import json
from types import SimpleNamespace
from typing import Any

import transformers
from huggingface_hub import ModelCard

from fedlora.config import resolve
from fedlora.data.dataset import Schema
from fedlora.models.cut import Cut
from fedlora.runs.card import Facts, as_json, model_card
from fedlora.runs.roster import HeldOut, Roster
from fedlora.tasks.base import Result
from fedlora.tasks.text_classification import TextClassification
from fedlora.types import Client

ROWS = [
    {"round": 1, "upload_bytes": 1_000_000, "download_bytes": 0, "accuracy": 0.25, "macro_f1": 0.125},
    {"round": 2, "upload_bytes": 1_500_000, "download_bytes": 2_000_000, "accuracy": 0.5, "macro_f1": 0.375},
]


def facts(base: str, tables: dict[str, Any], **more: Any) -> Facts:
    config = resolve({"data": {"source": ["/home/me/data/tickets.csv", "20newsgroups"]}, **tables})
    pretrained: Any = SimpleNamespace(source=base, notes=(), model=SimpleNamespace(config=transformers.BertConfig()))
    result = Result(pretrained, Schema(("a", "b")), 16, "none", merged=False)
    clients = tuple(Client(i, rank, 10) for i, rank in enumerate((2, 4, 8)))
    roster = Roster(result.schema, clients, ("x", "y", "z"), (1, 1, 1), held_out=(HeldOut("n", 5, 5), HeldOut("m", 5, 5)))
    return Facts(config, roster, TextClassification().card(result), result, **{"rows": (), **more})


def test_no_folder_of_this_machine_stands_in_a_card() -> None:
    """Nor is a folder's name in the metadata, where it would be a model of the Hub."""
    card = model_card(facts("/home/me/models/bert", {}))
    assert "/home" not in card and "base_model:" not in card
    assert "A text classifier of 2 classes on `bert`, trained" in card
    assert "# tickets.csv + 20newsgroups: LoRA adapter by LoRA-A²" in card
    assert "base_model: org/bert\n" in model_card(facts("org/bert", {}))


def test_a_card_says_what_the_run_was() -> None:
    cut = Cut(4, 0.12345, "layer.1", 0.5)
    assert str(cut) == "cut to rank 4: relative error 12 % (Frobenius norm, all modules), 50 % in layer.1"
    tables = {"clients": {"sample": 0.5, "held_out": 2, "rank": [2, 4, 8]}}
    known = facts("org/bert", tables, rows=ROWS, revision="abc", ranks=(4, 4, 3), cut=cut)
    rows = [line.strip("| ").split(" | ") for line in model_card(known).splitlines() if line.startswith("| ") and line != "| | |"]
    found = {row[0]: row[1] for row in rows if len(row) == 2}
    assert (
        found
        | {
            "base model's revision": "`abc`",
            "clients": "3, 50 % of them in a round; 2 more held out, to score the model for somebody new",
            "rounds": "2",
            "ranks of the clients": "2 to 8",
            "rank of this adapter": "3 to 4, by module",
            "what was cut": "cut to rank 4: relative error 12 % (Frobenius norm, all modules), 50 % in layer.1; the scores are "
            "from before the cut",
            "sent, by all clients in all rounds": "2.5 MB up, 2.0 MB down",
            "accuracy": "50.0 % of the test texts",
            "macro F1": "37.5 %",
        }
        == found
    )
    assert ModelCard(model_card(known)).data.base_model == "org/bert"  # the Hub's own reader of metadata
    says = json.loads(as_json(known))
    assert (says["clients"], says["held_out"], says["client_ranks"]) == (3, 2, [2, 4, 8])
    assert (says["upload_bytes"], says["download_bytes"], says["macro_f1"]) == (2_500_000, 2_000_000, 0.375)
    assert says["cut"] == {"rank": 4, "error": 0.12345, "worst": "layer.1", "worst_error": 0.5}
    assert (says["base_model"], says["base_model_revision"]) == ("org/bert", "abc")
