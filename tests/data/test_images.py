"""Images of folders, tables and digits: what is read, what is refused by name, and what a model is given."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pyarrow as pa
import pytest
import transformers
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits

from fedlora.config import ClientsConfig, DataConfig
from fedlora.data import images
from fedlora.data.dataset import Dataset
from fedlora.data.domains import deal
from fedlora.data.images import Pixels
from fedlora.data.load import load
from fedlora.errors import BadInput
from fedlora.tasks.image_classification import ImageClassification

TASK = ImageClassification()


def read(source: Path | str, task: ImageClassification = TASK, **changes: Any) -> Dataset:
    return load(task, DataConfig(source=str(source), **changes), 0)


def array(raw: bytes) -> np.ndarray:
    return np.asarray(images.opened(raw))


def test_a_folder_of_folders_is_read_part_by_part(tmp_path: Path) -> None:
    pictures.save_folder(tmp_path / "shades")
    (tmp_path / "shades" / "valid" / "dark").mkdir(parents=True)
    (tmp_path / "shades" / "valid" / "dark" / "1.PNG").write_bytes(pictures.png(np.zeros((8, 8), dtype=np.uint8)))
    (tmp_path / "shades" / "train" / "dark" / "notes.txt").write_text("no image")
    data = read(tmp_path / "shades")
    assert data.name == "shades" and data.things == "images" and data.schema.shape == (1, 8, 8)
    assert data.schema.label_names == ("dark", "left", "light") and [len(part) for _, part in data.parts] == [30, 15, 1]
    wanted, labels = pictures.examples(30, 1)
    found = sorted(
        (data.schema.label_names[y], array(x).tobytes()) for x, y in zip(data.train.inputs, data.train.targets, strict=True)
    )
    assert found == sorted((label, x.tobytes()) for x, label in zip(wanted, labels, strict=True))
    assert any("1 of 31 files are no images in a folder of a class: dark/notes.txt" in note for note in data.notes)


@pytest.mark.parametrize("form", ["struct", "binary", "path", "text"])
def test_a_table_with_a_column_of_images(form: str, tmp_path: Path) -> None:
    """As the Hub's sets have it, integer labels beside them; the column's name is data.image."""
    xs, labels = pictures.examples(9, 3, size=6, channels=3)
    files = [pictures.png(x) for x in xs]
    for i, raw in enumerate(files):
        (tmp_path / f"{i}.png").write_bytes(raw)
    values: dict[str, list[Any]] = {
        "struct": [{"bytes": raw, "path": None} for raw in files],
        "binary": files,
        "path": [{"bytes": None, "path": str(tmp_path / f"{i}.png")} for i in range(9)],
        "text": [str(tmp_path / f"{i}.png") for i in range(9)],
    }
    table = pa.table({"img": values[form], "label": [pictures.CLASSES.index(x) for x in labels]})
    parquet.write_table(table, tmp_path / "train.parquet")
    data = read(tmp_path, image="img")
    assert data.schema.shape == (3, 6, 6) and len(data.train) + len(data.test) == 9 and data.schema.label_names == ("0", "1", "2")
    assert {array(x).tobytes() for x in (*data.train.inputs, *data.test.inputs)} == {x.tobytes() for x in xs}


def test_what_of_a_folder_is_left_out_is_said(tmp_path: Path) -> None:
    pictures.save_folder(tmp_path / "shades")
    (tmp_path / "shades" / "train" / "none").mkdir()
    (tmp_path / "shades" / "train" / "dark" / "deeper").mkdir()
    (tmp_path / "shades" / "train" / "dark" / "deeper" / "0.png").write_bytes(pictures.png(np.zeros((8, 8), dtype=np.uint8)))
    (tmp_path / "shades" / "train" / "top.png").write_bytes(b"")
    data = read(tmp_path / "shades")
    assert len(data.train) == 30 and data.schema.label_names == ("dark", "left", "light")
    told = " ".join(data.notes)
    assert "2 of 32 files are no images in a folder of a class: dark/deeper/0.png, top.png" in told
    assert "1 of 4 folders hold no image, and are no class: none" in told


def test_an_image_is_a_path_bytes_an_object_or_an_array(tmp_path: Path) -> None:
    """Of each kind what is opened has the same pixels."""
    (x,), _ = pictures.examples(1, 3, size=6, channels=3)
    file = tmp_path / "x.png"
    file.write_bytes(pictures.png(x))
    image = Image.open(file)
    given = [file, str(file), file.read_bytes(), bytearray(file.read_bytes()), image, x, {"bytes": None, "path": str(file)}]
    for one in map(images.opened, images.arguments(given)):
        np.testing.assert_array_equal(np.asarray(one), x)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        (raw,) = images.arguments([image.convert(mode)])
        np.testing.assert_array_equal(*(np.asarray(one.convert("RGB")) for one in (images.opened(raw), image.convert(mode))))
    turned = Image.fromarray(x[:, :4])
    turned.getexif()[0x0112] = 6  # lies on its side
    (raw,) = images.arguments([turned])
    assert images.opened(raw).size == (6, 4)
    for bad, says in (
        (5, "image 1 is none, but int; possible"),
        (x.astype(float), "but ndarray"),
        (tmp_path / "gone", "no such file"),
    ):
        with pytest.raises(BadInput, match=says):
            list(images.arguments([bad]))


def test_digits_are_those_of_scikit_learn_split_by_seed() -> None:
    data, again, other = read("digits"), read("digits"), load(TASK, DataConfig(source="digits"), 1)
    assert data.digest == again.digest != other.digest and data.schema.shape == (1, 8, 8)
    assert data.schema.label_names == tuple("0123456789") and (len(data.train), len(data.test)) == (1438, 359)
    wanted = load_digits()
    known = {np.rint(x * 255 / 16).astype(np.uint8).tobytes(): y for x, y in zip(wanted.images, wanted.target, strict=True)}
    for part in (data.train, data.test):
        assert [known[array(x).tobytes()] for x in part.inputs] == part.targets.tolist()
    assert [np.bincount(data.test.targets).min(), np.bincount(data.test.targets).max()] == [35, 37]


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    folder = pictures.save_folder(tmp_path / "shades")
    bad = folder / "test" / "left" / "cut.png"
    for raw, said in (
        (b"", "there is no image"),
        (b"no image at all", "cannot be read as an image: it is of no known format"),
        (pictures.png(np.zeros((64, 64), dtype=np.uint8))[:60], "cannot be read as an image: "),
        (pictures.png(np.zeros((8, 8), dtype=np.uint16)), "an image of more than 8 bits a channel; save it with 8"),
    ):
        bad.write_bytes(raw)
        with pytest.raises(BadInput, match=re.escape(said)) as error:
            read(folder)
        assert f"{folder / 'test'}: column 'image', file left/cut.png: " in str(error.value) and "\n" not in str(error.value)
    table = pa.table({"image": [pictures.png(np.zeros((8, 8), dtype=np.uint8)), b"x"], "label": ["a", "b"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"t\.parquet: column 'image', row 2: cannot be read as an image"):
        read(tmp_path / "t.parquet")
    parquet.write_table(pa.table({"image": [1, 2], "label": ["a", "b"]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match="column 'image' holds int64, not images; possible: the bytes of image files, their paths"):
        read(tmp_path / "t.parquet")
    parquet.write_table(pa.table({"image": ["nowhere.png"], "label": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"column 'image', row 1: nowhere\.png: no such file"):
        read(tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=r"no column 'img'; it has 'image', 'label'; data\.image names the column"):
        images.of_column(images.digits(DataConfig(source="digits").sources[0]).train, "img")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty: no folder train/ with a folder of images for each class, nor a train\.parquet"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(BadInput, match=r"empty/train: no images; each class is a folder of them, as in train/cat/1\.png"):
        read(tmp_path / "empty")


def test_images_of_several_sizes_have_a_common_one_only_where_it_is_given(tmp_path: Path) -> None:
    folder = pictures.save_folder(tmp_path / "a")
    (folder / "train" / "dark" / "wide.png").write_bytes(pictures.png(np.zeros((8, 12, 3), dtype=np.uint8)))
    assert read(folder).schema.shape == () and read(folder, ImageClassification(size=16)).schema.shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 5, 12)])
def test_pixels_are_those_of_transformers_own_processor(shape: tuple[int, int, int], mode: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (10, 9, 3), dtype=np.uint8)).convert(mode)
    image.save(tmp_path / "x.png")
    mean, std = (0.2, 0.4, 0.6)[: shape[0]], (0.3, 0.5, 0.7)[: shape[0]]
    theirs = transformers.ViTImageProcessorPil(
        size={"height": shape[1], "width": shape[2]}, image_mean=list(mean), image_std=list(std), do_convert_rgb=shape[0] == 3
    )
    given = Image.open(tmp_path / "x.png")
    wanted = theirs(given if shape[0] == 3 else given.convert("L"), return_tensors="np")["pixel_values"][0]
    ours = Pixels(shape, mean, std)
    for x in (str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes()):
        assert ours.of(x).dtype == np.float32 and ours.of(x).flags["C_CONTIGUOUS"]
        np.testing.assert_allclose(ours.of(x), wanted, atol=1e-6)


def test_images_are_upright(tmp_path: Path) -> None:
    x = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(x).save(tmp_path / "x.png", exif=exif)
    assert (array((tmp_path / "x.png").read_bytes()) == np.rot90(x, -1)).all()


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("channels", [1, 3])
def test_quarter_turns_are_those_of_numpy(quarters: int, channels: int) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 9, channels), dtype=np.uint8).squeeze()
    assert (array(images.turned(pictures.png(x), 90.0 * quarters)) == np.rot90(x, quarters)).all()


def test_clients_turn_what_they_hold_for_training_and_for_scoring(tmp_path: Path) -> None:
    data = read(pictures.save_folder(tmp_path / "shades"), validation=0.2)
    settings = DataConfig(source="x", alpha=1.0)
    parts = deal(data, settings, ClientsConfig(count=5, held_out=2), 0)
    turned = ImageClassification(rotations=(0.0, 90.0)).dealt(data, parts)
    pairs = ((data.train, turned.train, parts.train), (data.test, turned.test, parts.test))
    for before, after, owned in (*pairs, (data.validation, turned.validation, parts.validation)):
        assert (before.targets == after.targets).all() and (before.strata == after.strata).all() and len(owned) == 5
        for k, rows in enumerate(owned):
            for row in rows:
                assert (array(after.inputs[row]) == np.rot90(array(before.inputs[row]), k % 2)).all()
    assert turned.digest != data.digest and TASK.dealt(data, parts) is data


def test_what_several_clients_hold_cannot_be_turned(tmp_path: Path) -> None:
    x = [pictures.png(x) for x in pictures.examples(12, 1)[0]]
    table = {"image": x, "label": ["a", "b"] * 6, "who": ["p", "q", "r"] * 4}
    parquet.write_table(pa.table(table), tmp_path / "train.parquet")
    parquet.write_table(pa.table({name: table[name] for name in ("image", "label")}), tmp_path / "test.parquet")
    settings = DataConfig(source=str(tmp_path), partition="column", column="who")
    data = load(TASK, settings, 0)
    parts = deal(data, settings, ClientsConfig(), 0)
    with pytest.raises(BadInput, match=r"task\.rotations: images of the test part belong to several clients"):
        ImageClassification(rotations=(90.0,)).dealt(data, parts)


def test_labels_are_skewed_as_dirichlet_says() -> None:
    """Each class is cut at the running sums of one draw over the clients, whatever the clients' inputs are."""
    from fedlora.data.partition import dirichlet_shares
    from fedlora.seeds import generator

    data = read("digits")
    parts = deal(data, DataConfig(source="digits", alpha=0.3), ClientsConfig(count=4), 5)
    for c in range(10):
        shares = dirichlet_shares(generator(5, "partition", "shares", c), 0.3, 4)
        count = int((data.train.targets == c).sum())
        cuts = np.rint(np.cumsum(shares[:-1]) * count)
        wanted = np.diff([0, *cuts, count])
        assert [int((data.train.targets[rows] == c).sum()) for rows in parts.train] == wanted.tolist()


def test_images_to_predict(tmp_path: Path) -> None:
    folder = pictures.save_folder(tmp_path / "shades", test=3)
    paths = sorted(str(path) for path in (folder / "test").rglob("*.png"))
    source = DataConfig(source="x").sources[0]
    assert list(images.read(folder / "test", source)) == paths == list(images.lines([f"{path}\n".encode() for path in paths], "x"))
    assert list(images.read(Path(paths[0]), source)) == [paths[0]]
    for given in (images.arguments(["gone.png"]), images.lines([b"gone.png\n"], "standard input")):
        with pytest.raises(BadInput, match=r"^gone\.png: no such file$"):
            list(given)
