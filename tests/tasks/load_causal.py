"""What runs of language models left, as somebody without fedlora reads it, with plain transformers and PEFT.

    python load_causal.py JOB ANSWER

JOB is JSON with `folders` (name -> exported folder), `pairs` (prompt and completion, texts) and `quantise` (name -> 4bit or 8bit,
where an adapter's base is to be so); ANSWER is what it writes: name ->
of each pair minus the log-likelihood of the completion and the end of text behind it, given the prompt; and a greedy answer to the
first prompt, at most eight tokens. It prints the version of PEFT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def load(folder: Path, bits: str | None) -> Any:
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from peft import AutoPeftModelForCausalLM

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = {} if bits is None else {"quantization_config": BitsAndBytesConfig(**(nf4 if bits == "4bit" else {"load_in_8bit": True}))}
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    # In training, where it has no dropout, layers in 8 bits do not round what they are given, and those in 4 bits compute in fp32
    # on CPUs with AVX512-BF16, too.
    quantised = any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters())
    return model.train() if quantised else model


def losses(folder: Path, pairs: list[tuple[str, str]], bits: str | None) -> tuple[list[float], str]:
    tokenizer, model, found = AutoTokenizer.from_pretrained(folder), load(folder, bits), []
    for prompt, completion in pairs:
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id])
        logits = model(input_ids=ids[None]).logits[0]
        found.append(cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").item())
    inputs = tokenizer(pairs[0][0], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return found, tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    with torch.no_grad():
        answers = {
            name: losses(Path(folder), asked["pairs"], asked["quantise"].get(name)) for name, folder in asked["folders"].items()
        }
    Path(sys.argv[2]).write_text(json.dumps(answers))
    import peft

    print(peft.__version__)
