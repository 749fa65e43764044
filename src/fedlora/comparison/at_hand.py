"""What a comparison's processes cannot be given otherwise: data and a model that are at hand, as files in its folder."""

import shutil
import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from fedlora.config import DataConfig, TaskConfig
from fedlora.data.given import GIVEN, Data, same, write
from fedlora.disk import made_once
from fedlora.models.load import Given
from fedlora.models.quiet import quiet
from fedlora.tables import nested
from fedlora.tasks import columns


def keep(folder: Path, own: Given | None, data: str | list[str] | Data | None, tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a comparison's processes are told of what is at hand here: files in its folder, which are written where they lack."""
    found = []
    if isinstance(data, Data):
        found.append(nested("data.source", str(_placed(folder.absolute() / GIVEN, data, tables))))
    if own is not None:
        earlier, now = (folder.absolute() / GIVEN / name.replace(":", "-") for name in (own.earlier, own.source))
        parts = own.model, own.processor
        with quiet():
            place = earlier if earlier.exists() else made_once(now, lambda part: [x.save_pretrained(part) for x in parts])
        found.append(nested("model.source", str(place)))
    return found


def _placed(folder: Path, data: Data, tables: Mapping[str, Any]) -> Path:
    """Where in a comparison's folder its data is: other data of the same name has a place of its own, and so runs of its own."""
    keys = {**DataConfig().model_dump(mode="json"), **tables.get("data", {})}
    with tempfile.TemporaryDirectory() as fresh:
        label = keys["label"]  # in a comparison any key may hold a list
        used = columns(tables.get("task", {}).get("name", TaskConfig().name), keys)
        write(data, Path(fresh), label if isinstance(label, str) else label[0], used)
        for k in count(1):
            place = folder / (data.name if k == 1 else f"{data.name}-{k}/{data.name}")
            if not place.exists() or same(place, Path(fresh)):
                break
        return made_once(place, lambda part: shutil.copytree(fresh, part, dirs_exist_ok=True))
