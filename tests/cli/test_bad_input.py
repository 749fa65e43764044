"""Bad input of every kind, over all commands and keys: one line that says what and where, status 2, and nothing is left behind.

What is tried is partly generated from the configuration's own models, so a new key, method or transform is tried too.
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum
from glob import glob
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import tiny
from annotated_types import Ge, Gt
from pydantic import BaseModel

from fedlora import methods, transforms
from fedlora.config import Config, resolve
from fedlora.errors import BadInput
from fedlora.reference import flat_limits
from fedlora.runs import play
from fedlora.tables import setting

LONG = "x" * 300


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in base, data in data, a finished run in one, a file and an empty folder."""
    place = tmp_path_factory.mktemp("place")
    for folder in ("base", "data", "folder"):
        (place / folder).mkdir()
    tiny.save_model("bert", place / "base")
    tiny.save_data(place / "data", 45, 15)
    tables = {
        "model": {"source": str(place / "base")},
        "data": {"source": str(place / "data"), "alpha": 10.0},
        "clients": {"count": 3, "rank": 2},
        "train": {"rounds": 1},
        "method": {"name": "fedit"},
    }
    play.execute(resolve(tables), place / "one", False, tiny.Silent())
    (place / "file").write_text("x\n")
    (place / "broken.toml").write_text("[train\n")
    (place / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (place / "wrong.toml").write_text('train = "long"\n')
    (place / "empty.csv").write_text("")
    (place / "header.csv").write_text("text,label\n")
    (place / "oneclass.csv").write_text("text,label\na,b\nc,b\n")
    (place / "binary.csv").write_bytes(b"text,label\n\x00\x81\xff,b\n" * 3)
    (place / "binary.parquet").write_bytes(b"PAR1 nothing")
    (place / "nolabel.csv").write_text("text,label\na,b\nc,\n")
    (place / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    return place


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the command line in `place`, and hold it to the rules; returns the line."""
    call = tiny.console(monkeypatch, capsys, place)

    def check(*args: object, stdin: str | bytes = "", status: int = 2, folder: Path = place) -> str:
        before = listing(folder)
        got, out, err = call(*args, stdin=stdin)
        lines = [line for line in err.splitlines() if not line.startswith("note:")]
        assert got == status and len(lines) == 1 and lines[0].startswith("error: "), (got, out, err)
        assert "Traceback" not in err and listing(folder) == before
        return lines[0]

    return check


def listing(folder: Path) -> dict[str, bytes | int]:
    """Every file and folder, with the content of files, or the size of large ones; the lock that every command may take does not
    count."""
    found: dict[str, bytes | int] = {}
    for path in map(Path, glob("**", root_dir=folder, recursive=True, include_hidden=True)):
        size = (folder / path).stat().st_size
        if (folder / path).is_dir():
            found[str(path)] = 0
        elif path.name != ".lock":
            found[str(path)] = size if size > 10_000 else (folder / path).read_bytes()
    return found


# ---- every key ---------------------------------------------------------------------------------------------------------


def wrong(kind: Any) -> set[str]:
    """Values, as TOML, that a key of this type cannot take."""
    if get_origin(kind) in (Union, UnionType):
        return set.intersection(*(wrong(each) for each in get_args(kind) if each is not type(None)))
    if get_origin(kind) is Annotated:
        inner, limits = get_args(kind)[0], flat_limits(get_args(kind)[1:])
        numbers = {"-1", "-1.5"} if any(isinstance(limit, Gt | Ge) for limit in limits) else set()
        return wrong(inner) | numbers | ({"0", "0.0"} if any(isinstance(limit, Gt) for limit in limits) else set())
    everywhere = {"{a = 1}", "[[1], 2]"}
    if get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return everywhere | {"nonsense", "3", "-1", "true", "[]", "1.5", "0", "nan", '""'}
    if get_origin(kind) in (list, tuple):
        return everywhere | {"nonsense", "1.5", "true", "nan", "3", "-1", "0", '""'}
    known: dict[Any, set[str]] = {
        bool: {"nonsense", "3", "1.5", "[]", "-1", '""', "nan"},
        int: {"nonsense", "1.5", "[]", "true", "nan", "inf", '""'},
        float: {"nonsense", "[]", "true", "nan", "inf", "-inf", '""'},
        str: {"3", "1.5", "[]", "true", "-1", "0", "nan"},
    }
    return everywhere | known.get(kind, set())


def keys() -> Iterator[tuple[str, Any]]:
    """Every key of the configuration and its type."""
    for name, kind in get_type_hints(Config, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from (
                (f"{name}.{key}", inner)
                for key, inner in get_type_hints(kind, include_extras=True).items()
                if key != "model_config"
            )
        elif name != "model_config":
            yield name, kind


EVERY_KEY = [(key, value) for key, kind in keys() for value in sorted(wrong(kind))]
TABLES = [name for name, kind in get_type_hints(Config).items() if isinstance(kind, type) and issubclass(kind, BaseModel)]


def test_a_value_of_a_wrong_type_names_its_key(refused) -> None:
    assert len(EVERY_KEY) > 250
    seen: set[str] = set()
    for key, value in EVERY_KEY:
        if key in seen:  # a key goes through the whole command once
            with pytest.raises(BadInput) as error:
                resolve(setting(f"{key}={value}"))
            line = str(error.value)
            assert "\n" not in line
        else:
            line = refused("run", "--out", "new", "--set", f"{key}={value}")
        seen.add(key)
        assert key in line or key.split(".")[0] in line, (key, value, line)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_no_value_and_knows_its_keys(table: str, refused) -> None:
    assert table in refused("run", "--out", "new", "--set", f"{table}=3")
    assert table in refused("run", "--out", "new", "--set", f"{table}=nonsense")
    line = refused("run", "--out", "new", "--set", f"{table}.nonsense=3")
    assert f"{table}.nonsense" in line


SETTINGS = [("method", name, methods.find(name)) for name in methods.names()]
SETTINGS += [("transform", name, transforms.find(name)) for name in transforms.names()]


@pytest.mark.parametrize(("what", "name", "kind"), SETTINGS, ids=[name for _, name, _ in SETTINGS])
def test_settings_of_methods_and_transforms(what: str, name: str, kind: Any, refused) -> None:
    """No such field; of each field, a table in the place of its value, and what is no number."""
    whose = what if what == "method" else name
    line = refused("run", "--out", "new", *as_options(what, name, kind, "nonsense", "3"))
    assert f"{whose}.nonsense" in line
    for field in fields(kind):
        for value in ({"a": 1}, math.nan):
            given = {f.name: 0.5 for f in fields(kind) if f.default is MISSING} | {field.name: value}
            with pytest.raises(BadInput, match=f"{whose}.{field.name}") as error:
                (methods if what == "method" else transforms).make(name, given)
            assert "\n" not in str(error.value)


def as_options(what: str, name: str, kind: Any, field: str, value: str) -> tuple[str, ...]:
    """The options that give this setting to a method or a transform."""
    if what == "method":
        return "--method", name, "--set", f"method.{field}={value}"
    given = {"name": f'"{name}"'} | {f.name: "0.5" for f in fields(kind) if f.default is MISSING} | {field: value}
    return "--method", "fedit", "--set", f"transform=[{{{', '.join(f'{key}={x}' for key, x in given.items())}}}]"


# ---- the commands ------------------------------------------------------------------------------------------------------

QUICK = ("--model", "base", "--data", "data", "--clients", "3", "--rank", "2", "--rounds", "1", "--out", "new")
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    # what the command line itself refuses
    "no command": (("nonsense",), "nonsense"),
    "no option": (("run", "--ranks", "3"), "--rank"),
    "no number": (("run", "--rounds", "many"), "--rounds"),
    "no value": (("run", "--rounds"), "--rounds"),
    "no run": (("predict",), "RUN"),
    "no runs": (("report",), "RUN"),
    "no target": (("export", "one"), "--to"),
    "no data": (("data",), "NAME_OR_PATH"),
    "no recipe": (("compare",), "no recipe"),
    "jobs": (("compare", "table1", "--jobs", "0"), "--jobs"),
    "batch": (("predict", "one", "w1", "--batch", "0"), "--batch"),
    "clients": (("run", "--clients", "some"), "--clients"),
    # recipes and settings
    "recipe": (("run", "dmeo"), "demo"),
    "recipe folder": (("run", "folder"), "folder"),
    "recipe file": (("run", "nowhere.toml"), "nowhere.toml"),
    "recipe of nothing": (("run", "folder.toml/x.toml"), "folder.toml"),
    "recipe syntax": (("run", "broken.toml"), "not valid TOML"),
    "recipe of bytes": (("run", "binary.toml"), "not valid TOML"),
    "recipe of a wrong table": (("run", "wrong.toml"), "train"),
    "recipe with a long name": (("run", LONG), LONG),
    "recipe of several": (("run", "table1"), "fedlora compare table1"),
    "set nothing": (("run", "--set", ""), "table.key=value"),
    "set no key": (("run", "--set", "=3"), "table.key=value"),
    "set no value": (("run", "--set", "train.lr"), "table.key=value"),
    "set two": (("run", "--set", "train.lr=1\ntrain.clip=2"), "line break"),
    "set a key with a line break": (("run", "--set", "train\n.lr=1"), "table.key=value"),
    "set a key with a gap": (("run", "--set", "train..lr=1"), "table.key=value"),
    "set a key with blanks": (("run", "--set", "train. lr=1"), "table.key=value"),
    "set below a value": (("run", "--set", "train.lr.x=1"), "train.lr"),
    "set below a table": (("run", "--set", "seed.x=1"), "seed"),
    "ranks": (("run", *QUICK, "--rank", "[1, 2]"), "2 ranks for 3 clients"),
    "rank text": (("run", "--rank", "tears"), "clients.rank"),
    "rank zero": (("run", "--rank", "0"), "clients.rank"),
    "rank list of zero": (("run", "--rank", "[1, 0]"), "clients.rank"),
    "rank too large": (("run", *QUICK, "--rank", "17"), "17 is above 16"),
    "sample": (("run", "--set", "clients.sample=1.5"), "share lies in"),
    "sample of none": (("run", "--set", "clients.sample=0.0"), "clients.sample"),
    "sample above all": (("run", *QUICK, "--set", "clients.sample=100"), "clients.sample = 100: the run has 3"),
    "domains": (("run", *QUICK, "--set", "clients.domains=2"), "clients.domains"),
    "column without its partition": (("run", *QUICK, "--set", "data.column=label"), "data.partition"),
    "partition without its column": (("run", *QUICK, "--set", "data.partition=column"), "data.column"),
    "pathological": (("run", *QUICK, "--set", "data.partition=pathological"), "even number"),
    "more clients than texts": (("run", *QUICK, "--clients", "1000"), "clients.count"),
    "max_length": (("run", *QUICK, "--set", "data.max_length=2"), "data.max_length = 2"),
    "modules": (("run", *QUICK, "--set", "model.target_modules=[]"), "no layer to adapt"),
    "module": (("run", *QUICK, "--set", 'model.target_modules=["nonsense"]'), "matches no linear layer"),
    "module of the head": (("run", *QUICK, "--set", 'model.target_modules=["classifier"]'), "head"),
    "pattern": (("run", *QUICK, "--set", "model.target_modules=("), "model.target_modules"),
    # federations
    "federation of nobody": (("federate", "init", "new", "--data", "data", "--model", "base"), "--clients"),
    "federation of one twice": (("federate", "init", "new", "--clients", "a,a", "--data", "data"), "a name of its own"),
    "federation of a bad name": (("federate", "init", "new", "--clients", "a/b,c", "--data", "data"), "clients.names"),
    "federation without an address": (("federate", "init", "new", "--clients", "a,b", "--server", "a b"), "'a b' is no address"),
    "federation that is there": (("federate", "init", "folder", "--clients", "a,b", "--data", "data", "--model", "base"), "exists"),
    "federation of one class": (
        ("federate", "init", "new", "--clients", "a,b", "--labels", "x", "--model", "base"),
        "at least two",
    ),
    "federation with weights on the server": (
        ("federate", "init", "new", "--clients", "a,b", "--data", "data", "--model", "base", "--method", "frlora"),
        "needs the weights of the model on the server",
    ),
    "no federation": (("federate", "status", "folder"), "no server was started here yet"),
    "no Flower to serve with": (("federate", "server", "folder"), "pip install 'fedlora[flower]'"),
    "no Ray to run with": (("run", *QUICK, "--set", "transport.name=ray"), "pip install 'fedlora[ray]'"),
    "no home": (("federate", "export", "folder", "--name", "a", "--to", "new"), "no client's home"),
    "names in one place": (("run", *QUICK, "--set", 'clients.names=["a", "b"]'), "fedlora federate"),
    # methods and transforms
    "method": (("run", "--method", "lora-a3"), "lora-a2"),
    "method empty": (("run", "--method", ""), "method"),
    "method elsewhere": (("run", "--method", "no_such_package:Thing"), "no_such_package"),
    "method that is a function": (("run", "--method", "os:system"), "no method"),
    "method that is a class": (("run", "--method", "pathlib:Path"), "no method"),
    "method without a module": (("run", "--method", ":Thing"), ":Thing"),
    "method without a class": (("run", "--method", "os:"), "os"),
    "method relative": (("run", "--method", "..a:B"), "..a:B"),
    "method range": (("run", "--method", "hetlora", "--set", "method.gamma=2"), "gamma"),
    "transform": (("run", "--set", 'transform=[{name="clop"}]'), "clip"),
    "transform of no name": (("run", "--set", "transform=[{max_norm=1.0}]"), "transform"),
    "transform order": (
        ("run", "--method", "fedit", "--set", 'transform=[{name="quantise"}, {name="clip", max_norm=1.0}]'),
        "must be the last",
    ),
    # models
    "model": (("run", *QUICK, "--model", "minlm"), "minilm"),
    "model folder": (("run", *QUICK, "--model", "folder"), "config.json is missing"),
    "model file": (("run", *QUICK, "--model", "file"), "file"),
    "model nowhere": (("run", *QUICK, "--model", "./nowhere"), "no such folder"),
    "model empty": (("run", *QUICK, "--model", ""), "model.source"),
    # data, in the order of what can be wrong with it
    "data": (("run", *QUICK, "--data", "banking7"), "banking77"),
    "data nowhere": (("run", *QUICK, "--data", "nowhere.csv"), "nowhere.csv"),
    "data folder": (("run", *QUICK, "--data", "folder"), "no training file"),
    "data type": (("run", *QUICK, "--data", "file"), "unknown file type"),
    "data empty": (("run", *QUICK, "--data", "empty.csv"), "empty.csv"),
    "data header": (("run", *QUICK, "--data", "header.csv"), "no rows"),
    "data class": (("run", *QUICK, "--data", "oneclass.csv"), "only one class"),
    "data parquet": (("run", *QUICK, "--data", "binary.parquet"), "binary.parquet"),
    "data label": (("run", *QUICK, "--data", "nolabel.csv"), "label"),
    "data lines": (("run", *QUICK, "--data", "broken.jsonl"), "broken.jsonl"),
    "data column": (("run", *QUICK, "--set", "data.text=body"), "body"),
    "data labels": (("run", *QUICK, "--set", "data.label=team"), "team"),
    "data owners": (("run", *QUICK, "--set", "data.partition=column", "--set", "data.column=team"), "team"),
    "data twice": (("run", *QUICK, "--data", '["data", "data"]'), "two sources"),
    "data none": (("run", *QUICK, "--data", "[]"), "data.source"),
    "data columns": (("run", *QUICK, "--set", 'data.text=["a", "b"]'), "data.text"),
    "show nowhere": (("data", "nowhere.csv"), "nowhere.csv"),
    "show folder": (("data", "folder"), "no training file"),
    "show clients": (("data", "data", "--clients", "0"), "clients.count"),
    "show alpha": (("data", "data", "--alpha", "0"), "data.alpha"),
    "show key": (("data", "data", "--set", "data.nonsense=1"), "data.nonsense"),
    "picture folder": (("data", "data", "--picture", "folder"), "--picture folder"),
    "picture type": (("data", "data", "--picture", "split.pdf"), ".png"),
    "picture below a file": (("data", "data", "--picture", "file/split.png"), "is a file"),
    "picture long": (("data", "data", "--picture", f"{LONG}.png"), "too long"),
    # where runs go
    "out there": (("run", *QUICK, "--out", "folder"), "exists already"),
    "out file": (("run", *QUICK, "--out", "file"), "exists already"),
    "out below a file": (("run", *QUICK, "--out", "file/new"), "is a file"),
    "out long": (("run", *QUICK, "--out", LONG), "too long"),
    "resume nothing": (("run", "--resume"), "--out"),
    "resume nowhere": (("run", "--resume", "--out", "nowhere"), "nowhere"),
    "resume file": (("run", "--resume", "--out", "file"), "file"),
    "resume another": (("run", "--resume", "--out", "one", "--set", "train.lr=0.1"), "train.lr"),
    "resume fewer": (("run", "--resume", "--out", "one", "--rounds", "0"), "train.rounds"),
    "resume data": (("run", "--resume", "--out", "data"), "data"),
    # comparisons and reports
    "compare": (("compare", "tabel1"), "table1"),
    "compare folder": (("compare", "folder"), "folder"),
    "compare file": (("compare", "nowhere.toml"), "nowhere.toml"),
    "compare syntax": (("compare", "broken.toml"), "not valid TOML"),
    "compare scale": (("compare", "table1", "--scale", "large"), "--scale"),
    "compare out": (("compare", "table1", "--out", LONG), "too long"),
    "compare out file": (("compare", "table1", "--out", "file/x"), "is a file"),
    "compare key": (("compare", "table1", "--set", "train.nonsense=1"), "train.nonsense"),
    "report nowhere": (("report", "nowhere"), "nowhere"),
    "report file": (("report", "file"), "file"),
    "report folder": (("report", "folder"), "folder"),
    "report long": (("report", LONG), "too long"),
    "report to a folder": (("report", "one", "--html", "folder"), "--html folder"),
    "report to no page": (("report", "one", "--html", "page.pdf"), ".html"),
    "report below a file": (("report", "one", "--html", "file/page.html"), "is a file"),
    "report to a long name": (("report", "one", "--html", f"{LONG}.html"), "too long"),
    # results
    "export nowhere": (("export", "nowhere", "--to", "new"), "nowhere"),
    "export folder": (("export", "folder", "--to", "new"), "folder"),
    "export there": (("export", "one", "--to", "folder"), "exists already"),
    "export below a file": (("export", "one", "--to", "file/new"), "is a file"),
    "export long": (("export", "one", "--to", LONG), "too long"),
    "export client": (("export", "one", "--to", "new", "--client", "0"), "one model for all"),
    "export rank": (("export", "one", "--to", "new", "--rank", "0"), "--rank 0"),
    "export rank of a model": (("export", "one", "--to", "new", "--rank", "2", "--merged"), "--rank 2 with --merged"),
    "push offline": (("export", "one", "--to", "new", "--push", "org/name"), "HF_HUB_OFFLINE=1"),
    "push to no name": (("export", "one", "--to", "new", "--push", "name"), "ORG/NAME is needed"),
    "push to a strange name": (("export", "one", "--to", "new", "--push", "a b/c"), "--push a b/c: "),
    "public alone": (("export", "one", "--to", "new", "--public"), "--public is for --push"),
    "export nobody": (("export", "one", "--to", "new", "--client", "-1"), "--client -1"),
    "predict nowhere": (("predict", "nowhere", "w1"), "nowhere"),
    "predict folder": (("predict", "folder", "w1"), "folder"),
    "predict file": (("predict", "file", "w1"), "file"),
    "predict long": (("predict", LONG, "w1"), "too long"),
    "predict nothing": (("predict", "one"), "no text"),
    "predict format": (("predict", "one", "w1", "--format", "xml"), "--format"),
    "predict client": (("predict", "one", "w1", "--client", "9"), "--client 9"),
    "predict domain": (("predict", "one", "w1", "--domain", "x"), "--domain x"),
    "predict input": (("predict", "one", "--input", "nowhere.txt"), "nowhere.txt"),
    "predict input folder": (("predict", "one", "--input", "folder"), "folder"),
    "predict input type": (("predict", "one", "--input", "file"), "unknown file type"),
    "predict input column": (("predict", "one", "--input", "empty.csv"), "empty.csv"),
    "predict input parquet": (("predict", "one", "--input", "binary.parquet"), "binary.parquet"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_says_what_and_where(case: str, refused) -> None:
    args, says = COMMANDS[case]
    assert says in refused(*args)


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(
    place: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    commands = (("run", *QUICK), ("export", "one", "--to", "new"), ("data", "data"), ("report", "one", "--html", "x.html"))
    for command in commands:
        assert f"{place} cannot be written to" in refused(*command)


# ---- damaged run folders -----------------------------------------------------------------------------------------------

DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "bytes": lambda file: file.write_bytes(b"\x00\xff\xfe" * 40),
    "another": lambda file: file.write_text('{"a": 1}\n'),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}
READ = {  # by which commands, and so must be whole
    "config.toml": ("predict", "export", "report", "resume"),
    "federation.json": ("predict", "export", "report", "resume"),
    "checkpoint": ("predict", "export"),
    "server": ("predict", "export"),
    "summary.json": ("report",),
    "metrics.jsonl": ("report",),
}
CALLS = {
    "predict": lambda run: ("predict", run, "w1"),
    "export": lambda run: ("export", run, "--to", run.parent / "to"),
    "report": lambda run: ("report", run),
    "resume": lambda run: ("run", "--resume", "--out", run, "--rounds", "2"),
}


def damaged() -> list[tuple[str, str, str]]:
    """(file, command, damage). To resume reads the data first, which takes a while; a run without summary is not finished."""
    every = [(name, command, damage) for name, commands in READ.items() for command in commands for damage in DAMAGE]
    return [(n, c, d) for n, c, d in every if (c != "resume" or d == "cut") and (n, d) != ("summary.json", "missing")]


@pytest.mark.parametrize(("name", "command", "damage"), damaged())
def test_a_damaged_run_is_one_line(name: str, command: str, damage: str, place: Path, refused, tmp_path: Path) -> None:
    folder = shutil.copytree(place / "one", tmp_path / "run")
    patterns = {"checkpoint": "checkpoint/round-*.json", "server": "checkpoint/server-*.fed"}
    (file,) = folder.glob(patterns.get(name, name))
    DAMAGE[damage](file)
    by_system = damage == "folder" and file.suffix in (".json", ".jsonl") and command == "report"
    line = refused(*CALLS[command](folder), folder=tmp_path, status=1 if by_system and name != "federation.json" else 2)
    assert str(folder) in line, line
