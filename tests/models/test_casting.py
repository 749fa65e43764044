"""A model that is cast computes what transformers gives that loads it in that precision."""

from pathlib import Path

import architectures
import pytest
import torch
import transformers

from fedlora.models.casting import at_least_fp32, cast


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_cast_model_is_one_that_was_loaded_so(name: str, tmp_path: Path) -> None:
    """Rotary frequencies stay in fp32 in transformers: rounded ones would turn late positions by radians."""
    model, _ = architectures.causal(name)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = torch.arange(4, 260)[None]
    with torch.no_grad():
        assert torch.equal(cast(model, torch.bfloat16)(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_nothing_becomes_less_precise() -> None:
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert at_least_fp32(torch.zeros(1, dtype=dtype)).dtype is wanted
