"""How bytes travel in Flower's messages: as one array of bytes, which Flower cuts into pieces and stores once where it is the same
for many; compressed where that pays. A first byte says how to read the rest."""

from typing import Any

import zstandard
from flwr.app import Array, ArrayRecord, RecordDict

RECORD, NAME, KIND = "fedlora", "message", "fedlora.bytes"
PLAIN, COMPRESSED, LOST = b"\0", b"\1", b"\2"
SAMPLE = 1 << 20  # bytes that are tried first
PAYS = 0.9  # what is left of a message at most, so that it travels compressed


def pack(data: bytes) -> bytes:
    """Bytes as they travel."""
    compressor = zstandard.ZstdCompressor(level=1)
    if len(data) > SAMPLE and len(compressor.compress(data[:SAMPLE])) > PAYS * SAMPLE:
        return PLAIN + data
    packed = compressor.compress(data)
    return COMPRESSED + packed if len(packed) < PAYS * len(data) else PLAIN + data


def unpack(data: bytes, limit: int) -> bytes:
    """What `pack` was given. ValueError: it is damaged, says that there is no answer and why, or is more than `limit` bytes, of
    which no more is made than these."""
    how, rest = data[:1], data[1:]
    if how == LOST:
        raise ValueError(rest[:300].decode("utf-8", "replace"))
    if how == PLAIN and len(rest) <= limit:
        return rest
    if how == COMPRESSED:
        try:
            size = zstandard.frame_content_size(rest)
            if 0 <= size <= limit:
                found: bytes = zstandard.ZstdDecompressor().decompress(rest, max_output_size=limit)
                return found
        except zstandard.ZstdError as error:
            raise ValueError(f"a damaged message: {error}") from error
    raise ValueError(f"a message of more than {limit:,} bytes, or none at all")


def lost(why: str) -> bytes:
    """There is no answer, as it travels."""
    return LOST + why.encode()[:1000]


def content(data: bytes) -> RecordDict:
    """Flower's record of bytes that travel."""
    return RecordDict({RECORD: ArrayRecord({NAME: Array(dtype="uint8", shape=(len(data),), stype=KIND, data=data)})})


def bytes_of(record: Any) -> bytes:
    """The bytes of such a record. ValueError: it is another one."""
    try:
        array = record[RECORD][NAME]
        if array.stype == KIND and isinstance(array.data, bytes):
            return array.data
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError("it is no message of a federation")
