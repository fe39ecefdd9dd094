"""Reading and writing cache files: failures are reported, and the caller continues without the cache."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fuseline.compile.cache.files import CacheError, read_file, write_file
from fuseline.compile.config import CompileConfig
from fuseline.compile.target import default_cache_dir

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


def read_cached(path: Path, parse: Callable[[bytes], Value], instead: str) -> Value | None:
    """Returns `parse` of the body; None if there is no file, or, with a report, if it cannot be used."""
    try:
        return parse(read_file(path))
    except FileNotFoundError:
        return None
    except (OSError, CacheError) as error:
        logger.warning("cached %s is not used, %s: %s", path, instead, error)
        return None


def write_cached(path: Path, body: Callable[[], bytes], earlier: Path | None = None) -> None:
    """Writes a file. A failure is reported once: not if an `earlier` file is missing too."""
    try:
        write_file(path, body())
    except (OSError, CacheError) as error:
        level = logging.WARNING if earlier is None or earlier.exists() else logging.DEBUG
        logger.log(level, "%s is not cached in %s: %s", path.name, path.parent, error)


def cache_path(config: CompileConfig, kind: str, key: str) -> Path:
    return Path(config.cache_dir or default_cache_dir()) / kind / key


def pack(values: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> bytes:
    """Serializes to the body of a file."""
    text = json.dumps(values).encode()
    tensors = save({name: value.detach().clone().contiguous() for name, value in constants.items()})
    return struct.pack("<Q", len(text)) + text + tensors


def unpack(body: bytes, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The inverse of pack. Raises CacheError if the body was not packed for this key."""
    try:
        (length,) = struct.unpack_from("<Q", body)
        values, constants = json.loads(body[8 : 8 + length]), load(body[8 + length :])
        is_same = values["key"] == key
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"not a captured graph ({type(error).__name__})") from error
    if not is_same:
        raise CacheError("the file is that of another model")
    return values, constants
