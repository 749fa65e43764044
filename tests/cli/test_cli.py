"""The command line as a user meets it: what works, and one clear line for what does not."""

import json
import signal
import sys
from pathlib import Path

import pytest
import tiny

from fedlora import methods


@pytest.fixture
def fedlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Call the console script; returns (exit status, standard output, standard error). A run's report is an empty page here, for
    its pictures take longer than all else: tests/compare and tests/docs see whole ones."""
    from fedlora.comparison import run

    monkeypatch.setattr(run, "write_report", lambda paths, html: (paths[0] / "report.html").touch())
    return tiny.console(monkeypatch, capsys, tmp_path)


@pytest.fixture
def quick(bert_folder: Path, csv_folder: Path) -> list[str]:
    return ["--model", str(bert_folder), "--data", str(csv_folder), "--clients", "3", "--rank", "2", "--rounds", "2"]


def test_run_export_predict(fedlora, quick, tmp_path: Path) -> None:
    status, out, err = fedlora("run", *quick, "--method", "lora-a2", "--out", "first")
    assert status == 0, err
    assert "round 1/2" in out and "result in first/adapter" in out and (tmp_path / "first" / "report.html").exists()
    status, out, _ = fedlora("export", "first", "--to", "adapter")
    assert status == 0 and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    status, out, _ = fedlora("export", "first", "--to", "merged", "--merged")
    assert status == 0 and (tmp_path / "merged" / "model.safetensors").exists()
    status, out, _ = fedlora("predict", "first", "w1 apple w2", "cherry")
    assert status == 0 and [line.split("\t")[2] for line in out.splitlines()] == ["w1 apple w2", "cherry"]
    assert all(line.split("\t")[0] in tiny.CLASSES for line in out.splitlines())
    status, other, _ = fedlora("predict", "first", stdin="w1 apple w2\ncherry\n")
    assert status == 0 and other == out


INHERITED = """
from dataclasses import dataclass

from fedlora.methods.fedit import FedIT
from fedlora.types import Unfit


@dataclass(frozen=True)
class Mine(FedIT):
    absent: int = 0

    def local(self, down, held, client, round):
        up, held = yield from super().local(down, held, client, round)
        return (Unfit("no power") if client.id >= self.absent else up), held
"""


def test_replies_that_fail_are_in_the_last_line_and_a_run_without_any_ends_with_status_1(
    fedlora, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a method from elsewhere that inherits from one of the package, messages and all."""
    (tmp_path / "inherited.py").write_text(INHERITED)
    monkeypatch.syspath_prepend(tmp_path)
    status, out, err = fedlora("run", *quick, "--method", "inherited:Mine", "--set", "method.absent=2", "--out", "some")
    assert status == 0 and "failed replies 2" in out.splitlines()[-1], err
    status, _, err = fedlora("run", *quick, "--method", "inherited:Mine", "--out", "none")
    assert status == 1 and err.splitlines()[-1].startswith("error: round 1: none of 3 replies counts: client 0: no power")
    assert not (tmp_path / "none" / "summary.json").exists()


def test_resume_needs_no_other_flag(fedlora, quick) -> None:
    assert fedlora("run", *quick, "--out", "one")[0] == 0
    status, _, err = fedlora("run", "--resume", "--out", "one")
    assert status == 0 and "nothing to do" in err
    status, out, err = fedlora("run", "--resume", "--out", "one", "--rounds", "3")
    assert status == 0 and "round 3/3" in out, err


def test_runs_get_a_folder_of_their_own(fedlora, quick, tmp_path: Path) -> None:
    for _ in range(2):
        assert fedlora("run", *quick, "--quiet")[0] == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"lora-a2", "lora-a2-2"}


def test_quiet_prints_one_line(fedlora, quick) -> None:
    status, out, _ = fedlora("run", *quick, "--quiet")
    assert status == 0 and len(out.splitlines()) == 1


def test_methods_lists_every_file(fedlora) -> None:
    status, out, _ = fedlora("methods", "--json")
    rows = json.loads(out)
    assert status == 0 and [row["name"] for row in rows] == methods.names()
    assert {"name", "title", "paper", "exact", "mixed_ranks", "personal", "upload", "download"} <= rows[0].keys()
    status, out, _ = fedlora("methods")
    assert status == 0 and all(name in out for name in methods.names())


def test_data_shows_the_split(fedlora, csv_folder: Path, tmp_path: Path) -> None:
    status, out, _ = fedlora("data", csv_folder, "--clients", "3", "--alpha", "0.1")
    assert status == 0 and "fewest classes" in out and "client 2" in out
    assert (tmp_path / "split.png").read_bytes().startswith(b"\x89PNG")


def test_help_shows_an_example(fedlora) -> None:
    for command in ("run", "methods", "data", "export", "predict"):
        status, out, _ = fedlora(command, "--help")
        assert status == 0 and f"fedlora {command}" in out.replace("Usage: fedlora", "")


def test_help_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys; sys.argv = ['fedlora', '--help']\nfrom fedlora import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'pyarrow', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


BAD = {
    "method": (["run", "--method", "lora-a3"], "did you mean lora-a2"),
    "model": (["run", "--model", "minlm", "--data", "{data}"], "did you mean minilm"),
    "data": (["run", "--data", "banking7"], "did you mean banking77"),
    "key": (["run", "--set", "train.rouds=3"], "did you mean train.rounds"),
    "table": (["run", "--set", "trian.rounds=3"], "did you mean train"),
    "method key": (["run", "--set", "method.golbal_rank=3"], "did you mean method.global_rank"),
    "method value": (["run", "--set", "method.criterion=size"], "contribution"),
    "method range": (["run", "--method", "hetlora", "--set", "method.gamma=2"], "gamma must lie in (0, 1]"),
    "rounds": (["run", "--rounds", "0"], "train.rounds"),
    "rank 0": (["run", "--rank", "0"], "clients.rank"),
    "rank plan": (["run", "--rank", "tears"], "clients.rank"),
    "alpha": (["run", "--alpha", "-1"], "data.alpha"),
    "rank above the matrix": (["run", "--rank", "17", "{quick}"], "17 is above 16"),
    "no such file": (["run", "--data", "nowhere.csv"], "nowhere.csv"),
    "no column": (["run", "{quick}", "--set", "data.text=body"], "body"),
    "recipe name": (["run", "dmeo"], "did you mean demo"),
    "recipe file": (["run", "nowhere.toml"], "nowhere.toml"),
    "recipe syntax": (["run", "{broken}"], "not valid TOML"),
    "set without value": (["run", "--set", "train.lr"], "table.key=value"),
    "resume without out": (["run", "--resume"], "--out"),
    "resume of nothing": (["run", "--resume", "--out", "nowhere"], "no run in nowhere"),
    "transform": (["run", "{quick}", "--set", 'transform=[{{name="clop"}}]'], "clip"),
    "transform on values": (
        ["run", "{quick}", "--method", "flexlora", "--set", 'transform=[{{name="clip", max_norm=1.0}}]'],
        "FlexLoRA",
    ),
    "export of nothing": (["export", "nowhere", "--to", "x"], "no run folder"),
    "predict of nothing": (["predict", "nowhere", "text"], "no run folder"),
    "predict of nothing, without a text": (["predict", "nowhere"], "no run folder"),
    "cuda": (["run", "{quick}", "--set", "device=cuda"], "no GPU"),
    "head": (["run", "--set", "model.head=frosen"], "model.head"),
    "sample": (["run", "--set", "clients.sample=1.5"], "share lies in"),
    "elsewhere": (["run", "--method", "no_such_package:Thing"], "no_such_package"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, fedlora, quick, csv_folder: Path, tmp_path: Path) -> None:
    if case == "cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    args, says = BAD[case]
    (tmp_path / "broken.toml").write_text("[train\n")
    real = []
    for arg in args:
        real += quick if arg == "{quick}" else [arg.format(data=csv_folder, broken=tmp_path / "broken.toml")]
    if case == "rank above the matrix":  # the flag given last wins, and `quick` has a rank of its own
        real = ["run", *quick, "--rank", "17"]
    status, _, err = fedlora(*real)
    problems = [line for line in err.splitlines() if not line.startswith("note:")]
    assert status == 2 and len(problems) == 1 and says in problems[0], err
    assert not (tmp_path / "runs").exists()


def test_existing_out_is_refused(fedlora, quick, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    status, _, err = fedlora("run", *quick, "--out", "mine")
    assert status == 2 and "--resume" in err and not list((tmp_path / "mine").iterdir())


def test_export_never_overwrites(fedlora, quick, tmp_path: Path) -> None:
    assert fedlora("run", *quick, "--out", "one", "--quiet")[0] == 0
    status, _, err = fedlora("export", "one", "--to", "one")
    assert status == 2 and "exists already" in err
    status, _, err = fedlora("export", "one", "--to", "x", "--client", "1")
    assert status == 2 and "one model for all" in err and not (tmp_path / "x").exists()


def ctrl_c() -> None:
    """What Python makes of SIGINT, where the process that runs the tests has not told it otherwise."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "expected"), [(ctrl_c, 130), (lambda: signal.raise_signal(signal.SIGTERM), 143)])
def test_a_signal_leaves_a_resumable_run(stop, expected: int, fedlora, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.report.progress import Progress

    heard, before = Progress.round, signal.getsignal(signal.SIGTERM)

    def interrupt(self, row):
        heard(self, row)
        stop()

    monkeypatch.setattr(Progress, "round", interrupt)
    status, out, err = fedlora("run", *quick, "--out", "one")
    assert status == expected and "round 1/2" in out
    assert err.splitlines()[-1] == "stopped; go on with: fedlora run --resume --out one"
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(Progress, "round", heard)
    assert fedlora("run", "--resume", "--out", "one")[0] == 0


def test_a_full_disk_is_one_line_and_status_1(fedlora, quick, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.server import checkpoint

    def full(files: dict[Path, bytes]) -> None:
        raise OSError(28, "No space left on device", str(next(iter(files))))

    monkeypatch.setattr(checkpoint, "write_all", full)
    status, _, err = fedlora("run", *quick, "--out", "one")
    assert status == 1 and "No space left on device" in err.splitlines()[-1]


def test_a_method_from_elsewhere(fedlora, quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(methods.__file__).parent / "fedit.py"
    (tmp_path / "my_methods.py").write_text(source.read_text().replace("class FedIT:", "class Mine:\n    extra: int = 3\n"))
    monkeypatch.syspath_prepend(tmp_path)
    status, _, err = fedlora("run", *quick, "--method", "my_methods:Mine", "--set", "method.extra=4", "--out", "one")
    assert status == 0, err
