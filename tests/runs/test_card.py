"""A model card names what a reader elsewhere can know."""

from types import SimpleNamespace
from typing import Any

from fedlora.config import resolve
from fedlora.runs.card import Facts, model_card


def test_no_folder_of_this_machine_stands_in_a_card() -> None:
    config = resolve({"data": {"source": ["/home/me/data/tickets.csv", "20newsgroups"]}})
    pretrained: Any = SimpleNamespace(source="/home/me/models/bert")
    card = model_card(Facts(config, ("a", "b"), pretrained, 16, "none", False, None, None))
    assert "/home" not in card
    assert "base_model: bert\n" in card
    assert "# tickets.csv + 20newsgroups: LoRA adapter by LoRA-A²" in card
