"""Imports go one way: a part imports what stands below it in `ALLOWED`, and nothing else; there is no circle."""

import ast
from pathlib import Path

import fedlora

SOURCE = Path(fedlora.__file__).parent
LEAVES = {"collector", "tables", "errors", "listed", "names", "scores", "seeds"}
VALUES = {"types", "algebra", "history", *LEAVES}  # what methods are written in
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "listed": {"errors"},
    "tables": {"errors"},
    "names": set(),
    "scores": set(),
    "seeds": set(),
    "signals": set(),
    "collector": set(),
    "recipes": set(),
    "algebra": set(),
    "listener": {"tasks/metrics"},
    "disk": LEAVES,
    "types": LEAVES,
    "settings": LEAVES,
    "history": {"types", "algebra", "seeds"},
    "config": {"settings", *LEAVES},
    "methods": {"settings", *VALUES},
    "wire": VALUES,
    "check": {"wire", *VALUES},
    "messages": VALUES,
    "transforms": {"wire", "settings", "config", *VALUES},
    "gather": {"messages", "transforms", "check", "wire", *VALUES},
    "reference": {"config", "methods", "tasks", "transforms", "settings", *LEAVES},
    "summary": {"tasks/metrics", *LEAVES},
    "data": {"config", *LEAVES},
    "models": {"config", "disk", *VALUES},
    "tasks/metrics": set(),  # for those that have no torch
    "tasks": {"models", "data", "config", "settings", *LEAVES},
    "training": {"tasks", "models", "data", "config", *VALUES},
    "clients": {"training", "data", "transforms", "messages", "config", "wire", "disk", *VALUES},
    # No training and no client: a server has neither data nor, where it need not, a model.
    "server": {"gather", "tasks/metrics", "messages", "transforms", "wire", "disk", *VALUES},
    "transports": {"clients", "messages", "wire", "config", *VALUES},
    # Reads folders, and nothing of what makes them.
    "report": {"methods", "tasks/metrics", "data", "config", "summary", *LEAVES},
    "track": {"config", "tasks/metrics", "disk", *LEAVES},  # told of a run from without
    "runs": {
        *("report", "server", "gather", "transports", "clients", "training", "tasks", "models", "data", "methods", "transforms"),
        *("messages", "check", "wire", "summary", "config", "settings", "disk", "signals", "listener", "track"),
        *VALUES,
    },
    "comparison": {
        "runs",
        "transports",
        "methods",
        "transforms",
        "report",
        "models",
        "tasks",
        "data",
        "training",
        "settings",
        "summary",
        "config",
        "disk",
        "listener",
        *VALUES,
    },
    "arguments": {"runs", "comparison", "models", "tasks", "data", "config", "summary", *LEAVES},
    "api": {
        "arguments",
        "comparison",
        "runs",
        "report",
        "models",
        "tasks",
        "data",
        "listener",
        "config",
        "summary",
        "disk",
        *LEAVES,
    },
    "chat": {"runs", "tasks", *LEAVES},
    "cli_federate": {"api", "comparison", "runs", "report", "summary", "signals", "disk", *LEAVES},
    "cli": {
        "api",
        "chat",
        "cli_federate",
        "comparison",
        "runs",
        "report",
        "methods",
        "tasks",
        "data",
        "reference",
        "summary",
        "signals",
        "config",
        "disk",
        *LEAVES,
    },
    "__main__": {"cli"},
}


def imports() -> list[tuple[Path, str]]:
    """(file, imported module) for every import statement, wherever in the file it stands."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found += [(file, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [(file, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def part(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_directions() -> None:
    for file, name in imports():
        if name.startswith("fedlora.") and part(file) != "__init__":
            own, other = part(file), name.split(".")[1:]
            allowed = ALLOWED[own] | {own, "__version__"}
            assert other[0] in allowed or "/".join(other[:2]) in allowed, f"{file.relative_to(SOURCE)} imports {name}"


def test_no_circle() -> None:
    def below(own: str, path: tuple[str, ...]) -> None:
        assert own not in path, f"{' imports '.join((*path, own))}"
        for other in ALLOWED[own]:
            below(other.split("/")[0], (*path, own))

    for own in LEAVES | set(ALLOWED):
        below(own, ())


def test_no_file_is_too_long_to_read() -> None:
    for file in SOURCE.rglob("*.py"):
        assert file.stat().st_size <= 24_000, file.relative_to(SOURCE)


def test_methods_do_not_import_each_other() -> None:
    for file, name in imports():
        if part(file) == "methods":
            assert not name.startswith("fedlora.methods."), f"{file.name} imports {name}"
            assert name.split(".")[0] not in {"transformers", "peft", "flwr"} and not name.startswith("torch.nn"), (
                f"{file.name}: {name}"
            )


def test_one_module_imports_peft() -> None:
    assert {file.relative_to(SOURCE).as_posix() for file, name in imports() if name.split(".")[0] == "peft"} == {"models/peft.py"}


def test_one_package_imports_flower() -> None:
    found = {file.relative_to(SOURCE).parent.as_posix() for file, name in imports() if name.split(".")[0] == "flwr"}
    assert found == {"transports/flower"}


def test_no_pickle() -> None:
    assert not [file for file, name in imports() if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}]
    assert not [file for file in SOURCE.rglob("*.py") if "torch.load(" in file.read_text()]


def test_no_method_is_treated_by_name() -> None:
    import re

    for file in SOURCE.rglob("*.py"):
        assert not re.search(r"if (self\.)?method(\.name)? *(==|in\b)", file.read_text()), file


WORDS = ("accuracy", "macro_f1", "commonest")  # of classification alone
MAY_SAY = {
    "summary.py": {"domain_accuracy", "task_accuracy"},  # a key of a row in folders of earlier versions, and what it became
    "report/words.py": {"the commonest training class"},  # pages have said it in these words before there were other tasks
}


def spoken(file: Path) -> set[str]:
    """The texts in a file's code, pieces of formatted ones too; no docstrings."""
    tree = ast.parse(file.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    silent = {id(node.value) for node in nodes}  # docstrings of modules, classes and functions
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {str(node.value) for node in texts if id(node) not in silent}


def test_scores_are_named_by_tasks() -> None:
    """Everything else speaks of a run's metrics by their names, titles, units and directions."""
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        if part(file) != "tasks":
            said = {text for text in spoken(file) if any(word in text.lower() for word in WORDS)}
            assert said == MAY_SAY.get(name, set()), name


def test_reports_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, fedlora.report.html, fedlora.report.split, fedlora.report.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
