"""fedlora from Python: what the command line does, bit for bit, with data, models and methods that are at hand."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import fedlora
from fedlora import BadInput, Data, RunFailed, api
from fedlora.arguments import name_of
from fedlora.comparison import run as run_comparison
from fedlora.data.given import given, write
from fedlora.methods import make
from fedlora.methods.fedit import FedIT
from fedlora.methods.lora_a2 import LoRAA2
from fedlora.models.load import Given
from fedlora.runs.export import export

TEXTS, LABELS = tiny.examples(60, 1)
COLUMNS = {"text": TEXTS, "label": LABELS}
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
SETTINGS = {"train.lr": 5e-3, "data.max_length": 16, "precision": "fp32"}


class Frame:
    """A data frame of no package that is known: no more than Arrow's interface and names of columns."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.columns = table, table.column_names

    def __arrow_c_stream__(self, schema: object = None) -> object:
        return self.table.__arrow_c_stream__(schema)


class FakeDataset:
    """What is used of a `datasets.Dataset`: Arrow's format, and the names of its classes."""

    def __init__(self, table: pa.Table, names: list[str] | None = None) -> None:
        self.table, self.features = table, {"text": object(), "label": type("ClassLabel", (), {"names": names})}

    def with_format(self, kind: str) -> Any:
        assert kind == "arrow"
        return type("Arrow", (), {"__getitem__": lambda _, where: self.table})()


def small(bert_folder: Path, **arguments: Any) -> fedlora.Run:
    known = {"model": bert_folder, "method": "fedit", "rank": 2, "clients": 3, "rounds": 2, "data": COLUMNS, "settings": SETTINGS}
    return fedlora.run(**{**known, "progress": False, **arguments})


def weights(run: fedlora.Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


def same(one: fedlora.Run, other: fedlora.Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def base(bert_folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(bert_folder)


@pytest.fixture(scope="module")
def plain(bert_folder: Path) -> fedlora.Run:
    """Data and model of the kinds that need no file, without a folder."""
    return small(bert_folder)


# ---- the same bits as the command line ---------------------------------------------------------------------------------


def test_the_command_line_gives_the_same_bits(
    plain: fedlora.Run, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    pa.csv.write_csv(pa.table(COLUMNS), tmp_path / "data" / "train.csv")
    call = tiny.console(monkeypatch, capsys, tmp_path)
    options = [x for key, value in SETTINGS.items() for x in ("--set", f"{key}={value}")]
    flags = ("--data", "data", "--model", bert_folder, "--method", "fedit", "--rank", 2, "--clients", 3, "--rounds", 2)
    status, _, err = call("run", *flags, *options, "--out", "run", "--quiet")
    assert status == 0, err
    told = fedlora.load(tmp_path / "run")
    assert same(plain, told)
    for ours, theirs in zip(plain.rows, told.rows, strict=True):
        assert {k: v for k, v in ours.items() if not k.endswith("_s")} == {k: v for k, v in theirs.items() if not k.endswith("_s")}
    assert plain.predict(TEXTS[:3]) == told.predict(TEXTS[:3])


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        pa.table(COLUMNS),
        Frame(pa.table(COLUMNS)),
        FakeDataset(pa.table(COLUMNS)),
        Data(COLUMNS),
        {"train": pa.table(COLUMNS)},
        {"text": np.array(TEXTS), "label": np.array(LABELS)},
    ],
    ids=["rows", "arrow", "frame", "dataset", "data", "parts", "arrays"],
)
def test_every_kind_of_table_is_the_same_table(data: Any, tmp_path: Path) -> None:
    found = given(data)
    assert isinstance(found, Data)
    write(found, tmp_path / "data", "label", None)
    assert pa.parquet.read_table(tmp_path / "data" / "train.parquet").to_pylist() == ROWS


def test_a_data_set_knows_the_names_of_its_classes(tmp_path: Path) -> None:
    numbers = pa.table({"text": ["a", "b"], "label": [1, 0]})
    write(Data(FakeDataset(numbers, ["no", "yes"])), tmp_path / "own", "label", None)
    assert json.loads((tmp_path / "own" / "labels.json").read_text()) == ["no", "yes"]
    write(Data(numbers, label_names=["x", "y"]), tmp_path / "said", "label", None)
    assert json.loads((tmp_path / "said" / "labels.json").read_text()) == ["x", "y"]


def test_names_of_data_are_names(tmp_path: Path) -> None:
    assert given("banking77") == "banking77" and given(tmp_path) == str(tmp_path)
    assert given(["a.csv", Path("b.csv")]) == ["a.csv", "b.csv"]


def test_data_by_client(bert_folder: Path) -> None:
    own = {"north": Data(ROWS[:20], ROWS[20:25]), "south": Data(ROWS[25:50], ROWS[50:])}
    run = small(bert_folder, data=own, clients=None, rounds=1)
    found = json.loads((run.folder / "federation.json").read_text())["clients"]
    assert [(c["name"], c["num_examples"], c["num_test"]) for c in found] == [("north", 20, 5), ("south", 25, 10)]
    listed = small(bert_folder, data=[ROWS[:20], ROWS[25:50]], clients=None, rounds=1)
    assert [c["name"] for c in json.loads((listed.folder / "federation.json").read_text())["clients"]] == ["client 0", "client 1"]


# ---- models and methods that are at hand -------------------------------------------------------------------------------


def test_a_model_that_is_given_is_the_named_one_and_stays_as_it_was(plain: fedlora.Run, base: Any) -> None:
    before = {name: x.clone() for name, x in base.state_dict().items()}
    words = tiny.tokenizer()
    run = small(Path(), model=base, tokenizer=words)
    assert same(plain, run) and run.predict(TEXTS[:3]) == plain.predict(TEXTS[:3])
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items()) and base.config.num_labels == 3
    assert words.model_max_length == 64 and words.padding_side == "right"
    classifier = transformers.BertForSequenceClassification.from_pretrained(None, config=base.config, state_dict=plain_of(base))
    head = classifier.classifier.weight.clone()
    assert same(plain, small(Path(), model=classifier, tokenizer=words)) and torch.equal(head, classifier.classifier.weight)


def plain_of(base: Any) -> dict[str, torch.Tensor]:
    return {f"bert.{name}": x for name, x in base.state_dict().items()}


def test_the_model_is_a_peft_model_with_the_answers_of_predict(plain: fedlora.Run, bert_folder: Path, tmp_path: Path) -> None:
    model, words = plain.model(), transformers.AutoTokenizer.from_pretrained(plain.folder / "adapter")
    assert isinstance(model, peft.PeftModel) and not model.training
    with torch.no_grad():
        found = model(**words(TEXTS[:9], truncation=True, padding=True, return_tensors="pt")).logits.softmax(1)
    said = [list(answer["probabilities"].values()) for answer in plain.predict(TEXTS[:9])]
    np.testing.assert_allclose(found, said, atol=1e-5)
    assert plain.save_adapter(tmp_path / "to") == tmp_path / "to" and (tmp_path / "to" / "adapter_model.safetensors").exists()
    with pytest.raises(BadInput, match="exists already"):
        plain.save_adapter(tmp_path / "to")


def test_the_model_of_one_client(bert_folder: Path) -> None:
    run = small(bert_folder, method="fedsa-lora")
    one, other = (peft.get_peft_model_state_dict(run.model(client=k)) for k in (0, "client 1"))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(BadInput, match="give client"):
        run.predict(TEXTS[:1])
    whole = small(bert_folder, method="fedavg", rounds=1).model()
    assert isinstance(whole, transformers.BertForSequenceClassification)


@dataclass(frozen=True)
class Mine(FedIT):
    """A method of this file."""

    shrink: float = 0.5


def test_a_method_itself(plain: fedlora.Run, bert_folder: Path) -> None:
    assert same(plain, small(bert_folder, method=FedIT()))
    table = api.as_table(LoRAA2(global_rank=8))
    assert (table["name"], table["global_rank"], table["criterion"]) == ("lora-a2", 8, "contribution")
    assert make("lora-a2", {key: value for key, value in table.items() if key != "name"}) == LoRAA2(global_rank=8)
    assert api.as_table(LoRAA2) == {"name": "lora-a2"} and api.as_table({"name": "flora"}) == {"name": "flora"}
    table = api.as_table(Mine(shrink=0.25))
    assert table["shrink"] == 0.25 and table["name"] == f"{__name__}:Mine"


# ---- what goes on, and going on ----------------------------------------------------------------------------------------


def test_stopped_by_a_function_the_round_is_the_result(bert_folder: Path) -> None:
    heard: list[int] = []

    def enough(row: dict[str, Any]) -> bool:
        heard.append(row["round"])
        return row["round"] == 2

    run = small(bert_folder, rounds=5, on_round=enough)
    assert heard == [1, 2] == [row["round"] for row in run.rows]
    assert run.summary is not None and run.summary["stopped_early"] and run.summary["written"]["round"] == 2
    assert same(run, small(bert_folder, rounds=2))


def test_a_run_that_was_told_to_stop_is_scored_and_goes_on(bert_folder: Path, tmp_path: Path) -> None:
    """It was stopped at a round that is no round to score, and then ends with the bits of one that was not stopped."""
    rare = {**SETTINGS, "train.evaluate_every": 3}
    whole = small(bert_folder, settings=rare, rounds=3)
    told: dict[str, Any] = {"settings": rare, "out": tmp_path / "run"}
    run = small(bert_folder, **told, rounds=3, on_round=lambda row: np.bool_(True))
    assert [row["score"] is not None for row in run.rows] == [True] and run.summary["final"]["score"] == run.rows[0]["score"]
    first = small(bert_folder, settings=SETTINGS, rounds=1)
    assert {key: x for key, x in run.rows[0].items() if not key.endswith("_s")} == {
        key: x for key, x in first.rows[0].items() if not key.endswith("_s")
    }
    assert run.summary["stopped_early"] and run.summary["totals"]["evaluate_s"] > 0
    rest = small(bert_folder, **told, rounds=3, resume=True)
    assert same(whole, rest) and [row["score"] is not None for row in rest.rows] == [True, False, True]
    with pytest.raises(BadInput, match="started with other data"):
        small(bert_folder, **told, rounds=3, resume=True, data=ROWS[:30])  # though there is nothing left to play
    assert any("nothing to do" in note for note in small(bert_folder, **told, rounds=3, resume=True, data=ROWS).notes)


def test_a_model_that_is_given_is_told_by_its_tokenizer_too(base: Any, tmp_path: Path) -> None:
    words, other = tiny.tokenizer(), tiny.tokenizer()
    given, name = Given(base, words), Given(base, tiny.tokenizer()).source
    words(["w1 w2", "w3"], padding=True, truncation=True, max_length=2)  # leaves its marks in a tokenizer
    assert given.source == name
    other.add_tokens(["w60"])
    shorter = tiny.tokenizer()
    shorter.model_max_length = 8
    assert len({name, Given(base, other).source, Given(base, shorter).source}) == 3
    # A run of an earlier version has a name for its weights alone.
    (tmp_path / "config.toml").write_text(f'[model]\nsource = "{given.earlier}"\n[method]\n[data]\n[clients]\n[train]\n')
    assert given.earlier == name[: len(given.earlier)] != name
    assert fedlora.load(tmp_path, base, words).config.model.source == given.earlier
    assert name_of(given, tmp_path) == given.earlier and name_of(given, None) == name
    with pytest.raises(BadInput, match=r"was made with given:bert:\w+, and this is minilm; a model that was given itself"):
        fedlora.load(tmp_path, "minilm")


def test_what_no_argument_can_be(plain: fedlora.Run, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line, in the words of Python, before anything is done."""
    folder, words = tmp_path / "folder.html", tiny.tokenizer()
    folder.mkdir()
    compare = partial(fedlora.compare_methods, ["fedit"], data=ROWS)
    with torch.device("meta"):
        empty = transformers.BertModel(base.config)
    calls: dict[str, Any] = {
        "on_round: int is no function of a row": lambda: fedlora.run(on_round=5),
        "resume: it needs out": lambda: fedlora.run(resume=True),
        "out: 5 is no path": lambda: fedlora.run(out=5),
        "folder: 5 is no path": lambda: fedlora.load(5),
        "settings: 5 is no mapping of keys": lambda: fedlora.run(settings=5),
        "settings: 'train.lr=1' is no mapping": lambda: fedlora.run(settings="train.lr=1"),
        r"settings: \{5: 'a b": lambda: fedlora.run(settings={5: "a b" * 99}),
        "settings: array": lambda: fedlora.run(settings=np.zeros((9, 9))),
        "tokenizer: str is none of transformers'": lambda: fedlora.run(model=base, tokenizer="name"),
        "model: BertModel has no weights": lambda: fedlora.run(model=empty, tokenizer=words),
        "methods: a list is needed": lambda: fedlora.compare_methods("fedit"),
        "jobs = -1: a number": lambda: compare(jobs=-1),
        "jobs = '2': a number": lambda: compare(jobs="2"),
        "jobs = 0: a number": lambda: compare(jobs=0),
        "out /proc/x: cannot be written": lambda: compare(out="/proc/x"),
        "is not empty and holds no comparison; use another out": lambda: compare(out=plain.folder),
        "to /proc/x: cannot be written": lambda: plain.save_adapter("/proc/x"),
        "html .* is a folder": lambda: plain.report(folder),
        "html /proc/x.html: cannot be written": lambda: plain.report("/proc/x.html"),
        "text 2 is none, but None": lambda: plain.predict(["a", None]),
        "inputs: int is no list of texts": lambda: plain.predict(5),
        "^client 9: the run has clients 0 to 2": lambda: plain.predict(["a"], client=9),
        "exists already; give resume=True to go on with it, or another out": lambda: fedlora.run(data=ROWS, out=plain.folder),
    }
    for says, call in calls.items():
        with pytest.raises(BadInput, match=says) as error:
            call()
        assert "\n" not in str(error.value) and "--" not in str(error.value), says
    assert not [file for file in tmp_path.rglob("*") if file != folder] and not (plain.folder / ".given").exists()
    assert plain.predict(TEXTS[0]) == plain.predict({"text": TEXTS[:1]}) == plain.predict(TEXTS[:1]) and plain.predict([]) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plain.save_adapter("~/adapter") == tmp_path / "adapter" and (tmp_path / "adapter").is_dir()


def test_reports_beside_each_other_keep_their_pictures_apart(
    plain: fedlora.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    monkeypatch.setattr("fedlora.report.html.write", lambda page, html, figures: places.append(figures))
    for name in ("a.html", "b.html", "report.html"):
        plain.report(tmp_path / name)
    assert [place.name for place in places] == ["a-figures", "b-figures", "figures"]


def test_stopped_and_resumed_with_what_was_at_hand(base: Any, tmp_path: Path) -> None:
    """A run of a model, data and a method of this process is stopped, goes on, and is exported."""
    at_hand = {"model": base, "tokenizer": tiny.tokenizer(), "method": FedIT()}
    whole = small(Path(), **at_hand, rounds=4)

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(Path(), **at_hand, rounds=4, out=tmp_path / "run", on_round=stop)
    assert fedlora.load(tmp_path / "run", base, tiny.tokenizer()).summary is None
    # Its data is in its folder, so it need not be given again.
    rest = fedlora.run(out=tmp_path / "run", resume=True, model=base, tokenizer=tiny.tokenizer(), progress=False)
    assert same(whole, rest) and len(rest.rows) == 4
    again = fedlora.load(tmp_path / "run", base, tiny.tokenizer())
    assert again.predict(TEXTS[:2]) == whole.predict(TEXTS[:2])
    export(tmp_path / "run", tmp_path / "to", None, False, again._given)
    assert (tmp_path / "to" / "adapter_model.safetensors").exists()
    more = fedlora.run(out=tmp_path / "run", resume=True, model=base, tokenizer=tiny.tokenizer(), rounds=5, progress=False)
    assert len(more.rows) == 5
    same_data = small(Path(), **at_hand, rounds=5, out=tmp_path / "run", resume=True)  # complete: nothing to do
    assert any("nothing to do" in note for note in same_data.notes)


def test_what_is_refused(base: Any, bert_folder: Path, tmp_path: Path) -> None:
    words = tiny.tokenizer()
    out = tmp_path / "run"
    small(Path(), model=base, tokenizer=words, out=out)
    for match, arguments in {
        "exists already; give resume=True": {"model": base, "tokenizer": words, "out": out},
        r"train\.lr was 0\.005, now 0\.1": {
            "model": base,
            "tokenizer": words,
            "out": out,
            "resume": True,
            "settings": {"train.lr": 0.1},
        },
        "it can be raised, not lowered": {"model": base, "tokenizer": words, "out": out, "resume": True, "rounds": 1},
        "started with other data": {"model": base, "tokenizer": words, "out": out, "resume": True, "rounds": 3, "data": ROWS[:30]},
        "there is no run in": {"out": tmp_path / "nothing", "resume": True},
        "is no model of transformers": {"model": torch.nn.Linear(2, 2)},
        "it goes with a model that is given itself": {"tokenizer": words},
        "list is no table": {"data": [1, 2]},
        "no column 'text'": {"data": {"body": ["a", "b"], "label": ["x", "y"]}},
        "str is no method|unknown method": {"method": "fedlit"},
        "int is no method": {"method": 3},
        "unknown config key": {"settings": {"train.rate": 1}},
        "a recipe for several runs": {"recipe": "table1"},
        "the clients' tables do not fit together|has a column 'client'": {
            "data": [{"text": ["a"], "label": ["x"], "client": ["k"]}] * 2
        },
        "1 of 2 clients have a test part": {"data": {"a": Data(ROWS[:9], ROWS[:2]), "b": Data(ROWS[9:])}},
    }.items():
        with pytest.raises(BadInput, match=match) as error:
            small(bert_folder, **arguments)
        assert "\n" not in str(error.value), match
    changed = transformers.BertModel(base.config)
    with pytest.raises(BadInput, match=r"model\.source was 'given:bert:\w+', now 'given:bert:"):
        small(Path(), model=changed, tokenizer=words, out=out, resume=True)
    with pytest.raises(BadInput, match="this model was given in Python, and only there"):
        fedlora.run(out=out, resume=True, rounds=3, progress=False)
    with pytest.raises(BadInput, match="this model was given in Python"):
        fedlora.load(out).predict(TEXTS[:1])
    with pytest.raises(BadInput, match=r"the run in .* was made with given:bert"):
        fedlora.load(out, changed, words)
    with pytest.raises(BadInput, match="is no run folder"):
        fedlora.load(tmp_path).config  # noqa: B018
    with pytest.raises(BadInput, match="give its tokenizer"):
        nowhere = transformers.BertModel(transformers.BertConfig.from_dict(base.config.to_dict() | {"_name_or_path": ""}))
        small(Path(), model=nowhere)
    with pytest.raises(BadInput, match="holds an adapter already"):
        small(Path(), model=peft.get_peft_model(transformers.BertModel(base.config), peft.LoraConfig(target_modules=["query"])))


def test_a_run_that_fails_says_so(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"lower train\.lr may help"):
        small(bert_folder, settings={**SETTINGS, "train.optimizer": "sgd", "train.lr": 1e6}, out=tmp_path / "run")
    assert fedlora.load(tmp_path / "run").summary is None


def test_without_a_folder_nothing_is_left(bert_folder: Path) -> None:
    run = small(bert_folder, rounds=1)
    folder = run.folder
    assert folder.exists()
    del run
    assert not folder.exists()


# ---- what is shown ------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_answer_and_a_picture(plain: fedlora.Run) -> None:
    page = plain._repr_html_()
    assert page.startswith("<p>FedIT reaches ") and page.count("<svg") == 1 and "<script" not in page
    assert str(plain).startswith("accuracy ") and repr(plain).startswith("Run(folder=")
    assert plain.report().name == "report.html"


def test_progress_is_shown_or_not(bert_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small(bert_folder, rounds=1)
    out, err = capsys.readouterr()
    assert not out and not err.replace("\r", "").strip().startswith("note") and any("held out" in note for note in run.notes)
    small(bert_folder, rounds=1, progress=True)
    out, err = capsys.readouterr()
    assert "round 1/1  accuracy" in out and "note: " in err


def test_a_comparison_is_the_recipe_that_its_arguments_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        run_comparison, "play_recipe", lambda plan, out, jobs, quiet, note: asked.append((plan.tables, out, jobs, quiet)) or (3, 4)
    )
    data = Data.by_client({"a": ROWS[:9], "b": ROWS[9:]}, name="shops")
    found = fedlora.compare_methods(
        ["fedit", Mine()],
        data=data,
        model="minilm",
        out=tmp_path / "two",
        jobs=2,
        rank=[1, 2],
        seed=[0, 1],
        rounds=[3, 4],
        settings={"train": {"lr": 0.1}, "data.text": "text"},
    )
    ((tables, out, jobs, quiet),) = asked
    kept = tmp_path / "two" / ".given" / "shops"
    assert (found.failed, out, jobs, quiet) == (3, tmp_path / "two", 2, False) and pa.parquet.read_table(
        kept / "train.parquet"
    ).num_rows == 60
    assert tables == {
        "method": [{"name": "fedit"}, {"name": f"{__name__}:Mine", "shrink": 0.5}],
        "model": {"source": "minilm"},
        "data": {"source": str(kept), "column": "client", "partition": "column", "text": "text"},
        "clients": {"rank": [1, 2]},
        "train": {"rounds": [3, 4], "lr": 0.1},
        "seed": [0, 1],
    }


@pytest.mark.slow
def test_methods_side_by_side(bert_folder: Path, base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fedlora.compare_methods(
        ["fedit", FedIT(), {"name": "ffa-lora"}],
        data=COLUMNS,
        model=base,
        tokenizer=tiny.tokenizer(),
        rank=2,
        clients=2,
        rounds=1,
        settings=SETTINGS,
        out=tmp_path / "two",
        jobs=1,
        progress=False,
    )
    assert capsys.readouterr() == ("", "")
    assert found.failed == 0 and {row["method.name"] for row in found.rows} == {"fedit", "ffa-lora"}  # equal ones are one
    assert "<svg" in found._repr_html_() and "ffa-lora" in str(found) and found.report().exists()
    with pytest.raises(BadInput, match="methods: at least one"):
        fedlora.compare_methods([])


# ---- quick to start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["import fedlora; fedlora.run", "import sys; sys.argv = ['fedlora', '--help']; from fedlora.cli import app"]
)
def test_torch_is_left_out_until_it_is_needed(code: str) -> None:
    check = (
        f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'peft', 'matplotlib'}} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_names_that_are_promised() -> None:
    assert set(fedlora.__all__) >= {"run", "load", "Data", "compare_methods", "BadInput"}
    assert all(getattr(fedlora, name) is not None for name in fedlora.__all__) and set(dir(fedlora)) >= set(fedlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        fedlora.runn  # noqa: B018


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
