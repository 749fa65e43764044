"""What a language model is scored by: how likely it finds answers, which of several it finds the likeliest, and what it writes.

Sums over examples, by domain, (domains,):

examples, undecided     integers: all examples, and those for which a model gives no finite numbers, which count as if it had
                        guessed each of their tokens
tokens, right           integers: the tokens that the loss is on, and those of them that it finds likeliest
nll                     minus the sum of the logarithms of the probabilities of these tokens
asked, chosen           integers: examples with choices, and those whose right one is the likeliest, by the sum over its tokens
written, matched, overlap   of the answers that it writes, greedily: how many, those that match exactly, and the sum of their
                        ROUGE-L (F, with stems)
base                    what the first metric adds up of these (PARTS), of the pre-trained model instead

An answer matches exactly where it is the same as the given one, spaces at the ends aside; with a pattern, where the last match of
the pattern is the same in both (its first group, where it has one), commas between digits and a full stop at the end aside.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedlora.data.dataset import Schema
from fedlora.data.encoded import Encoded
from fedlora.errors import BadInput
from fedlora.tasks.base import Running
from fedlora.tasks.metrics import Array, Metric, Sums

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("answer_loss", "answer loss", unit="nats a token", better="lower"),
        Metric("perplexity", "perplexity", unit="", better="lower"),
        Metric("token_accuracy", "token accuracy"),
        Metric("exact_match", "exact match"),
        Metric("rouge_l", "ROUGE-L"),
        Metric("choice", "choice accuracy"),
    )
}
WRITTEN = frozenset({"exact_match", "rouge_l"})  # of text that the model writes
COUNTS = ("examples", "undecided", "tokens", "right", "asked", "chosen", "written", "matched")
TOTALS = ("nll", "overlap", "base")
PARTS = {  # metric -> the sum that it is a share of, and of which other
    "answer_loss": ("nll", "tokens"),
    "perplexity": ("nll", "tokens"),
    "token_accuracy": ("right", "tokens"),
    "exact_match": ("matched", "written"),
    "rouge_l": ("overlap", "written"),
    "choice": ("chosen", "asked"),
}


@dataclass(frozen=True)
class Answers:
    """Answers of a language model.

    Attributes:
        chosen: the metrics, the first of which is the one that runs are compared by.
        tokenizer: of the model; None where only metrics are asked for.
        words: how many tokens the model knows.
        limit: the most tokens of an answer that it writes.
    """

    schema: Schema
    chosen: tuple[str, ...]
    tokenizer: Any
    words: int
    limit: int
    pattern: str | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        first, *others = (METRICS[name] for name in self.chosen)
        return (replace(first, baseline=f"base_{first.name}", constant="the base model", model=True), *others)

    @property
    def outputs(self) -> int:
        return 2

    # ---- training ------------------------------------------------------------------------------------------------------

    def within(self, outputs: Tensor, domains: np.ndarray) -> Tensor:
        return outputs

    def losses(self, outputs: Tensor, data: Encoded) -> Tensor:
        counts = outputs.new_tensor(data.targets)
        return outputs[:, 0] / counts

    def weights(self, data: Encoded) -> np.ndarray:
        return data.targets

    # ---- scores --------------------------------------------------------------------------------------------------------

    def zeros(self) -> dict[str, Array]:
        count = max(1, len(self.schema.domains))
        return {name: np.zeros(count, dtype=np.int64) for name in COUNTS} | {name: np.zeros(count) for name in TOTALS}

    def sums(self, outputs: Array, data: Encoded) -> dict[str, Array]:
        decided = np.isfinite(outputs).all(axis=1)
        guessed = data.targets * math.log(max(2, self.words))
        found: dict[str, Array] = {
            "examples": np.ones(len(data), dtype=np.int64),
            "undecided": np.asarray(~decided, dtype=np.int64),
            "tokens": data.targets.astype(np.int64),
            "right": np.where(decided, outputs[:, 1], 0.0).round().astype(np.int64),
            "nll": np.where(decided, outputs[:, 0], guessed).astype(np.float64),
        }
        return self.zeros() | {name: self._by_domain(x, data) for name, x in found.items()}

    def further(self, data: Encoded, model: Running) -> dict[str, Array]:
        found: dict[str, Array] = {}
        if "choice" in self.chosen and data.choices:
            found |= self._choices(data, model)
        if WRITTEN & set(self.chosen) and len(data):
            found |= self._texts(data, model)
        return {name: self._by_domain(x, data) for name, x in found.items()}

    def _choices(self, data: Encoded, model: Running) -> dict[str, Array]:
        """By example: whether it has choices, and whether the first of them, which is right, is likelier than every other."""
        counts = [len(each) for each in data.choices]
        every = [row for each in data.choices for row in rows(each)]
        losses = iter(np.split(model.outputs(joined(every))[:, 0], np.cumsum(counts)[:-1])) if every else iter(())
        each = [next(losses) for _ in counts] if every else [np.zeros(0)] * len(counts)
        best = [len(x) > 0 and bool(np.isfinite(x[0])) and not (x[1:] <= x[0]).any() for x in each]
        return {"asked": (np.array(counts) > 0).astype(np.int64), "chosen": np.array(best).astype(np.int64)}

    def _texts(self, data: Encoded, model: Running) -> dict[str, Array]:
        """By example: what of its answer the model writes."""
        starts = [last_answer(each) for each in data.trained]
        written = model.generate([ids[:start] for ids, start in zip(data.inputs, starts, strict=True)], self.limit)
        given = [ids[start:][mask[start:]] for ids, mask, start in zip(data.inputs, data.trained, starts, strict=True)]
        pairs = [(self._text(a), self._text(b)) for a, b in zip(written, given, strict=True)]
        found: dict[str, Array] = {"written": np.ones(len(data), dtype=np.int64)}
        if "exact_match" in self.chosen:
            found["matched"] = np.array([matches(a, b, self.pattern) for a, b in pairs]).astype(np.int64)
        if "rouge_l" in self.chosen:
            found["overlap"] = np.array([rouge_l(a, b) for a, b in pairs])
        return found

    def _text(self, ids: Array) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def constant(self, data: Encoded, otherwise: Array | None = None) -> Array:
        return np.zeros(max(1, len(self.schema.domains)))

    def of_constant(self, constant: Array, data: Encoded, base: Running) -> dict[str, Array]:
        """Of the base model, for what a language model can do before it is tuned is more than any constant answer."""
        name, _ = PARTS[self.chosen[0]]
        if name in ("nll", "right"):
            sums = self.sums(base.outputs(data), data)
        else:
            sums = replace(self, chosen=self.chosen[:1]).further(data, base)
        return {"base": sums[name].astype(np.float64)} if name in sums else {}

    def _by_domain(self, values: Array, data: Encoded) -> Array:
        """The sum of values (n,) in each domain."""
        found = np.zeros(max(1, len(self.schema.domains)), dtype=values.dtype)
        np.add.at(found, data.domain_index, values)
        return found

    def scores(self, sums: Sums) -> dict[str, float]:
        return {name: _score(name, *(sums[part] for part in PARTS[name])) for name in self.chosen}

    def baseline(self, sums: Sums) -> float:
        return _score(self.chosen[0], sums["base"], sums[PARTS[self.chosen[0]][1]])

    def count(self, sums: Sums) -> int:
        return int(sums["examples"].sum())

    def undecided(self, sums: Sums) -> int:
        return int(sums["undecided"].sum())

    def by_domain(self, sums: Sums) -> dict[str, float]:
        own = {
            domain.name: self.scores({name: x[t : t + 1] for name, x in sums.items()})[self.chosen[0]]
            for t, domain in enumerate(self.schema.domains)
        }
        return {name: score for name, score in own.items() if score == score}

    def arrays(self, sums: Sums) -> dict[str, Array]:
        return {}


def _score(name: str, part: Array, whole: Array) -> float:
    """A metric by its parts (PARTS); nan where there are no examples for it."""
    share = float(part.sum()) / int(whole.sum()) if whole.sum() else math.nan
    return math.exp(min(share, 700.0)) if name == "perplexity" else share


def last_answer(trained: Array) -> int:
    """Where the last run of trained tokens begins."""
    last = int(np.flatnonzero(trained)[-1])
    before = np.flatnonzero(~trained[:last])
    return int(before[-1]) + 1 if len(before) else 0


def rows(data: Encoded) -> list[Encoded]:
    """Each example by itself."""
    return [data.take(np.array([i])) for i in range(len(data))]


def joined(parts: list[Encoded]) -> Encoded:
    """The examples of all, without domains."""
    inputs, trained = (tuple(x for part in parts for x in getattr(part, name)) for name in ("inputs", "trained"))
    targets, sizes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("targets", "sizes"))
    return Encoded(inputs, targets, sizes, trained=trained)


def matches(written: str, given: str, pattern: str | None) -> bool:
    """Whether two answers are the same."""
    one, other = extracted(written, pattern), extracted(given, pattern)
    return one is not None and one == other


def extracted(text: str, pattern: str | None) -> str | None:
    """What of an answer counts; None where the pattern is not found in it."""
    if pattern is None:
        return text.strip()
    last = None
    for last in re.finditer(pattern, text):  # noqa: B007
        pass
    if last is None:
        return None
    found = (last.group(1) if last.re.groups else last.group()) or ""
    return re.sub(r"(?<=\d),(?=\d)", "", found).strip().rstrip(".")


def rouge_l(written: str, given: str) -> float:
    """The F measure of the longest common subsequence of words, stemmed. BadInput where the package is missing."""
    return float(_scorer().score(given, written)["rougeL"].fmeasure)


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise BadInput("task.metrics: rouge_l needs the package rouge-score: pip install 'fedlora[rouge]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)
