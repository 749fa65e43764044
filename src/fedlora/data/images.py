"""Images: from a folder of them, from a table with a column of image files, or scikit-learn's digits, to arrays.

An image is the bytes of its file, or the path of one. Which shape a model takes, and how it wants its numbers, is `Pixels`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.config import SourceConfig
from fedlora.data import columns, files, texts
from fedlora.data import load as sources
from fedlora.data.source import Part, Source
from fedlora.errors import BadInput, first_line, some

DIGITS = "digits"
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
GREY = ("1", "L", "LA", "La")  # PIL's names of how the pixels of an image are stored
KEPT_BY_TIFF = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I", "F", "I;16")
WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than a byte a channel
Given = bytes | str


# ---- where images come from --------------------------------------------------------------------------------------------


def find(config: SourceConfig) -> Source:
    """The tables of a folder with `train/CLASS/*.png`, and perhaps `test/` and `validation/`; of scikit-learn's `digits`; or of
    what else holds a table (see `data.load.find`).

    Raises:
        BadInput: it is nothing of all this, or cannot be read.
    """
    path = Path(config.source).expanduser()
    if config.source == DIGITS and not path.exists():
        return digits(config)
    if path.is_dir():
        train, test, validation = (_folder(path, *names) for names in (("train",), ("test",), files.VALIDATION))
        if train is not None:
            parts = [None if each is None else _of_folder(each, config) for each in (test, validation)]
            return Source(path.resolve().name, _of_folder(train, config), parts[0], validation=parts[1])
        if not [*path.glob("[Tt]rain*"), *path.glob("data/train*")]:
            held = some(sorted(entry.name for entry in path.iterdir()), 8) or "nothing"
            raise BadInput(f"{path}: no folder train/ with a folder of images for each class, nor a train.parquet; it holds {held}")
    return sources.find(config)


def digits(config: SourceConfig) -> Source:
    """The 1,797 handwritten digits of scikit-learn, 8 by 8 pixels of 17 greys. There is no test part."""
    from sklearn.datasets import load_digits

    found = load_digits()
    greys = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Source(DIGITS, Part(DIGITS, _table([written(_image(x)) for x in greys], found.target.tolist(), config)))


def _image(pixels: NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _folder(path: Path, *names: str) -> Path | None:
    """The folder of a part, whatever the case of its name."""
    return next((entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name.lower() in names), None)


def _of_folder(folder: Path, config: SourceConfig) -> Part:
    """A row for each image; the class is the name of the folder that it lies in."""
    folders = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    files = [file for each in folders for file in sorted(each.rglob("*")) if file.is_file()]
    images = [file for file in files if file.parent in folders and file.suffix.lower() in ENDINGS]
    if not images:
        raise BadInput(f"{folder}: no images; each class is a folder of them, as in {folder.name}/cat/1.png ({', '.join(ENDINGS)})")
    classes = {file.parent for file in images}
    others = [file for file in (*files, *filter(Path.is_file, sorted(folder.iterdir()))) if file not in images]
    empty = [each.name for each in folders if each not in classes]
    notes = []
    if others:
        counts = f"{len(others):,} of {len(others) + len(images):,} files are no images in a folder of a class"
        notes.append(f"{folder}: {counts}: {some([str(file.relative_to(folder)) for file in others], 3)}")
    if empty:
        notes.append(f"{folder}: {len(empty):,} of {len(folders):,} folders hold no image, and are no class: {some(empty, 3)}")
    table = _table([_read(file) for file in images], [file.parent.name for file in images], config)
    return Part(str(folder), table, [f"{file.parent.name}/{file.name}" for file in images], "file", notes=tuple(notes))


def _table(images: Sequence[bytes], labels: Sequence[str] | Sequence[int], config: SourceConfig) -> Any:
    import pyarrow as pa

    return pa.table({config.image: pa.array(images, pa.large_binary()), config.label: pa.array(labels)})


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror or error}") from error


# ---- columns of images -------------------------------------------------------------------------------------------------


def of_column(part: Part, name: str) -> tuple[tuple[bytes, ...], list[tuple[int, int, int]]]:
    """The images of a column, and the channels (1 or 3), height and width of each. A value is the bytes of a file or its path, or
    an object with either (`bytes`, `path`), as Hugging Face's Image feature has it.

    Raises:
        BadInput: the column is missing or holds something else, or an image cannot be read (its row is named).
    """
    from pyarrow import types

    kind = columns.find(part, name, "data.image").type
    kinds = (types.is_struct, types.is_binary, types.is_large_binary, types.is_string, types.is_large_string)
    if not any(fits(kind) for fits in kinds):
        possible = "the bytes of image files, their paths, or both as Hugging Face has them"
        raise BadInput(f"{part.where}: column '{name}' holds {kind}, not images; possible: {possible}")
    found: list[bytes] = []
    shapes: list[tuple[int, int, int]] = []
    for row, value in enumerate(part.table.column(name).to_pylist()):
        where = f"{part.where}: column '{name}', {part.place(row)}"
        raw = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
        if not raw:
            raise BadInput(f"{where}: there is no image")
        if isinstance(raw, str):
            file = Path(raw).expanduser()
            if not file.is_file():
                raise BadInput(f"{where}: {raw}: no such file")
            raw = _read(file)
        image = opened(raw, where)
        found.append(raw)
        shapes.append((1 if image.mode in GREY else 3, image.height, image.width))
    return tuple(found), shapes


def common_shape(shapes: Iterable[tuple[int, int, int]], size: int | None) -> tuple[int, ...]:
    """Channels, height and width that serve all images: grey where all are; `size` by `size` where it is given. Empty where they
    differ in height or width."""
    known = set(shapes)
    sizes = {(height, width) for _, height, width in known} if size is None else {(size, size)}
    return (max(channels for channels, _, _ in known), *sizes.pop()) if len(sizes) == 1 else ()


# ---- images ------------------------------------------------------------------------------------------------------------


def opened(given: Given, where: str = "") -> Any:
    """The PIL image, upright. BadInput where it is none, begun by `where`, by default its path."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    place = where or (given if isinstance(given, str) else "an image")
    raw = _read(Path(given)) if isinstance(given, str) else given
    try:
        image = Image.open(BytesIO(raw))
        image.load()
    except Exception as error:  # decoders of many formats; what they raise over damaged files has no common base
        said = "it is of no known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise BadInput(f"{place}: cannot be read as an image: {said}") from error
    if image.mode in WIDE:
        raise BadInput(f"{place}: an image of more than 8 bits a channel; save it with 8")
    return ImageOps.exif_transpose(image)


def written(image: Any) -> bytes:
    """The bytes of an image file without loss, the same on every machine: no compression, so no version of a packer."""
    out = BytesIO()
    image.save(out, "PPM")
    return out.getvalue()


def _as_file(image: Any) -> bytes:
    """The bytes of a file without loss of any image of PIL's."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    out = BytesIO()
    (upright if upright.mode in KEPT_BY_TIFF else upright.convert("RGB")).save(out, "TIFF")
    return out.getvalue()


def turned(given: Given, degrees: float) -> bytes:
    """An image turned counter-clockwise: exactly by quarters of a turn; else between its own edges, with black corners."""
    from PIL import Image

    image = opened(given)
    image = image.convert("L" if image.mode in GREY else "RGB")
    whole = degrees % 90 == 0
    return written(image.rotate(degrees, Image.Resampling.NEAREST if whole else Image.Resampling.BILINEAR, expand=whole))


@dataclass(frozen=True)
class Pixels:
    """How a model takes an image.

    Attributes:
        shape: channels (1 is grey, 3 red, green and blue), height, width, to which an image is stretched.
        mean, std: of each channel, which is given as (x / 255 - mean) / std, x from 0 to 255.
        resample: PIL's number of how pixels are made when it is stretched; 2 is bilinear.
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 2

    def of(self, given: Given) -> NDArray[np.float32]:
        """An image as the model takes it, (channels, height, width)."""
        channels, height, width = self.shape
        image = opened(given).convert("L" if channels == 1 else "RGB").resize((width, height), self.resample)
        x = np.asarray(image, dtype=np.float32).reshape(height, width, channels).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(each, dtype=np.float32)[:, None, None] for each in (self.mean, self.std))
        return np.ascontiguousarray((x - mean) / std)


# ---- images without labels ---------------------------------------------------------------------------------------------


def arguments(given: Iterable[Any]) -> Iterator[Given]:
    """The images of a command line or a list: paths, the bytes of files, PIL's images, or arrays of bytes, (height, width) or with
    channels behind. BadInput names the one that is none."""
    from PIL import Image

    for number, x in enumerate(given, 1):
        x = x.get("bytes") or x.get("path") if isinstance(x, Mapping) else x  # of a table, as Hugging Face has it
        if isinstance(x, np.ndarray) and x.dtype == np.uint8 and (x.ndim == 2 or (x.ndim == 3 and x.shape[2] in (3, 4))) and x.size:
            x = Image.fromarray(x)
        if isinstance(x, Image.Image):
            x = _as_file(x)
        if isinstance(x, bytes | bytearray | memoryview):
            yield bytes(x)
        elif not isinstance(x, str | Path):
            raise BadInput(
                f"image {number} is none, but {type(x).__name__}; possible: a path, the bytes of a file, PIL's image, or an array "
                "of uint8 (height, width) or (height, width, 3)"
            )
        elif not Path(x).is_file():
            raise BadInput(f"{x}: no such file")
        else:
            yield str(x)


def read(path: Path, config: SourceConfig) -> Iterator[Given]:
    """The images in a folder, by name; the image that a file is; or those in the column of a table that `config` names."""
    if path.is_dir():
        return iter([str(file) for file in sorted(path.rglob("*")) if file.suffix.lower() in ENDINGS])
    if path.suffix.lower() in ENDINGS:
        return arguments([str(path)])
    return iter(of_column(files.read_part([path], config), config.image)[0])


def lines(raw: Iterable[bytes], where: str) -> Iterator[Given]:
    """Paths, one a line; blank lines are left out."""
    return arguments(path for line in texts.lines(raw, where) if (path := line.strip()))
