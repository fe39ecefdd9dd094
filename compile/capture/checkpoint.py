"""Locations on disk of the tensors of a checkpoint directory; only headers are read.

Formats: safetensors (https://huggingface.co/docs/safetensors: 8 bytes of header length, JSON, data) and the zip files
of torch.save.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fuseline.compile.cache.keys import MAX_HEADER
from fuseline.compile.capture.errors import LoadError, one_line
from fuseline.compile.gguf.table import is_unpacked
from fuseline.compile.quantization.published import Published

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
FILES = {
    "safetensors": ("model.safetensors", "*.safetensors"),
    "pt": ("pytorch_model.bin", "*.bin", "*.pt"),
}
"""Usual name of a model's weights, and globs for those with other names."""
OTHERS = re.compile(r"(consolidated|adapter|training_args|optimizer|scheduler|scaler|rng_state)")
"""Begin of the names of files that are none of a model's weights."""
SHARD = re.compile(r"(?P<name>.+)-(?P<index>\d+)-of-(?P<count>\d+)\.\w+")


Fill = Callable[[Path, memoryview, int], None]
"""Reads bytes of a file into memory, from a byte on. Raises LoadError."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    path: Path
    begin: int
    """Byte of the file where its storage begins."""
    meta: Tensor
    """Meta tensor: shape, dtype, and strides and offset within the storage."""
    fill: Fill | None = field(default=None, kw_only=True, compare=False)
    """Reads bytes of the file in the system's place."""


@dataclass(frozen=True)
class PairedRows(StoredTensor):
    """Rows of heads, stored in pairs (0, 1), (2, 3), ... that rotate together. The model has the first of each pair in
    the first half of a head, in the order of the pairs, and the second in the second half.
    """

    head_dim: int


@dataclass(frozen=True)
class CodedTensor(StoredTensor):
    """A quantized weight, which is stored in several tensors; `path` and `begin` are those of the first of them.

    Its meta is that of the plain weight in float32, as if that were stored.
    """

    published: Published
    parts: Mapping[str, StoredTensor]
    """By suffix."""

    @property
    def told(self) -> str:
        """The name, and that of the file's tensor where it is another."""
        only = next(iter(self.parts.values())).name if len(self.parts) == 1 else self.name
        return self.name if only in self.name else f"{only} ({self.name})"


def open_checkpoint(folder: Path, load_format: str, ignored: Sequence[str] = ()) -> dict[str, StoredTensor]:
    """Every stored tensor by its name in the file, but for files that a glob of `ignored` matches.

    load_format: auto, safetensors, pt or gguf. Raises LoadError.
    """
    if is_unpacked(folder):
        return _open_gguf(folder, load_format)
    if load_format == "gguf":
        raise LoadError(f"{folder} is a checkpoint of Transformers: give a file that ends in .gguf")
    kinds = {"safetensors": read_safetensors, "pt": read_torch_file}
    for kind in kinds if load_format == "auto" else [load_format]:
        files = [path for path in _files_of(folder, kind) if not _is_ignored(path.relative_to(folder), ignored)]
        if files:
            return {stored.name: stored for path in files for stored in kinds[kind](path)}
    if load_format == "auto" and find_files(folder, "consolidated.safetensors"):
        from fuseline.compile.capture.mistral_weights import open_mistral  # it makes tensors of the classes above

        return open_mistral(folder)
    names = [name for kind, names in FILES.items() if load_format in ("auto", kind) for name in names[:1]]
    raise LoadError(f"{folder} holds no weights: no {' or '.join(names)}, nor a sharded one with its index")


def _files_of(folder: Path, kind: str) -> list[Path]:
    """The files that hold a model's weights; where they have no usual name, all of the kind. Raises LoadError."""
    if found := next(filter(None, (find_files(folder, name) for name in FILES[kind][:1])), []):
        return found
    rest = sorted(path for glob in FILES[kind][1:] for path in folder.glob(glob) if not OTHERS.match(path.name))
    for path in rest:
        _check_shard(path)
    return rest


def _check_shard(path: Path) -> None:
    """Raises LoadError if another file of the same weights is missing."""
    if match := SHARD.fullmatch(path.name):
        for index in range(1, int(match["count"]) + 1):
            other = path.with_name(f"{match['name']}-{index:0{len(match['index'])}}-of-{match['count']}{path.suffix}")
            if not other.is_file():
                raise LoadError(f"{other} is missing: get the checkpoint again")


def _open_gguf(folder: Path, load_format: str) -> dict[str, StoredTensor]:
    from fuseline.compile.capture.gguf_tensors import open_unpacked  # it makes tensors of the classes above

    if load_format not in ("auto", "gguf"):
        raise LoadError(f"the model's weights are in GGUF files, not in those of {load_format}")
    return open_unpacked(folder)


def _is_ignored(path: Path, patterns: Sequence[str]) -> bool:
    """As Hugging Face matches: * also matches a slash."""
    return any(fnmatch(str(path), pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)


def find_files(folder: Path, name: str) -> list[Path]:
    """The file called `name`, or those that `name`.index.json lists."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return []
    try:
        listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{index} is not an index of weights ({error}): get the file again") from error
    missing = [file for file in listed if not (folder / file).is_file()]
    if missing:
        raise LoadError(
            f"{folder / missing[0]} is missing ({len(missing)} of {len(listed)} files that {index.name} lists): "
            "get the checkpoint again"
        )
    return [folder / file for file in listed]


def read_safetensors(path: Path) -> Iterable[StoredTensor]:
    """Tensors of one file. Raises LoadError if the file is damaged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise LoadError(f"{path} is not a safetensors file, or is cut off within its header: get the file again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return [stored(path, name, entry, 8 + length, size) for name, entry in header.items()]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LoadError(f"{path} has a damaged header ({error}): get the file again") from error


def stored(path: Path, name: str, entry: dict, data: int, size: int) -> StoredTensor:
    """One entry of a safetensors header, checked against the size of the file."""
    (begin, end), shape = entry["data_offsets"], entry["shape"]
    dtype = DTYPES.get(entry["dtype"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise LoadError(f"{name} in {path} has a damaged entry in the header: get the file again")
    if dtype is None:
        raise LoadError(f"{name} in {path} has element type {entry['dtype']}, which is not supported")
    if end - begin != prod(shape) * dtype.itemsize:
        raise LoadError(f"{name} in {path} has {end - begin} bytes, not those of {shape}: get the file again")
    if data + end > size:
        raise LoadError(f"{name} in {path} ends at byte {data + end}, the file at {size}: it is cut off, get it again")
    return StoredTensor(name, path, data + begin, torch.empty(shape, dtype=dtype, device="meta"))


def read_torch_file(path: Path) -> Iterable[StoredTensor]:
    """Tensors of one torch.save file, located without reading them. Raises LoadError."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # pickle and zip errors of many types; all mean the same to the user
        raise LoadError(f"{path} is not a file of tensors: {one_line(error)}") from error
    return [located(path, name, value) for name, value in state.items() if isinstance(value, Tensor)]


def located(path: Path, name: str, fake: Tensor) -> StoredTensor:
    begin = getattr(fake.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise LoadError(f"{path} is in the old format of torch.save: save it again as safetensors")
    storage = torch.empty(fake.untyped_storage().nbytes() // fake.element_size(), dtype=fake.dtype, device="meta")
    return StoredTensor(name, path, begin, storage.as_strided(fake.shape, fake.stride(), fake.storage_offset()))
