"""The command of docs/evaluate.md: lm-eval itself, in an environment beside `.venv`, scores an adapter as our run did."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import side
import tiny

from fedlora.config import resolve
from fedlora.runs.export import export
from fedlora.runs.play import execute
from fedlora.tasks import defaults

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evaluate.md"
PATTERN = r"#### (-?[0-9.,]+)"


def command(program: str) -> list[str]:
    """The words of the page's one command of a program."""
    (line,) = re.findall(rf"^\$ ({program} .*)$", PAGE.read_text(), re.MULTILINE)
    return shlex.split(line)


@pytest.fixture(scope="module")
def python() -> Path:
    packages = command("pip")[2:]
    return side.python("lm-eval", packages)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with three choices, the right one of which a model can half learn: the one that comes before the others."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        number = int(draw.integers(1, 4))
        right = f"#### {number if draw.random() < 0.5 else 1},000"
        choices = [right, *(x for x in ("#### 1,000", "#### 2,000", "#### 3,000") if x != right)]
        order = draw.permutation(3)
        found.append(
            {"question": f"{number}?", "choices": [choices[i] for i in order], "answer": int(np.flatnonzero(order == 0)[0])}
        )
    return found


def save(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lm_eval_gives_our_scores(python: Path, tmp_path: Path) -> None:
    model, tokenizer = architectures.causal("llama")
    (tmp_path / "data").mkdir()
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "base")
    test = rows(40, 2)
    save(tmp_path / "data" / "train.jsonl", rows(200, 1))
    save(tmp_path / "data" / "test.jsonl", test)
    tables: dict[str, Any] = {
        "precision": "fp32",
        "task": {"name": "causal_lm", "metrics": ["choice", "exact_match"], "pattern": PATTERN, "max_new_tokens": 64},
        "method": {"name": "fedit"},
        "model": {"source": str(tmp_path / "base")},
        "data": {"source": str(tmp_path / "data"), "partition": "iid", "max_length": 64},
        "clients": {"rank": 8, "count": 2},
        "train": {"rounds": 4, "lr": 0.01, "batch_size": 8},
    }
    final = execute(resolve(defaults(tables), tables), tmp_path / "runs" / "sums", False, tiny.Silent())["final"]
    _, _, run, _, to = command("fedlora")
    assert export(tmp_path / run, tmp_path / to, None, False) == "adapter"
    base = json.loads((tmp_path / to / "fedlora.json").read_text())["base_model"]
    save(tmp_path / "choices.jsonl", test)
    save(tmp_path / "answers.jsonl", [{"question": x["question"], "answer": x["choices"][x["answer"]]} for x in test])
    words = [word.replace("BASE", base).replace("examples/", f"{ROOT}/examples/") for word in command("lm-eval")[1:]]
    environment = side.environment() | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    asked = [python.with_name("lm-eval"), *words]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "scores").rglob("results_*.json")
    scores = json.loads(file.read_text())["results"]
    theirs = scores["fedlora_choices"]["acc,none"], scores["fedlora_answers"]["exact_match,number"]
    assert theirs == pytest.approx((final["choice"], final["exact_match"]))
    assert 0.1 < theirs[0] < 0.95 and 0.1 < theirs[1] < 0.95  # neither a constant nor all
