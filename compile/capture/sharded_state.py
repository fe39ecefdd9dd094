"""sharded_state: the tensors of a checkpoint in files by rank, model-rank-0-part-0.safetensors, ...

They are the tensors of the checkpoint they were made of, as it stores them. There is one rank, with all of them.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from fuseline.compile.capture.checkpoint import DTYPES, StoredTensor, read_safetensors
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import whole
from fuseline.compile.capture.reader import Reader
from fuseline.compile.load_format import SHARD_PATTERN

RANK = 0
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_FILE_BYTES = 5 * 2**30
NUM_PARTS = "num_parts"
"""In the metadata of each file."""


def open_sharded_state(folder: Path, pattern: str = SHARD_PATTERN) -> dict[str, StoredTensor]:
    """Raises LoadError if a file is missing or damaged."""
    parts = _parts(folder, pattern)
    if not parts:
        raise LoadError(f"{folder} holds no file {_file(pattern, '*')}: write them with fuseline save-sharded-state")
    wanted = max(max(parts) + 1, _num_parts(next(iter(parts.values()))))
    if missing := [part for part in range(wanted) if part not in parts]:
        raise LoadError(f"{folder / _file(pattern, str(missing[0]))} is missing ({len(missing)} of {wanted} files): "
                        "write them again")  # fmt: skip
    return {stored.name: stored for part in range(wanted) for stored in read_safetensors(parts[part])}


def save_sharded_state(
    stored: Mapping[str, StoredTensor], folder: Path, pattern: str = SHARD_PATTERN, max_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Write the tensors, one at a time, in files of `max_bytes` unless a tensor alone is larger. Returns the files.

    Raises LoadError for a tensor that cannot be read, OSError.
    """
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in stored.values():
        num_bytes = tensor.meta.numel() * tensor.meta.element_size()
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += num_bytes
    paths = [folder / _file(pattern, str(part)) for part in range(len(groups))]
    for path, group in zip(paths, groups, strict=True):
        write_safetensors(path, group, {"format": "pt", NUM_PARTS: str(len(groups))})
    for part, path in _parts(folder, pattern).items():
        if part >= len(groups):  # of an earlier state with more parts
            path.unlink()
    return paths


def write_safetensors(path: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> None:
    """One file, complete or not there. Raises LoadError for a tensor that cannot be read, OSError."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        end = at + tensor.meta.numel() * tensor.meta.element_size()
        header[tensor.name] = {
            "dtype": NAMES[tensor.meta.dtype], "shape": list(tensor.meta.shape), "data_offsets": [at, end],
        }  # fmt: skip
        at = end
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file, Reader() as reader:
            file.write(struct.pack("<Q", len(body)) + body)
            for tensor in tensors:
                value = reader.value(whole(tensor)).contiguous()
                file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _file(pattern: str, part: str) -> str:
    return pattern.format(rank=RANK, part=part)


def _parts(folder: Path, pattern: str) -> dict[int, Path]:
    """Files by part."""
    before, after = _file(pattern, "\0").split("\0")
    name = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    found = ((name.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]): path for match, path in found if match}


def _num_parts(path: Path) -> int:
    """As the file's metadata tells, 1 where it does not. Errors are told by those who read the tensors."""
    with open(path, "rb") as file, suppress(ValueError, KeyError, TypeError, AttributeError, struct.error, MemoryError):
        (length,) = struct.unpack("<Q", file.read(8))
        return int(json.loads(file.read(min(length, 1 << 26)))["__metadata__"][NUM_PARTS])
    return 1
