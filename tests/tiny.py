"""Models and data small enough to train in a test."""

import csv
import io
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fedlora import cli
from fedlora.config import DataConfig, ModelConfig
from fedlora.data.dataset import Dataset, Domain, Schema
from fedlora.data.encoded import Encoded
from fedlora.data.load import load as load_data
from fedlora.models.load import Pretrained
from fedlora.tasks.base import Objective
from fedlora.tasks.metrics import Metric
from fedlora.tasks.text_classification import TextClassification
from fedlora.training.batched import Trainer
from fedlora.training.learner import Job, Outcome
from fedlora.training.score import ScoreJob
from fedlora.types import Model, Tensors

WORDS = [f"w{i}" for i in range(60)] + ["apple", "banana", "cherry"]
CLASSES = ("apple", "banana", "cherry")


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )


def config(kind: str) -> Any:
    """A configuration with feed-forward layers that are not square."""
    common = {"vocab_size": len(WORDS) + 4, "pad_token_id": 0, "num_labels": 3, "initializer_range": 0.2}
    match kind:
        case "bert":
            return transformers.BertConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, **common
            )
        case "roberta":
            return transformers.RobertaConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=40,
                max_position_embeddings=80,
                **common,
            )
        case "distilbert":
            return transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=40, **common)
        case "gpt2":
            return transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=40, bos_token_id=2, eos_token_id=3, **common)
        case "llama":
            return transformers.LlamaConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, **common
            )
    raise ValueError(kind)


def save_model(kind: str, folder: Path) -> Path:
    """Random weights and no classifier: like a pre-trained encoder from the Hub."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config(kind)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of four to twelve words, one of which is the label."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(count):
        words = list(rng.choice(WORDS[:60], rng.integers(4, 12)))
        label = str(rng.choice(CLASSES))
        words.insert(int(rng.integers(len(words))), label)
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def save_data(folder: Path, train: int = 90, test: int = 45) -> Path:
    for part, count, seed in (("train", train, 1), ("test", test, 2)):
        with open(folder / f"{part}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(zip(*examples(count, seed), strict=True))
    return folder


TASK = TextClassification()


def load(config: DataConfig, seed: int) -> Dataset:
    """A data set of texts with classes."""
    return load_data(TASK, config, seed)


def objective(**domains: range) -> Objective:
    """Classification of texts among three classes, or among those of domains."""
    own = tuple(Domain(name, classes.start, len(classes)) for name, classes in domains.items())
    count = max((classes.stop for classes in domains.values()), default=3)
    return TASK.bind(Schema(tuple(f"c{i}" for i in range(count)), own))


def load_model(config: ModelConfig, label_names: Sequence[str], seed: int) -> Pretrained:
    """A classifier of texts."""
    return TASK.load(config, Schema(tuple(label_names)), seed)


def train_one(trainer: Trainer, job: Job) -> Outcome:
    """The outcome of one job alone."""
    ((_, outcome),) = trainer.train(deque([job]))
    return outcome


def logits(trainer: Trainer, model: Model, head: Tensors, data: Encoded) -> np.ndarray:
    """Logits of one model."""
    (found,) = trainer.outputs([ScoreJob(model, head, data)])
    return found


class Silent:
    """Follows a run (`fedlora.listener.Listener`): keeps the notes it hears, and can stop the run after a round."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None: ...

    def begin(self, first: int, last: int, clients: int, metric: Metric) -> None: ...

    def examples(self, count: int) -> None: ...

    def round(self, row: dict[str, Any]) -> None:
        if row["round"] == self.stop_after:
            raise KeyboardInterrupt


def console(monkeypatch: Any, capsys: Any, folder: Path) -> Any:
    """A function that calls the console script in `folder` and returns (exit status, standard output, standard error)."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object, stdin: str | bytes = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, args)])
        given = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        out, err = capsys.readouterr()
        return status, out, err

    return call
