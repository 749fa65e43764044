"""Trackers: what they are told, and that no run is changed, stopped or kept waiting by one."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import tiny
import tomli_w
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tiny import Silent

from fedlora import track
from fedlora.config import Config, resolve
from fedlora.errors import BadInput
from fedlora.runs import packages, play
from fedlora.summary import read_rows
from fedlora.tasks.metrics import CLASSIFICATION
from fedlora.track import thread
from fedlora.track.base import Kept, Point, Run
from fedlora.track.tensorboard import TensorBoard

TIMES = {"wall_s", "train_s", "evaluate_s", "aggregate_s", "wire_s", "other_s"}


def configure(bert_folder: Path, csv_folder: Path, **tables: Any) -> Config:
    base = {
        "precision": "fp32",
        "method": {"name": "lora-a2"},
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "alpha": 1.0, "validation": 0.2},
        "clients": {"count": 4, "rank": 2},
        "train": {"rounds": 3, "batch_size": 8, "lr": 5e-3, "evaluate_every": 2},
    }
    return resolve(base, tables)


@pytest.fixture(scope="module")
def make(bert_folder: Path, csv_folder: Path) -> Callable[..., Config]:
    return lambda **tables: configure(bert_folder, csv_folder, **tables)


@pytest.fixture(scope="module")
def alone(make: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody tracks."""
    out = tmp_path_factory.mktemp("alone") / "run"
    play.execute(make(), out, False, Silent())
    return out


def result(out: Path) -> dict[str, Any]:
    """What a run leaves, by file: bytes, but for what says which trackers there are and how long it took."""
    files = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    kept = {name: data for name, data in files.items() if not name.startswith(("track/", "checkpoint/", "config.toml", "."))}
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(out)]
    summary = json.loads(kept["summary.json"])
    summary["totals"] = {k: v for k, v in summary["totals"].items() if k not in TIMES}
    return kept | {"metrics.jsonl": rows, "summary.json": summary, "server": files["checkpoint/server-00003.fed"]}


def told(out: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, str]]]:
    """Numbers, each step once, and texts in TensorBoard's files: name -> step -> value."""
    found = EventAccumulator(str(out / "track" / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    numbers = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    texts = {
        name.removesuffix("/text_summary"): [
            (event.step, make_ndarray(event.tensor_proto)[0].decode()) for event in found.Tensors(name)
        ]
        for name in found.Tags()["tensors"]
    }
    for name, events in numbers.items():
        assert len(dict(events)) == len(events), f"{name}: {events}"
    return {name: dict(events) for name, events in numbers.items()}, {name: dict(events) for name, events in texts.items()}


def expected(out: Path) -> dict[str, dict[int, float]]:
    """The same of metrics.jsonl, for rows of plain numbers: in float32, as event files have them."""
    found: dict[str, dict[int, float]] = {}
    for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        for key, value in row.items():
            if isinstance(value, int | float) and key != "round":
                found.setdefault(key, {})[row["round"]] = float(np.float32(value))
    return found


def check_told(out: Path) -> None:
    numbers, texts = told(out)
    final = {name: numbers.pop(name) for name in list(numbers) if name.startswith(("final/", "totals/"))}
    ranks = {name: numbers.pop(name) for name in list(numbers) if name.startswith("ranks/")}
    wanted = expected(out)
    assert {name.rpartition("/")[2]: values for name, values in numbers.items()} == wanted
    for name in ("score/accuracy", "score/macro_f1", "score/score", "score/validation_accuracy", "score/commonest_accuracy"):
        assert set(numbers[name]) == {2, 3}, name
    for name in ("loss", "bytes/upload_bytes", "params/download_params", "seconds/train_s", "round/failed", "round/clients"):
        assert set(numbers[name]) == {1, 2, 3}, name
    modules = json.loads((out / "federation.json").read_text())["modules"]
    assert set(ranks) == {f"ranks/{module}" for module in modules} and len(modules) == 12
    for step in (1, 2, 3):  # each client chooses 2 ranks a module, wherever it likes
        assert sum(values[step] for values in ranks.values()) == pytest.approx(2 * 12)
    summary = json.loads((out / "summary.json").read_text())
    assert final["final/accuracy"] == {3: float(np.float32(summary["final"]["accuracy"]))}
    assert final["totals/upload_bytes"] == {3: sum(wanted["upload_bytes"].values())}
    assert json.loads(texts["summary"][3].strip("`\n")) == summary
    assert 'name = "lora-a2"' in list(texts["config"].values())[-1]


def test_tensorboard_is_told_what_metrics_say(make: Callable[..., Config], alone: Path, tmp_path: Path) -> None:
    silent = Silent()
    play.execute(make(track={"to": ["tensorboard"]}), tmp_path / "run", False, silent)
    check_told(tmp_path / "run")
    assert result(tmp_path / "run") == result(alone)
    assert not any("tensorboard" in note for note in silent.notes)


@pytest.mark.parametrize("first", [{"to": ["tensorboard"]}, {"to": []}], ids=["from the start", "from the second start on"])
def test_a_resumed_run_has_each_round_once(first: dict[str, Any], make: Callable[..., Config], alone: Path, tmp_path: Path) -> None:
    """Also one that trackers are told of from its second start on: they hear of the rounds before, too."""
    with pytest.raises(KeyboardInterrupt):
        play.execute(make(track=first), tmp_path / "run", False, Silent(1))
    with pytest.raises(KeyboardInterrupt):
        play.execute(make(track={"to": ["tensorboard"]}), tmp_path / "run", True, Silent(2))
    play.execute(make(track={"to": ["tensorboard"], "name": "another"}), tmp_path / "run", True, Silent())
    check_told(tmp_path / "run")
    assert result(tmp_path / "run") == result(alone)
    assert json.loads((tmp_path / "run" / "track" / "tensorboard.json").read_text())["round"] == 3


def one_less(text: str) -> str:
    return json.dumps(json.loads(text) | {"round": 1})


@pytest.mark.parametrize("damage", [one_less, lambda text: text[:9], lambda text: "3"], ids=["one less", "cut off", "a number"])
def test_a_round_that_is_told_but_not_noted_down_counts_once(
    damage: Callable[[str], str], make: Callable[..., Config], tmp_path: Path
) -> None:
    """As when the process is killed between the two, or the note is damaged."""
    with pytest.raises(KeyboardInterrupt):
        play.execute(make(track={"to": ["tensorboard"]}), tmp_path / "run", False, Silent(2))
    file = tmp_path / "run" / "track" / "tensorboard.json"
    file.write_text(damage(file.read_text()))
    play.execute(make(track={"to": ["tensorboard"]}), tmp_path / "run", True, Silent())
    check_told(tmp_path / "run")


class Told:
    """A tracker that keeps what it is told, for all to see."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        type(self).last = self

    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        self.heard.append(f"start {run.name} {first} {dict(kept)}")
        return {"id": "7"}

    def round(self, point: Point) -> None:
        self.heard.append(f"round {point.step}")

    def finish(self, point: Point) -> None:
        self.heard.append(f"finish {point.step}")

    def close(self) -> None:
        self.heard.append("close")


WHOLE = ["round 1", "round 2", "round 3", "finish 3", "close"]


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts classes in the place of the trackers of the package."""

    def put(**kinds: type) -> None:
        monkeypatch.setattr(track, "find", lambda name: kinds[name])
        monkeypatch.setattr(packages, "find_spec", lambda name: name)

    return put


def test_a_tracker_keeps_what_it_needs_to_go_on(make: Callable[..., Config], listed: Any, tmp_path: Path) -> None:
    listed(told=Told)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        play.execute(make(track={"to": ["told"], "name": "first"}), out, False, Silent(2))
    assert Told.last.heard == ["start first 1 {}", "round 1", "round 2", "close"]
    play.execute(make(track={"to": ["told", "told"]}), out, True, Silent())
    assert Told.last.heard == ["start run 3 {'id': '7'}", "round 3", "finish 3", "close"]
    more = make(track={"to": ["told"], "project": "other"}, train={"rounds": 4})
    play.execute(more, out, True, Silent())
    assert Told.last.heard == ["start run 1 {}", "round 1", "round 2", "round 3", "round 4", "finish 4", "close"]


class AtStart(Told):
    def start(self, run: Run, first: int, kept: Kept) -> Kept:
        raise RuntimeError("\nno key\nsecond line")


class AtRound(Told):
    def round(self, point: Point) -> None:
        super().round(point)
        if point.step == 2:
            raise SystemExit("gone")


class AtFinish(Told):
    def finish(self, point: Point) -> None:
        raise OSError(28, "No space left on device")


class AtClose(Told):
    def close(self) -> None:
        raise ValueError


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (AtStart, "bad failed, and the run goes on without it: no key"),
        (AtRound, "bad failed, and the run goes on without it: gone"),
        (AtFinish, "bad failed, and the run goes on without it: [Errno 28] No space left on device"),
        (AtClose, "bad failed, and the run goes on without it: ValueError()"),
    ],
)
def test_one_that_fails_is_said_once(
    kind: type, says: str, make: Callable[..., Config], listed: Any, alone: Path, tmp_path: Path
) -> None:
    """And the others go on."""
    good = type("Good", (Told,), {})
    listed(bad=kind, good=good)
    silent = Silent()
    play.execute(make(track={"to": ["bad", "good"]}), tmp_path / "run", False, silent)
    assert [note for note in silent.notes if "bad" in note or "good" in note] == [says]
    assert good.last.heard[1:] == WHOLE
    assert result(tmp_path / "run") == result(alone)


def test_tensorboard_fails_where_it_is_called(make: Callable[..., Config], tmp_path: Path) -> None:
    """And not in a thread of its own, which would print what happened."""
    tracker, before = TensorBoard(), set(threading.enumerate())
    tracker.start(Run(tmp_path, make(), (), (), CLASSIFICATION), 1, {})
    assert set(threading.enumerate()) == before
    tracker.file.close()
    with pytest.raises(ValueError, match="closed file"):
        tracker.round(Point(1, {"score/accuracy": 0.5}, {}))


def hanging(at: str, until: Event, reached: Event) -> type[Told]:
    """A tracker that hangs in one of its methods until it is let go."""

    def hang(self: Told, *args: Any) -> Kept:
        reached.set()
        assert until.wait(60)
        self.heard.append(f"{at} came back")
        return {}

    return type("Hanging", (Told,), {at: hang})


class Watching(Silent):
    """Lets a round be over only when the tracker hangs and its time is up."""

    def __init__(self, reached: Event) -> None:
        super().__init__()
        self.reached, self.rounds = reached, 0

    def round(self, row: dict[str, Any]) -> None:
        self.rounds += 1
        assert self.reached.wait(60)
        Event().wait(2 * thread.SECONDS)


SLOW = {
    "start": "slow has not answered for 0.2 s; the run goes on without it",
    "round": "slow has not sent everything within 0.2 s; the run ends without it",
    "finish": "slow has not sent everything within 0.2 s; the run ends without it",
    "close": "slow has not sent everything within 0.2 s; the run ends without it",
}


@pytest.mark.parametrize("at", SLOW)
def test_one_that_hangs_is_said_once_and_left_behind(
    at: str, make: Callable[..., Config], listed: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is over while the tracker still hangs, which it does until we let it go: nothing waited for it."""
    monkeypatch.setattr(thread, "SECONDS", 0.2)
    until, reached = Event(), Event()
    kind = hanging(at, until, reached)
    good = type("Good", (Told,), {})
    listed(slow=kind, good=good)
    watching = Watching(reached) if at == "start" else Silent()
    feeds: list[thread.Feed] = []
    monkeypatch.setattr(thread.Feed, "__init__", noting(feeds, thread.Feed.__init__))
    try:
        play.execute(make(track={"to": ["slow", "good"]}), tmp_path / "run", False, watching)
        assert reached.is_set() and not until.is_set() and "came back" not in str(kind.last.heard)
        assert [note for note in watching.notes if "slow" in note or "good" in note] == [SLOW[at]]
        if at == "start":
            assert watching.rounds == 3 and good.last.heard[1:] == WHOLE
        assert result(tmp_path / "run") == result(alone)
    finally:
        until.set()
    assert all(feed._ended.wait(60) for feed in feeds)
    if at in ("start", "round"):  # what it was to be told afterwards is not told any more
        assert kind.last.heard[-2:] == [f"{at} came back", "close"]


def noting(feeds: list[thread.Feed], made: Any) -> Any:
    def make(self: thread.Feed, *args: Any) -> None:
        feeds.append(self)
        made(self, *args)

    return make


def test_one_that_never_starts_is_said_at_the_end_of_a_short_run(
    make: Callable[..., Config], listed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "SECONDS", 0.2)
    until, reached = Event(), Event()
    monkeypatch.setattr(thread.Feed, "news", lambda self: [])
    listed(slow=hanging("start", until, reached))
    silent = Silent()
    play.execute(make(track={"to": ["slow"]}), tmp_path / "run", False, silent)
    until.set()
    assert [note for note in silent.notes if "slow" in note] == ["slow has not answered within 0.2 s; the run ends without it"]


def test_notes_come_from_the_runs_own_thread(make: Callable[..., Config], listed: Any, tmp_path: Path) -> None:
    from threading import current_thread

    class Where(Silent):
        def note(self, text: str) -> None:
            super().note(text)
            threads.append(current_thread())

    threads: list[Any] = []
    listed(bad=AtStart)
    play.execute(make(track={"to": ["bad"]}), tmp_path / "run", False, Where())
    assert set(threads) == {current_thread()}


def test_what_cannot_be_is_refused_before_the_run(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tables, says in (
        ({"to": ["wanbd"]}, "unknown tracker 'wanbd'; did you mean wandb?"),
        ({"to": ["x"]}, "unknown tracker 'x'; possible: mlflow, tensorboard, wandb"),
    ):
        with pytest.raises(BadInput) as error:
            play.execute(make(track=tables), tmp_path / "run", False, Silent())
        assert str(error.value) == says
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in ("wandb", "mlflow") else name)
    config = make(track={"to": ["wandb", "tensorboard", "mlflow"]})
    with pytest.raises(BadInput) as error:
        play.execute(config, tmp_path / "run", False, Silent())
    assert str(error.value) == "not installed: mlflow, wandb, which track.to asks for; pip install 'fedlora[mlflow,wandb]'"
    assert not (tmp_path / "run").exists()
    call = tiny.console(monkeypatch, capsys, tmp_path)
    source = ["--model", config.model.source, "--data", str(config.data.source)]
    status, out, err = call("run", *source, "--set", 'track.to=["wandb"]', "--out", "run")
    says = "error: not installed: wandb, which track.to asks for; pip install 'fedlora[wandb]'\n"
    assert (status, out, err) == (2, "", says)


def test_the_list_is_the_folder_and_needs_no_package() -> None:
    assert track.names() == ["mlflow", "tensorboard", "wandb"]
    lines = "import sys, fedlora.cli, fedlora.track.mlflow, fedlora.track.wandb, fedlora.track.tensorboard, fedlora.track.thread"
    heavy = "print({'torch', 'tensorboard', 'wandb', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{lines}\n{heavy}"], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_comparison_passes_it_on_and_its_cells_stay_the_same(tmp_path: Path) -> None:
    from fedlora.comparison.grid import expand
    from fedlora.comparison.recipe import Header, Recipe

    def cells(**tables: Mapping[str, Any]) -> Any:
        return expand(Recipe(Header(name="mine"), {"method": {"name": "lora-a2"}, **tables}))

    plain, tracked = cells(), cells(track={"to": ["tensorboard", "wandb"], "name": "x"})
    assert len(tracked.cells) == 1 and tracked.cells[0].config.track.to == ["tensorboard", "wandb"]
    assert plain.cells[0].hash == tracked.cells[0].hash == "9a0809987643"  # written down before there were trackers
    assert not any(key.startswith("track") for key in tracked.cells[0].flat)


def test_a_comparison_asks_for_missing_packages_first(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "wandb" else name)
    source = make().model_dump(include={"model": {"source"}, "data": {"source"}})
    recipe = tmp_path / "mine.toml"
    recipe.write_text(tomli_w.dumps({"title": "Mine", **source, "track": {"to": ["tensorboard", "wandb"]}}))
    status, out, err = tiny.console(monkeypatch, capsys, tmp_path)("compare", recipe)
    assert (status, out) == (2, "") and err.endswith("wandb, which track.to asks for; pip install 'fedlora[wandb]'\n"), err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.toml"]
