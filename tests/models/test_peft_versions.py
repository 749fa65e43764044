"""What runs leave, read by others: by plain PEFT of three versions and by plain transformers, and by the lines of its model card.

`scripts/setup` puts each PEFT into a folder of its own; first on PYTHONPATH, it stands before the installed one.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny import Silent

from fedlora import methods
from fedlora.config import resolve, to_toml
from fedlora.errors import BadInput
from fedlora.models.load import PACKAGED, Packaged
from fedlora.runs import play
from fedlora.runs.export import export, read_result
from fedlora.runs.predict import predict
from fedlora.runs.prepare import load_pretrained, make_task, make_trainer, try_pretrained
from fedlora.tasks.texts import encode
from fedlora.training.score import ScoreJob
from fedlora.types import Model

VERSIONS = ("0.18.1", "0.20.0", "0.21.2")
KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama")
SCRIPT = Path(__file__).with_name("load_adapters.py")
LIMIT = 16  # tokens: the last text is longer
TEXTS = [*tiny.examples(8, 5)[0], " ".join(tiny.WORDS[:40])]


def save_base(
    folder: Path, kind: str, rows: int | None = None, padding: bool = True, types: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """A pre-trained model of a kind.

    Args:
        rows: of its embedding, if more than its tokenizer has words.
        padding: whether it names a padding token. Many decoders do not, and some tokenizers of theirs append the end of text, with
            which one would pad.
        types: whether its tokenizer gives token types, too.
        dtype: of its weights.
    """
    config, words = tiny.config(kind), tiny.tokenizer()
    config.vocab_size = rows or config.vocab_size
    if not padding:
        config.pad_token_id, words.pad_token, words.eos_token = None, None, "[SEP]"
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    if types:
        file = folder / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | names))
    return folder


def tables(base: Path, data: Path, name: str = "fedit", rank: int | None = None, head: str = "frozen") -> dict[str, Any]:
    """A run of two rounds; where a method allows it, and no rank is asked for, clients have different ranks."""
    mixed = methods.find(name).FACTS.mixed_ranks
    return {
        "precision": "fp32",
        "method": {"name": name},
        "model": {"source": str(base), "head": head},
        "data": {"source": str(data), "alpha": 1.0, "max_length": LIMIT},
        "clients": {"count": 4, "rank": rank or ([2, 3, 2, 4] if mixed else 2)},
        "train": {"rounds": 2, "batch_size": 8, "lr": 1e-2},
    }


def own_logits(folder: Path, client: int | None = None, texts: Sequence[str] = TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """The logits of texts that `fedlora predict` works with, and those of the base with the same head."""
    config, roster, result, head = read_result(folder, client)
    pretrained = load_pretrained(config, roster.schema)
    findings = try_pretrained(config, pretrained)
    data = encode(pretrained.processor, texts, np.zeros(len(texts), dtype=np.int64), LIMIT)
    asked = [ScoreJob(model, head, data) for model in (result, Model())]
    mine, base = make_trainer(config, pretrained, findings, make_task(config).bind(roster.schema)).outputs(asked)
    return mine, base


def under(version: str) -> dict[str, str]:
    """The environment of a process that imports this PEFT."""
    folder = Path(sys.prefix) / f"peft-{version}"
    assert folder.is_dir(), f"{folder} is missing: run scripts/setup"
    return os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def read(version: str, folders: dict[str, Path], place: Path) -> dict[str, list[np.ndarray]]:
    """What one process with this PEFT makes of exported folders: name -> logits of TEXTS, each alone and all padded."""
    job, answer = place / "job.json", place / "answer.json"
    job.write_text(json.dumps({"folders": {name: str(folder) for name, folder in folders.items()}, "texts": TEXTS}))
    command = [sys.executable, SCRIPT, job, answer]
    done = subprocess.run(command, cwd=place, env=under(version), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(answer.read_text())
    assert found["peft"] == version
    return {name: [np.array(rows) for rows in each] for name, each in found["logits"].items()}


def off(mine: np.ndarray, theirs: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(mine - each).max()) for each in theirs)


@pytest.mark.slow
def test_an_adapter_finds_its_base_and_gives_the_same_logits_under_the_oldest_peft(
    bert_folder: Path, csv_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is a folder named by how one gets there, and who reads the adapter is elsewhere."""
    monkeypatch.chdir(bert_folder.parent)
    play.execute(resolve(tables(Path(bert_folder.name), csv_folder, head="shared")), tmp_path / "run", False, Silent())
    mine, base = own_logits(tmp_path / "run")
    found = read(VERSIONS[0], {"fedit": tmp_path / "run" / "adapter"}, tmp_path)
    assert off(mine, found["fedit"]) < 1e-5 < 1e-2 < np.abs(mine - base).max()


def test_an_adapter_names_a_packaged_base_by_its_hub_id(csv_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_a_model").mkdir()
    (tmp_path / "package_of_a_model" / "__init__.py").touch()
    save_base(tmp_path / "package_of_a_model" / "files", "bert")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGED, "minilm", Packaged("package_of_a_model", "files", "somebody/something", "it"))
    play.execute(resolve(tables(Path("minilm"), csv_folder)), tmp_path / "run", False, Silent())
    config, facts = (json.loads((tmp_path / "run/adapter" / name).read_text()) for name in ("adapter_config.json", "fedlora.json"))
    assert config["base_model_name_or_path"] == facts["base_model"] == "somebody/something"


class Results:
    """Runs of every method and kind of model, and what they left and exported.

    Attributes:
        folders: name -> the exported folder.
        logits: name -> fedlora's own logits of TEXTS.
        change: run -> how far its models' logits are from the base's, the largest of all.
        refused: (run, client) -> why there is no export.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.data = place, tiny.save_data(place)
        self.folders: dict[str, Path] = {}
        self.logits: dict[str, np.ndarray] = {}
        self.change: dict[str, float] = {}
        self.refused: dict[tuple[str, int | None], str] = {}

    def play(self, name: str, base: Path, /, **settings: Any) -> None:
        config = resolve(tables(base, self.data, **settings))
        out = self.place / name
        kind = play.execute(config, out, False, Silent())["result"]
        personal = methods.find(config.method.name).FACTS.personal or settings.get("head") == "personal"
        for client in (None, 0, 1) if personal else (None,):
            mine, before = own_logits(out, client)
            self.change[name] = max(self.change.get(name, 0.0), float(np.abs(mine - before).max()))
            if client is None and kind != "checkpoint":
                self._keep(name, out / kind, mine)
            for merged in (False, True):
                to = self.place / f"{name}, {'all' if client is None else f'client {client}'}{', merged' if merged else ''}"
                try:
                    export(out, to, client, merged)
                except BadInput as error:
                    self.refused[name, client] = str(error)
                    assert not to.exists()
                else:
                    self._keep(to.name, to, mine)

    def _keep(self, name: str, folder: Path, mine: np.ndarray) -> None:
        self.folders[name], self.logits[name] = folder, mine


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    place = tmp_path_factory.mktemp("results")
    bases = {kind: save_base(place / f"{kind}-base", kind) for kind in KINDS}
    found = Results(place)
    for name in methods.names():
        found.play(name, bases["bert"], name=name)
    for kind in KINDS:
        for head in ("frozen", "shared"):
            found.play(f"{kind} {head}", bases[kind], head=head)
    found.play("personal head", bases["bert"], head="personal")
    # Pairs merged into the base make an adapter while they are few; the keys' and values' layers are smaller than the others.
    found.play("stack", bases["llama"], name="flora", rank=1)
    found.play("stack of another rank in each module", bases["llama"], name="flora", rank=2)
    found.play("spare rows", save_base(place / "rows-base", "bert", rows=80))
    found.play("token types", save_base(place / "types-base", "gpt2", types=True))
    found.play("half precision", save_base(place / "half-base", "llama", dtype=torch.bfloat16))
    for kind in ("gpt2", "llama"):
        found.play(f"{kind} that names no padding token", save_base(place / f"{kind}-bare", kind, padding=False))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_result_gives_the_same_logits(version: str, results: Results, tmp_path: Path) -> None:
    found = read(version, results.folders, tmp_path)
    assert found.keys() == results.logits.keys()
    wrong = {name: off(mine, found[name]) for name, mine in results.logits.items()}
    assert {name: by for name, by in wrong.items() if not by < 1e-5} == {}
    assert {name: by for name, by in results.change.items() if not by > 1e-2} == {}


@pytest.mark.slow
def test_only_what_depends_on_the_input_is_refused_by_export(results: Results) -> None:
    """FedLEASE routes for everybody; FedDPA weighs a client's own adapter by its input, and has one for all beside it."""
    assert set(results.refused) == {("fedlease", None), ("fedlease", 0), ("fedlease", 1), ("feddpa", 0), ("feddpa", 1)}
    assert all("for each input" in why and "\n" not in why for why in results.refused.values())
    personal = [name for name in methods.names() if methods.find(name).FACTS.personal]
    for name in [*personal, "personal head"]:
        own = [results.logits.get(f"{name}, client {client}") for client in (0, 1)]
        if name in ("feddpa", "fedlease"):
            assert own == [None, None]
        elif name != "fl-tac":  # whose clients of one task may be of one cluster
            assert np.abs(own[0] - own[1]).max() > 1e-3, name


CARDS = (
    "bert shared",
    "spare rows",
    "token types",
    "half precision",
    "gpt2 that names no padding token",
    "llama that names no padding token",
)


def follow_card(results: Results, name: str, folder: Path, environment: dict[str, str]) -> None:
    """Its lines, run in its folder on some more texts, print what `fedlora predict` says; and it says what it is of."""
    card, given = (folder / "README.md").read_text(), '["a text", "another"]'
    lines = card.split("```python\n")[1].split("```")[0]
    assert given in lines
    texts = ["a text", "another", *TEXTS]
    lines = lines.replace(given, repr(texts)) + "print(logits.tolist())"
    done = subprocess.run([sys.executable, "-c", lines], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels, logits = map(ast.literal_eval, done.stdout.splitlines()[-2:])
    said = [answer["label"] for answer in predict(results.place / name, texts)]
    assert labels == said and len(set(said)) > 1
    assert off(own_logits(results.place / name, texts=texts)[0], [np.array(logits)]) < 1e-5
    accuracy = json.loads((results.place / name / "summary.json").read_text())["final"]["accuracy"]
    for row in (f"accuracy | {100 * accuracy:.1f} %", "method | FedIT", f"data | {results.data.name}", "rounds | 2"):
        assert f"| {row}" in card, row
    facts = json.loads((folder / "fedlora.json").read_text())
    classes = {str(i): label for i, label in enumerate(sorted(tiny.CLASSES))}
    assert (facts["num_labels"], facts["id2label"], facts["max_length"]) == (3, classes, LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_lines_of_an_adapters_card_give_what_predict_says(version: str, name: str, results: Results) -> None:
    follow_card(results, name, results.place / name / "adapter", under(version))


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_the_lines_of_a_models_card_give_what_predict_says(name: str, results: Results) -> None:
    follow_card(results, name, results.folders[f"{name}, all, merged"], dict(os.environ))


@pytest.mark.slow
def test_equal_runs_give_equal_bytes(csv_folder: Path, tmp_path: Path) -> None:
    """Whatever the hashes of the process; `export` gives them again."""
    base = save_base(tmp_path / "base", "llama")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(resolve(tables(base, csv_folder, name="flora", rank=1, head="shared"))))
    command = [Path(sys.executable).with_name("fedlora"), "run", recipe, "--out"]
    for hashes in ("1", "2"):
        subprocess.run([*command, tmp_path / hashes], env=os.environ | {"PYTHONHASHSEED": hashes}, check=True, capture_output=True)
    assert export(tmp_path / "1", tmp_path / "again", None, False) == "adapter"
    first, second, again = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("1/adapter", "2/adapter", "again")
    )
    assert {"adapter_config.json", "adapter_model.safetensors", "fedlora.json", "README.md", "tokenizer.json"} <= first.keys()
    assert first == second == again
    targets = json.loads(first["adapter_config.json"])["target_modules"]
    assert len(targets) == 14 and targets == sorted(targets)
