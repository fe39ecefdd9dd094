"""Files of CoreWeave's tensorizer. The package reads their header; tensors lie in them as they are."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.errors import LoadError, one_line

FILE = "model.tensors"
TYPES = {
    "f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "i8": torch.int64, "i4": torch.int32,
    "i2": torch.int16, "i1": torch.int8, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip
"""Types of numpy, without the order of bytes."""


def open_tensorizer(folder: Path, extra: Mapping[str, object]) -> dict[str, StoredTensor]:
    """`extra`: --model-loader-extra-config. Raises LoadError."""
    from tensorizer import TensorDeserializer

    path = tensorizer_path(folder, extra)
    if not path.is_file():
        raise LoadError(f"there is no file {path}: name it with tensorizer_uri in --model-loader-extra-config")
    try:
        with TensorDeserializer(str(path), device="cpu", lazy_load=True) as file:
            entries = {str(name): entry for name, entry in file._metadata.items()}
        if extra.get("verify_hash"):
            with TensorDeserializer(str(path), device="cpu", lazy_load=True, verify_hash=True) as file:
                for name in file.keys():
                    file[name]
    except Exception as error:  # the package raises many kinds
        raise LoadError(f"{path} cannot be read by tensorizer: {one_line(error)}") from error
    size = path.stat().st_size
    return {name: _stored(path, name, entry, size) for name, entry in entries.items()}


def tensorizer_path(folder: Path, extra: Mapping[str, object]) -> Path:
    """Raises LoadError for a place that is no file."""
    given = str(extra.get("tensorizer_uri") or "")
    if not given:
        return Path(str(extra.get("tensorizer_dir") or folder)) / FILE
    parsed = urlparse(given)
    if parsed.scheme not in ("", "file"):
        raise LoadError(f"{given} is no local file: copy it here, tensorizer streams of {parsed.scheme} are not read")
    return Path(unquote(parsed.path)) if parsed.scheme else Path(given)


def _stored(path: Path, name: str, entry: object, size: int) -> StoredTensor:
    """An entry of the package's header, checked against the size of the file."""
    text, _, own = entry.dtype.partition("\0")
    dtype = getattr(torch, own.removeprefix("torch."), None) if own else TYPES.get(text.lstrip("<>|="))
    if not isinstance(dtype, torch.dtype) or text.startswith(">"):
        raise LoadError(f"{name} in {path} has element type {entry.dtype}, which is not supported")
    num_bytes, end = prod(entry.shape) * dtype.itemsize, entry.data_offset + entry.data_length
    if entry.data_length != num_bytes:
        raise LoadError(f"{name} in {path} has {entry.data_length} bytes, not those of {list(entry.shape)}")
    if end > size:
        raise LoadError(f"{name} in {path} ends at byte {end}, the file at {size}: it is cut off, get it again")
    return StoredTensor(name, path, entry.data_offset, torch.empty(entry.shape, dtype=dtype, device="meta"))
