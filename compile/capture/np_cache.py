"""npcache: tensors of torch.save files, kept as files of numpy beside them for the next starts.

    np/weight_names.json    names of all tensors, as the reference server writes them
    np/source.json          sizes and times of the files they were made of
    np/<name>               one tensor in numpy's format (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)

bfloat16 and float8, which numpy has not, are stored as bytes of that width; source.json has their types.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from fuseline.compile.capture.checkpoint import StoredTensor
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.capture.lazy_tensor import whole
from fuseline.compile.capture.reader import Reader

LOG = logging.getLogger(__name__)
FOLDER, NAMES, SOURCE = "np", "weight_names.json", "source.json"
PLAIN = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
         torch.bool}  # fmt: skip
"""Types that numpy has too."""
AS_BYTES = {1: np.dtype("V1"), 2: np.dtype("V2")}


def open_np_cache(folder: Path, source: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of `source`, which are those of torch.save files, from a cache that is made if need be.

    Where it cannot be written the files themselves are read. Raises LoadError for a damaged cache.
    """
    files = sorted({tensor.path for tensor in source.values()})
    state = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    cache = folder / FOLDER
    if _read_state(cache).get("files") != state:
        try:
            _write(cache, source, state)
        except OSError as error:
            LOG.warning("%s cannot be written, so the files are read as they are: %s", cache, error)
            return dict(source)
    types = _read_state(cache).get("types", {})
    return {name: _stored(cache, name, tensor, types.get(name)) for name, tensor in source.items()}


def _read_state(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads((cache / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stored(cache: Path, name: str, source: StoredTensor, kind: str | None) -> StoredTensor:
    path = cache / _file_name(name)
    try:
        with open(path, "rb") as file:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
            begin, size = file.tell(), os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise LoadError(f"{name} in {path} cannot be read ({error}): remove {cache} to have it made anew") from error
    meta = source.meta
    fits = dtype == AS_BYTES.get(meta.element_size()) if kind else dtype == _numpy_type(meta.dtype)
    if tuple(shape) != tuple(meta.shape) or not fits or size - begin != meta.numel() * meta.element_size():
        raise LoadError(f"{name} in {path} is not the tensor of {source.path}: remove {cache} to have it made anew")
    return StoredTensor(name, path, begin, torch.empty(meta.shape, dtype=meta.dtype, device="meta"))


def _write(cache: Path, source: Mapping[str, StoredTensor], state: Mapping[str, Sequence[int]]) -> None:
    """The whole folder at once: another start sees none or all of it. Raises OSError, LoadError."""
    made = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=cache.parent))
    try:
        with Reader() as reader:
            for name, tensor in source.items():
                _write_tensor(made / _file_name(name), reader.value(whole(tensor)))
        types = {name: str(t.meta.dtype) for name, t in source.items() if t.meta.dtype not in PLAIN}
        (made / NAMES).write_text(json.dumps(list(source)), encoding="utf-8")
        (made / SOURCE).write_text(json.dumps({"files": state, "types": types}), encoding="utf-8")
        os.chmod(made, 0o755)
        shutil.rmtree(cache, ignore_errors=True)
        os.rename(made, cache)
    finally:
        with suppress(OSError):
            shutil.rmtree(made)


def _write_tensor(path: Path, value: torch.Tensor) -> None:
    if value.dtype in PLAIN:
        array = value.numpy()
    else:
        array = value.reshape(-1).view(torch.uint8).numpy().view(AS_BYTES[value.element_size()]).reshape(value.shape)
    with open(path, "wb") as file:
        npy.write_array(file, array, version=(1, 0), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _numpy_type(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype if dtype in PLAIN else np.dtype("V0")


def _file_name(name: str) -> str:
    """A name that leaves the folder is none of a tensor's."""
    if "/" in name or name in (NAMES, SOURCE, "", ".", ".."):
        raise LoadError(f"{name!r} cannot be the name of a file: load it without --load-format npcache")
    return name
