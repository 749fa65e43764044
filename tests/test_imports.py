"""Imports go one way: types, algebra <- methods <- engine <- cli; models, data and training feed the engine only."""

import ast
from pathlib import Path

import fedlora

SOURCE = Path(fedlora.__file__).parent
LEAVES = {"errors", "names", "scores", "seeds"}
ALLOWED = {
    "errors": set(),
    "names": set(),
    "scores": set(),
    "seeds": set(),
    "types": LEAVES,
    "settings": LEAVES,
    "history": {"types", "algebra", "seeds"},
    "summary": LEAVES,
    "signals": set(),
    "config": {"settings", *LEAVES},
    "algebra": set(),
    "methods": {"types", "settings", "history", "algebra", *LEAVES},
    "transforms": {"types", "settings", "algebra", *LEAVES},
    "data": {"config", *LEAVES},
    "models": {"types", "algebra", "config", *LEAVES},
    "training": {"types", "algebra", "config", "models", *LEAVES},
    "report": {"methods", "data", "config", "summary", *LEAVES},
    "recipes": set(),
    "engine": {
        "types",
        "history",
        "algebra",
        "methods",
        "transforms",
        "data",
        "models",
        "training",
        "report",
        "summary",
        "config",
        *LEAVES,
    },
    "compare": {"engine", "models", "data", "training", "report", "types", "settings", "summary", "config", *LEAVES},
    "cli": {"compare", "engine", "methods", "data", "report", "summary", "signals", "config", *LEAVES},
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
            own, other = part(file), name.split(".")[1]
            assert other == own or other in ALLOWED[own] | {"__version__"}, f"{file.relative_to(SOURCE)} imports {name}"


def test_methods_do_not_import_each_other() -> None:
    for file, name in imports():
        if part(file) == "methods":
            assert not name.startswith("fedlora.methods."), f"{file.name} imports {name}"
            assert name.split(".")[0] not in {"transformers", "peft", "flwr"} and not name.startswith("torch.nn"), (
                f"{file.name}: {name}"
            )


def test_one_module_imports_peft() -> None:
    assert {file.relative_to(SOURCE).as_posix() for file, name in imports() if name.split(".")[0] == "peft"} == {"models/peft.py"}


def test_no_pickle() -> None:
    assert not [file for file, name in imports() if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib"}]
    assert not [file for file in SOURCE.rglob("*.py") if "torch.load(" in file.read_text()]


def test_no_method_is_treated_by_name() -> None:
    import re

    for file in SOURCE.rglob("*.py"):
        assert not re.search(r"if (self\.)?method(\.name)? *(==|in\b)", file.read_text()), file
