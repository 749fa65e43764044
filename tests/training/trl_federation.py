"""Run by test_trl.py where trl is installed: the example's trainers in a federation, against its arithmetic in plain PyTorch."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("error")
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # of trl 1.16 on transformers 5.24
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # of peft 0.21

import trl_client  # noqa: E402
from hf_clients import factors, mean, put  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

import fedlora  # noqa: E402
from fedlora.runs.prepare import fresh_adapter  # noqa: E402

RANK, ALPHA, LR, BATCH = 4, 8, 2e-3, 2  # of the example
TEXTS = [
    ["the dose of aspirin is one a day", "the dose of aspirin is two tablets a day"] * 3,
    ["ibuprofen is three a day", "a day"] * 2,
]


def model() -> Any:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(trl_client.tiny_model(), config)


def one_pass(plain: Any, texts: list[list[int]]) -> None:
    """Batches in order, padded at the end; AdamW as transformers has it; gradients of at most norm 1; a rate that falls to zero."""
    learned = [p for name, p in plain.named_parameters() if "lora_" in name]
    optimizer, steps = torch.optim.AdamW(learned, lr=LR, weight_decay=0.0), -(-len(texts) // BATCH)
    for step in range(steps):
        batch = texts[BATCH * step : BATCH * step + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([each + [0] * (longest - len(each)) for each in batch])
        there = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in batch])
        nll = torch.nn.functional.cross_entropy(
            plain(input_ids=ids, attention_mask=there).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = nll[there[:, 1:].flatten().bool()].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / steps)
        optimizer.step()


def main(place: Path) -> None:
    trainers = [trl_client.hospital(texts, place / str(i)) for i, texts in enumerate(TEXTS)]
    for each in trainers:
        each.args.train_sampling_strategy = "sequential"
    words = [[list(row["input_ids"]) for row in each.train_dataset] for each in trainers]
    assert all(ids[-1] == 2 for own in words for ids in own)  # trl has put the end of text there
    run = fedlora.run(
        data=[fedlora.client(each, name) for each, name in zip(trainers, ("north", "south"), strict=True)],
        method="fedit",
        rounds=2,
        progress=False,
    )
    run.save_adapter(place / "adapter")
    plain = model()
    shapes = {path: (m.out_features, m.in_features) for path, m in plain.get_base_model().named_modules() if hasattr(m, "lora_A")}
    fresh = fresh_adapter(shapes, 0, {RANK: ALPHA / RANK}, RANK)
    server = {f"A {m}": x for m, x in fresh.A.items()} | {f"B {m}": x for m, x in fresh.B.items()}
    first = server
    for _ in range(2):
        parts = []
        for own in words:
            put(plain, server)
            one_pass(plain, own)
            parts.append(factors(plain))
        server = mean(parts, list(map(len, words)))
    saved = factors(PeftModel.from_pretrained(trl_client.tiny_model(), place / "adapter"))
    print(
        json.dumps(
            {
                "off": max(float((saved[key] - server[key]).abs().max()) for key in server),
                "off_in_models": max(float((factors(t.model)[key] - server[key]).abs().max()) for t in trainers for key in server),
                "moved": max(float((server[key] - first[key]).abs().max()) for key in server),
                "modules": len(shapes),
                "rounds": [row["clients"] for row in run.rows],
                "loss": [row["eval_loss"] for row in run.rows],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
