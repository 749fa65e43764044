"""Language models on a GPU: Llama 3.2 1B's shape with random weights, a 4-bit base, eight clients at once, rank 8 on all linear
layers, batches of eight rows of 256 tokens, half of them trained; ours against PEFT's loop, which trains the clients in turn.

Each side is a process of its own: what it holds is the most that PyTorch has had at once on the GPU.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import harness
from benchmarks.harness import Sample
from benchmarks.peers import peft_lm, peft_loop
from fedlora import seeds
from fedlora.config import Config, resolve
from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.models.slots import find_targets
from fedlora.runs.prepare import fresh_adapter, load_pretrained, make_task, make_trainer, try_pretrained
from fedlora.tasks import defaults
from fedlora.training.learner import Job
from fedlora.training.precision import dtype_of
from fedlora.types import Train

AB = frozenset({("shared", "A"), ("shared", "B")})
RANK, CLIENTS, BATCH, TOKENS = 8, 8, 8, 256
OURS, PEFT = "fedlora, 8 clients at once", "PEFT, a client at a time"


def save_model(folder: Path, layers: int) -> None:
    """Random weights in bf16, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    words = Tokenizer(models.BPE(letters, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def configured(folder: str) -> Config:
    tables: dict[str, Any] = {
        "device": "cuda",
        "precision": "bf16",
        "task": {"name": "causal_lm"},
        "model": {"source": folder, "quantise": "4bit"},
        "train": {"batch_size": BATCH, "rows": 1 << 20},
    }
    return resolve(defaults(tables), tables)


def examples(steps: int) -> list[Encoded]:
    """Of each client."""
    found = []
    for k in range(CLIENTS):
        ids = seeds.generator(0, "bench", k).integers(4, 128000, (steps * BATCH, TOKENS), dtype=np.int32)
        marks = np.arange(TOKENS) >= TOKENS // 2
        counts = np.full(len(ids), int(marks.sum()))
        found.append(Encoded(tuple(ids), counts, np.full(len(ids), TOKENS), trained=(marks,) * len(ids)))
    return found


def ours(folder: str) -> tuple[Callable[[list[Encoded]], None], int]:
    """What trains clients, and how many frozen weights there are in the adapted layers."""
    config, schema = configured(folder), Schema(prompts=(("text", ""),))
    pretrained = load_pretrained(config, schema, dtype=dtype_of(config))
    findings = try_pretrained(config, pretrained)
    trainer = make_trainer(config, pretrained, findings, make_task(config).bind(schema, pretrained))
    start = fresh_adapter(trainer.shapes, config.seed, {RANK: config.model.lora_alpha / RANK}, RANK)

    def train(clients: list[Encoded]) -> None:
        list(trainer.train(deque(Job(Train({"shared": start}, AB, epochs=1), own, config.seed, {}) for own in clients)))

    return train, sum(a * b for a, b in trainer.shapes.values())


def peft(folder: str) -> tuple[Callable[[list[Encoded]], None], int]:
    """The same of PEFT on transformers' own 4-bit model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16, device_map={"": 0}).eval()
    config, targets = configured(folder), find_targets(model, "all-linear")
    weights = sum(m.in_features * m.out_features for m in map(model.get_submodule, targets))
    kinds = sorted({path.rpartition(".")[2] for path in targets})
    adapted = peft_loop.adapted(model, RANK, config.model.lora_alpha, kinds)
    start = peft_loop.get_state(adapted)
    loop = peft_lm.LanguageLoop(adapted, config.train, 0, config.seed, torch.device("cuda"), torch.bfloat16)

    def train(clients: list[Encoded]) -> None:
        for id, own in enumerate(clients):
            loop.client(id, own, start, 1)

    return train, weights


def play(side: str, folder: str, steps: int) -> dict[str, float]:
    """One repetition of a side, in this process."""
    train, weights = (ours if side == OURS else peft)(folder)
    clients = examples(steps)
    train([own.take(np.arange(BATCH)) for own in clients])  # warms up
    torch.cuda.synchronize()
    begun = time.perf_counter()
    train(clients)
    torch.cuda.synchronize()
    tokens = CLIENTS * steps * BATCH * TOKENS
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": time.perf_counter() - begun, "tokens": tokens, "weights": weights, "peak": peak}


def main(
    quick: bool = False,
    repetitions: int = 3,
    steps: int = 6,
    side: Annotated[str, typer.Option(help="Play one side once, on the model in --model, and print what it took.")] = "",
    model: str = "",
) -> None:
    """Tokens a second, peak memory and share of the GPU's bf16 peak, ours against PEFT."""
    if not torch.cuda.is_available():
        harness.console.print("gpu-lm: torch sees no GPU here, so nothing is measured and nothing is written")
        return
    if side:
        print(json.dumps(play(side, model, steps)))
        return
    repetitions, steps, layers = (1, 1, 2) if quick else (repetitions, steps, 16)
    found: dict[str, list[dict[str, float]]] = {OURS: [], PEFT: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        save_model(Path(folder), layers)
        torch.cuda.empty_cache()

        def once(name: str) -> Sample:
            command = [sys.executable, "-m", "benchmarks.gpu_lm", "--side", name, "--model", folder, "--steps", str(steps)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            own = found[name][-1]
            return Sample(own["seconds"], CLIENTS * steps * BATCH, int(own["tokens"]))

        measured = harness.interleave({name: partial(once, name) for name in found}, repetitions, "cuda")
    weights = int(found[OURS][0]["weights"])
    rows = harness.speeds(measured, weights, {})
    for row in rows:
        row["peak, GB"] = max(own["peak"] for own in found[row["side"]])
    facts = {
        "work": {"clients": CLIENTS, "steps": steps, "batch": BATCH, "tokens of a row": TOKENS, "layers": layers},
        "frozen weights adapted": weights,
        "peak TFLOP/s": {name: round(x / 1e12, 1) for name, x in measured.peak.items()},
    }
    harness.finish("gpu-lm", f"gpu-lm: Llama 3.2 1B's shape in 4 bits, {CLIENTS} clients, rank {RANK}", rows, facts, quick)


if __name__ == "__main__":
    harness.command(main)
