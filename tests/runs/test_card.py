"""A model card names what a reader elsewhere can know."""

from types import SimpleNamespace
from typing import Any

import transformers

from fedlora.config import resolve
from fedlora.data.dataset import Schema
from fedlora.runs.card import Facts, model_card
from fedlora.tasks.base import Result
from fedlora.tasks.metrics import CLASSIFICATION
from fedlora.tasks.text_classification import TextClassification


def test_no_folder_of_this_machine_stands_in_a_card() -> None:
    config = resolve({"data": {"source": ["/home/me/data/tickets.csv", "20newsgroups"]}})
    pretrained: Any = SimpleNamespace(source="/home/me/models/bert", model=SimpleNamespace(config=transformers.BertConfig()))
    result = Result(pretrained, Schema(("a", "b")), 16, "none", merged=False)
    card = model_card(Facts(config, CLASSIFICATION[0], TextClassification().card(result), result, None, None))
    assert "/home" not in card
    assert "base_model: bert\n" in card
    assert "# tickets.csv + 20newsgroups: LoRA adapter by LoRA-A²" in card
