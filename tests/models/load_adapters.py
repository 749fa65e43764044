"""What runs left, as somebody without fedlora reads it: with plain transformers, and the PEFT that is first on the path.

    python load_adapters.py JOB ANSWER

JOB is JSON with `folders` (name -> exported folder) and `texts`; ANSWER is what it writes: `peft`, the version, and `logits` (name
-> two lists of rows, one a text: of each text alone, and of all of them padded to one length).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def load(folder: Path, **settings: Any) -> Any:
    """The classifier of an exported folder, in fp32; of an adapter, on the base that its configuration names, with another head."""
    file, settings = folder / "adapter_config.json", {"dtype": torch.float32, **settings}
    if not file.exists():
        return AutoModelForSequenceClassification.from_pretrained(folder, **settings).eval()
    from peft import PeftModel

    base, labels = json.loads(file.read_text())["base_model_name_or_path"], json.loads((folder / "fedlora.json").read_text())
    torch.manual_seed(99)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels["num_labels"], **settings)
    return PeftModel.from_pretrained(model, folder).eval()


def logits(folder: Path, texts: list[str]) -> tuple[list[list[float]], list[list[float]]]:
    """Of each text alone, the model as it is; and of all in one batch, with the padding token that fedlora.json names."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder)
    alone = [model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0].tolist() for text in texts]
    model = load(folder, pad_token_id=json.loads((folder / "fedlora.json").read_text())["pad_token_id"])
    padded = model(**tokenizer(texts, truncation=True, padding=True, return_tensors="pt")).logits.tolist()
    return alone, padded


def main(job: Path, answer: Path) -> None:
    import peft

    asked = json.loads(job.read_text())
    with torch.no_grad():
        found = {name: logits(Path(folder), asked["texts"]) for name, folder in asked["folders"].items()}
    answer.write_text(json.dumps({"peft": peft.__version__, "logits": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
