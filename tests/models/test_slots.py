"""Which modules get a slot."""

import pytest
import tiny
import transformers

from fedlora.errors import BadInput
from fedlora.models.slots import find_targets, layer_shape


def model(kind: str):
    return transformers.AutoModelForSequenceClassification.from_config(tiny.config(kind))


@pytest.mark.parametrize(("kind", "per_block"), [("bert", 6), ("roberta", 6), ("distilbert", 6), ("gpt2", 4), ("llama", 7)])
def test_all_linear_layers_of_the_blocks(kind: str, per_block: int) -> None:
    found = find_targets(model(kind), "all-linear")
    assert len(found) == 2 * per_block
    assert not any(word in name for name in found for word in ("pooler", "classifier", "score", "embed"))


def test_roberta_base_has_72() -> None:
    """The LoRA-A² paper's communication column needs all six linear layers of twelve blocks."""
    import torch

    with torch.device("meta"):
        roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig())
    assert len(find_targets(roberta, "all-linear")) == 72


def test_by_name_and_by_pattern() -> None:
    bert = model("bert")
    assert find_targets(bert, ["query", "value"]) == [
        f"bert.encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")
    ]
    assert find_targets(bert, ["attention.output.dense"]) == [f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)]
    assert find_targets(bert, r".*layer\.1\..*") == [n for n in find_targets(bert, "all-linear") if ".1." in n]


@pytest.mark.parametrize("wanted", ["nothing", ["query", "q_proj"], "(", []])
def test_what_matches_nothing_is_refused(wanted) -> None:
    with pytest.raises(BadInput, match=r"model\.target_modules"):
        find_targets(model("bert"), wanted)


def test_conv1d_is_the_transpose() -> None:
    gpt2 = model("gpt2")
    assert layer_shape(gpt2.transformer.h[0].mlp.c_fc) == (40, 16)
    assert layer_shape(gpt2.transformer.h[0].mlp.c_proj) == (16, 40)
