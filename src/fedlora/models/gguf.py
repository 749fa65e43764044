"""GGUF files, in which llama.cpp keeps language models: converted once into a folder that transformers loads, and that is kept.

transformers reads the weights and the tokenizer of a GGUF file; what it leaves out is said here, and how some tokenizers split
digits is mended. The folder lies in the cache, under the name of the file and a digest of what it is made of, so that a file that
was changed is converted anew.
"""

import os
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from fedlora.disk import made_once
from fedlora.errors import BadInput, first_line, some
from fedlora.models.quiet import quiet

CACHE = "FEDLORA_CACHE"  # the environment variable that names the folder of converted models
SUFFIX = ".gguf"
NOTES = "conversion.txt"  # in a converted folder: what was found, a line each
CONVERSION = 1  # one more whenever the same file is to be converted otherwise
HEAD = 1 << 20  # bytes of a file that its digest is made of: with the whole of a large one, each start would take seconds
PLAIN = {"F32", "F16", "BF16"}  # types of tensors that are not rounded to blocks

# By tokenizer.ggml.pre, how llama.cpp splits text for a byte-level tokenizer before it merges. Where transformers does not know
# the name, it splits as GPT-2 does.
LIKE_GPT2 = {None, "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe"}
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}  # and then as GPT-2


def find(place: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder without a model of transformers holds; None where there is none.

    Raises:
        BadInput: a folder holds several.
    """
    if place.suffix.lower() == SUFFIX and place.is_file():
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == SUFFIX and file.is_file())
    if len(files) > 1:
        names = some([file.name for file in files], 8)
        raise BadInput(f"model.source = '{place}': {len(files)} GGUF files here; name one of them: {names}")
    return files[0] if files else None


def kept(file: Path) -> Path:
    """Where the folder that a GGUF file is converted into lies, now or later."""
    root = Path(os.environ.get(CACHE) or "~/.cache/fedlora").expanduser()
    stat, digest = file.stat(), blake2b(digest_size=8)
    digest.update(f"{stat.st_size} {stat.st_mtime_ns} {CONVERSION} {version('transformers')} ".encode())
    with open(file, "rb") as opened:
        digest.update(opened.read(HEAD))
    return root / "models" / f"{file.stem}-{digest.hexdigest()}"


def notes(folder: Path) -> tuple[str, ...]:
    """What was found at the conversion of a folder."""
    return tuple((folder / NOTES).read_text("utf-8").splitlines())


def converted(key: str, file: Path) -> Path:
    """The folder that a GGUF file is converted into, made where it is not there yet; another process that makes it is waited for.

    Args:
        key: what messages begin with.

    Raises:
        BadInput: the file is damaged, lacks weights, or is of an architecture that transformers reads no GGUF of; the package that
            reads it is missing; the folder cannot be written.
    """
    folder = kept(file)
    try:
        return made_once(folder, partial(_convert, key, file))
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{key}: {folder} cannot be made: {reason}; {CACHE} names another folder for converted models") from error


def _convert(key: str, file: Path, to: Path) -> None:
    if find_spec("gguf") is None:
        raise BadInput(f"{key}: the package that reads GGUF files is not installed; pip install 'fedlora[gguf]'")
    try:
        with quiet(), redirect_stderr(StringIO()):  # a bar of tqdm's, which nothing else turns off
            _write(key, file, to)
    except BadInput:
        raise
    except Exception as error:  # files of others: what transformers, gguf and NumPy raise over them has no common class
        raise BadInput(f"{key}: {file.name} cannot be converted: {first_line(error)}") from error


def _write(key: str, file: Path, to: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reader = GGUFReader(file)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.resolve().parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadInput(f"{key}: {file.name} lacks {len(missing)} of the model's weights, {missing[0]} among them")
    said = [*_rounded(reader), *_left_out(reader, model), *_split(reader, tokenizer)]
    if all(torch.equal(p, p.bfloat16().float()) for p in model.parameters()):
        model = model.bfloat16()  # half the size, and the same numbers
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    (to / NOTES).write_text("".join(f"{line}\n" for line in said), "utf-8")


def _field(reader: Any, name: str) -> Any:
    """A value of the file's metadata; None where it has none of this name."""
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _rounded(reader: Any) -> Iterator[str]:
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors} - PLAIN)
    if types:
        yield f"the weights of this GGUF file are rounded ({', '.join(types)}): its answers differ from the original model's"


def _left_out(reader: Any, model: Any) -> Iterator[str]:
    """What of the file the model has no place for."""
    scaling = _field(reader, f"{_field(reader, 'general.architecture')}.rope.scaling.type")
    stretched = scaling not in (None, "none") or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if stretched and parameters.get("rope_type", "default") == "default":
        yield (
            "the GGUF file scales rotary positions, which transformers does not read from it: the model is not quite what it "
            "was; the original checkpoint is better"
        )
        return
    there, here = sum(int(tensor.n_elements) for tensor in reader.tensors), sum(p.numel() for p in model.parameters())
    if there > here:
        yield f"{there - here:,} of the GGUF file's {there:,} numbers have no place in transformers' {type(model).__name__}"


def _split(reader: Any, tokenizer: Any) -> Iterator[str]:
    """Mend how the tokenizer splits text, or say that it may split otherwise than the original."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    kind, backend = _field(reader, "tokenizer.ggml.pre"), tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, ByteLevel):
        return
    if kind in SINGLE_DIGITS:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif kind not in LIKE_GPT2:
        yield f"the GGUF file's tokenizer splits text as '{kind}', which transformers does not know: tokens may differ"
