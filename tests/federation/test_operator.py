"""What an operator gets: units and containers that others can read, and the command line beside Flower's older tools."""

import subprocess
import sys
from pathlib import Path

import pytest
import side
import tiny

from fedlora.errors import BadInput
from fedlora.runs.federation import outline
from fedlora.runs.federation.folder import Federation

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny.save_model("bert", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "fedlora", "federate", "init", "fed", "--clients", "north,south", "--labels", "a,b"]
    done = subprocess.run([*command, "--model", "base", "--server", "fl.example.org:9092"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path / "fed"


def test_systemd_takes_the_units_without_a_word(folder: Path, tmp_path: Path) -> None:
    for unit in sorted((folder / "systemd").iterdir()):
        text = unit.read_text()
        assert "/srv/fedlora/venv/bin/fedlora" in text
        there = tmp_path / unit.name  # a program that is here, in a folder that is here
        there.write_text(text.replace("/srv/fedlora/venv/bin/fedlora", sys.executable).replace("/srv/fedlora/federation", "/tmp"))
        done = subprocess.run(["systemd-analyze", "verify", there], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr


def test_the_compose_file_is_one(folder: Path) -> None:
    python = side.python("compose", ["check-jsonschema>=0.30"])
    command = [python, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", folder / "docker" / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_are_sh_and_certificates_are_good(folder: Path) -> None:
    subprocess.run(["sh", "make-certificates.sh", "fl.example.org", "10.0.0.5"], cwd=folder, check=True, capture_output=True)
    text = subprocess.run(
        ["openssl", "x509", "-in", "tls/server.crt", "-noout", "-text"], cwd=folder, capture_output=True, text=True
    )
    assert "DNS:fl.example.org" in text.stdout and "IP Address:10.0.0.5" in text.stdout
    check = ["openssl", "verify", "-CAfile", "tls/ca.crt", "tls/server.crt"]
    assert subprocess.run(check, cwd=folder, capture_output=True, text=True).stdout == "tls/server.crt: OK\n"
    assert (folder / "tls/ca.key").stat().st_mode & 0o077 == 0 == (folder / "tls/server.key").stat().st_mode & 0o077
    again = subprocess.run(["sh", "make-certificates.sh", "x"], cwd=folder, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr
    subprocess.run(["sh", "make-key.sh", "north"], cwd=folder, check=True, capture_output=True)
    assert (folder / "keys/north").stat().st_mode & 0o077 == 0 and (folder / "keys/north.pub").exists()


def test_a_configuration_that_was_changed_after_init(folder: Path) -> None:
    file = folder / "federation.toml"
    text = file.read_text()
    file.write_text(text.replace("timeout = 30.0", "timeout = 3.0").replace('device = "auto"', 'device = "cpu"'))
    assert file.read_text().count("timeout = 3.0") == file.read_text().count('device = "cpu"') == 1
    outline.read(Federation(folder))
    file.write_text(text.replace("lr = ", "lr = 1"))
    with pytest.raises(BadInput, match=r"federation.toml was changed after fedlora federate init, .* put it back"):
        outline.read(Federation(folder))


def test_the_command_line_beside_flower() -> None:
    """With the older typer and rich that Flower asks for."""
    python = side.python("flower", side.extra("flower"))
    tests = ["tests/cli/test_cli.py", "tests/cli/test_bad_input.py", "tests/cli/test_dry_run.py"]
    # That typer uses what the click that we have warns of.
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", *tests]
    command += ["--deselect", f"{tests[1]}::test_a_command_says_what_and_where[no Flower to serve with]"]
    done = subprocess.run(command, cwd=side.ROOT, env=side.environment(side.ROOT / "tests"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
