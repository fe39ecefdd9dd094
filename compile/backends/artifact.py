"""Captured graphs on disk, so that a model is exported once.

    first line   fuseline graph <SHA-256 of all that follows>
    then         8 bytes of length (little endian), JSON of that length, safetensors of the constants

A file is named by what the graph depends on; it is checked whole before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save

from fuseline.compile import capture, ops
from fuseline.compile.capture.export import DTYPES, EXAMPLE_TOKENS, MAX_TOKENS, MIN_TOKENS, CapturedModel, capture_model
from fuseline.compile.capture.hf_model import load_config
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_json import GraphFormatError, decode, encode, module_of
from fuseline.compile.specs import RopeSwitchSpec
from fuseline.compile.target import default_cache_dir

MAGIC = b"fuseline graph "
logger = logging.getLogger(__name__)


def load_or_capture(config: CompileConfig) -> CapturedModel:
    """capture_model, or what it gave before. A cache that does not work is reported and done without."""
    key = cache_key(config)
    path = Path(config.cache_dir or default_cache_dir()) / "graphs" / f"{key}.graph"
    try:
        return parse(path.read_bytes(), key, config)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, GraphFormatError) as error:
        logger.warning("cached graph %s is not used, the model is captured anew: %s", path, error)
    captured = capture_model(config)
    try:
        write_whole(path, serialize(captured, key))
    except (OSError, GraphFormatError) as error:
        logger.warning("the captured graph is not cached in %s: %s", path.parent, error)
    return captured


def cache_key(config: CompileConfig) -> str:
    """SHA-256 of all that the captured graph depends on. Raises CaptureError when config.json cannot be read."""
    load_config(config)
    folder = Path(config.model)
    code = sorted(folder.glob("*.py")) if config.trust_remote_code else []
    parts = [
        (folder / "config.json").read_bytes(),
        repr((config.hf_overrides, config.dtype, config.trust_remote_code)).encode(),
        repr((torch.__version__, transformers.__version__, own_version())).encode(),
        *(path.read_bytes() for path in [*code, *sources()]),
    ]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def own_version() -> str:
    try:
        return version("fuseline")
    except PackageNotFoundError:  # run from a source tree
        return ""


def sources() -> list[Path]:
    """Python files whose change may change a captured graph."""
    folders = [Path(package.__file__).parent for package in (capture, ops)]
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def serialize(captured: CapturedModel, key: str) -> bytes:
    """The file's bytes. Raises GraphFormatError."""
    values = {
        "key": key,
        "dtype": name_of(captured.dtype),
        "parameters": {name: [list(shape), name_of(dtype)] for name, (shape, dtype) in captured.parameters.items()},
        "tied": captured.tied,
        "rope_switch": captured.rope_switch and asdict(captured.rope_switch),
        "graph": encode(captured.graph.graph),
    }
    text = json.dumps(values).encode()
    constants = save({name: value.detach().clone().contiguous() for name, value in captured.constants.items()})
    body = struct.pack("<Q", len(text)) + text + constants
    return MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def parse(data: bytes, key: str, config: CompileConfig) -> CapturedModel:
    """The inverse of serialize. Raises GraphFormatError if it is not what serialize made for this key."""
    head, _, body = data.partition(b"\n")
    if head != MAGIC + hashlib.sha256(body).hexdigest().encode():
        raise GraphFormatError("the file is damaged")
    try:
        (length,) = struct.unpack_from("<Q", body)
        values, constants = json.loads(body[8 : 8 + length]), load(body[8 + length :])
        if values["key"] != key:
            raise GraphFormatError("the file is that of another model")
        return rebuild(values, constants, config)
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise GraphFormatError(f"not a captured graph ({type(error).__name__})") from error


def rebuild(values: dict[str, Any], constants: dict[str, torch.Tensor], config: CompileConfig) -> CapturedModel:
    hf_config, dtype = load_config(config), DTYPES[values["dtype"]]
    hf_config.dtype = dtype  # as building the model leaves it
    return CapturedModel(
        graph=module_of(decode(values["graph"], MIN_TOKENS, MAX_TOKENS, EXAMPLE_TOKENS)),
        config=hf_config,
        dtype=dtype,
        parameters={
            name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in values["parameters"].items()
        },
        constants=constants,
        tied=values["tied"],
        rope_switch=RopeSwitchSpec(**values["rope_switch"]) if values["rope_switch"] else None,
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_whole(path: Path, data: bytes) -> None:
    """The file appears complete or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
