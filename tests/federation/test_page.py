"""The commands of docs/federation.md, in a folder with three hospitals' letters and a tiny model."""

import csv
import re
import subprocess
from pathlib import Path

import pytest
import side
import tiny

pytestmark = pytest.mark.slow

PAGE = side.ROOT / "docs" / "federation.md"
NAMES = ("north", "south", "west")


def test_the_commands_of_the_page(tmp_path: Path) -> None:
    python = side.python("flower", side.extra("flower"))
    tiny.save_model("bert", tmp_path / "base")
    tiny.save_data(tmp_path)
    rows = list(csv.DictReader((tmp_path / "train.csv").read_text().splitlines()))
    with open(tmp_path / "letters.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["text", "label", "hospital"], *([row["text"], row["label"], NAMES[i % 3]] for i, row in enumerate(rows))]
        )
    for i, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        for part, own in (("train", rows[i::3][:-6]), ("test", rows[i::3][-6:])):
            with open(tmp_path / name / f"{part}.csv", "w", newline="") as file:
                csv.writer(file).writerows([["text", "label"], *([row["text"], row["label"]] for row in own)])
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    assert sum(command.startswith("fedlora federate") for command in commands) == 7
    commands = [command for command in commands if not command.startswith("pip ")]
    small = {"fedlora run": " --model base", "fedlora federate init": " --model base"}
    lines = ["set -e", "trap 'kill $(jobs -p) || true; wait' EXIT"]
    for command in commands:
        more = next((words for start, words in small.items() if command.startswith(start)), "")
        words = command.replace("fedlora ", f"{python} -m fedlora ", 1)  # no function: of one in the background only the shell ends
        lines.append(words if words.endswith("&") else words + more)
    environment = side.environment()
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode in (0, 143), done.stdout + done.stderr
    assert "after 3 rounds" in done.stdout and (tmp_path / "north-adapter" / "adapter_config.json").exists()
    assert (tmp_path / "wards/server/run/report.html").exists()
