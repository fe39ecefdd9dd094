"""The header of a GGUF file: settings of the model and its tokenizer, and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read with a parser of its own: that of the package `gguf`
takes seconds for a vocabulary, and cannot say what a damaged file lacks.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fuseline.compile.gguf.block_types import BLOCK_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of a value of one size, as struct has them."""
STRING, ARRAY = 8, 9
MAX_DIMS = 4
SHARD = re.compile(r"(?P<name>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf")
AGAIN = "get the file again"


class GgufError(ValueError):
    """One line that names the file, and the tensor or the setting."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file."""

    name: str
    path: Path
    type_id: int
    """A key of BLOCK_TYPES."""
    shape: tuple[int, ...]
    """Slowest dim first: [N, K] of a weight."""
    begin: int
    """Byte of the file."""


@dataclass(frozen=True)
class Header:
    """All that one file, or the files of one model, say of it."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_model(path: Path) -> Header:
    """The header of a model, whichever of its files is given. Raises GgufError, OSError."""
    paths = shards(path)
    headers = [read_header(one) for one in paths]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    expected = headers[0].settings.get("split.tensors.count", len(tensors)) if len(paths) > 1 else len(tensors)
    if len(tensors) != expected:
        raise GgufError(f"{paths[0]} counts {expected} tensors in its {len(paths)} files, which hold {len(tensors)}: "
                        "they do not belong together")  # fmt: skip
    return Header(headers[0].settings, tensors)


def shards(path: Path) -> list[Path]:
    """All files of a model that is cut in several, in order. Raises GgufError if one is missing."""
    found = SHARD.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    paths = [path.with_name(f"{found['name']}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    missing = [one for one in paths if not one.is_file()]
    if missing:
        raise GgufError(f"{missing[0]} is missing ({len(missing)} of the {count} files of the model): {AGAIN}")
    return paths


def read_header(path: Path) -> Header:
    """The header of one file. Raises GgufError for one that is damaged, OSError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise GgufError(f"{path} is not a GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Parser(path, data, size).header()
            except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
                raise GgufError(f"{path} is cut off within its header, or damaged: {AGAIN}") from error


def shortest(value: float) -> float:
    """The number of fewest digits that is this one in float32: 1e-6 was written, not 9.99999997e-7."""
    texts = (f"{value:.{digits}g}" for digits in range(6, 9))
    return next((float(text) for text in texts if struct.pack("f", float(text)) == struct.pack("f", value)), value)


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, len(MAGIC)

    def header(self) -> Header:
        version = self._number("I")
        if version not in VERSIONS:
            what = "is of a machine with the other order of bytes" if version >= 1 << 16 else f"is GGUF {version}"
            raise GgufError(f"{self._path} {what}; version 2 and 3 are read: convert the model anew")
        num_tensors, num_settings = self._number("Q"), self._number("Q")
        settings = dict(self._setting() for _ in range(self._count(num_settings)))
        entries = [self._entry() for _ in range(self._count(num_tensors))]
        alignment = settings.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise GgufError(f"{self._path}: general.alignment {alignment!r} is no number of bytes: {AGAIN}")
        begin = -(-self._at // alignment) * alignment
        tensors = {entry[0]: self._tensor(begin, *entry) for entry in entries}
        if len(tensors) != num_tensors:
            raise GgufError(f"{self._path} holds tensors of the same name: {AGAIN}")
        return Header(settings, tensors)

    def _tensor(self, data: int, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> TensorInfo:
        block = BLOCK_TYPES.get(type_id)
        if block is None:
            raise GgufError(f"{name} in {self._path} is of type {type_id}, which is not known here")
        if shape[-1] % block.size:
            raise GgufError(f"{name} in {self._path} has rows of {shape[-1]} values, which blocks of {block.size} "
                            f"({block.name}) do not divide: {AGAIN}")  # fmt: skip
        begin, end = data + offset, data + offset + prod(shape) // block.size * block.num_bytes
        if end > self._size:
            raise GgufError(f"{name} in {self._path} ends at byte {end}, the file at {self._size}: it is cut off, "
                            "get it again")  # fmt: skip
        return TensorInfo(name, self._path, type_id, shape, begin)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), self._number("I")
        if not 0 < num_dims <= MAX_DIMS:
            raise GgufError(f"{name} in {self._path} has {num_dims} dims: {AGAIN}")
        shape = tuple(self._number("Q") for _ in range(num_dims))[::-1]
        if 0 in shape:
            raise GgufError(f"{name} in {self._path} has shape {list(shape)}: {AGAIN}")
        return name, shape, self._number("I"), self._number("Q")

    def _setting(self) -> tuple[str, Any]:
        name = self._string()
        return name, self._value(name, self._number("I"))

    def _value(self, name: str, kind: int) -> Any:
        if kind in NUMBERS:
            value = self._number(NUMBERS[kind])
            return shortest(value) if NUMBERS[kind] == "f" else value
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise GgufError(f"{self._path}: {name} is of type {kind}, which is not known here: {AGAIN}")
        of, count = self._number("I"), self._count(self._number("Q"))
        if of not in NUMBERS:
            return [self._value(name, of) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{NUMBERS[of]}", self._data, self._at)
        self._at += struct.calcsize(f"<{count}{NUMBERS[of]}")
        return list(values)

    def _string(self) -> str:
        length = self._number("Q")
        begin, self._at = self._at, self._at + length
        if self._at > self._size:
            raise struct.error
        return self._data[begin : self._at].decode("utf-8", errors="replace")

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self._data, self._at)
        self._at += struct.calcsize("<" + kind)
        return value

    def _count(self, count: int) -> int:
        """A number of things that take a byte each, at least."""
        if count > self._size - self._at:
            raise struct.error
        return count
