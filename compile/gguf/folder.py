"""A GGUF file as a checkpoint directory: what every other part of the program reads.

    config.json, generation_config.json, tokenizer_config.json   made from the file's settings
    gguf.json                                                    the files, and where each tensor lies in them

The directory is in the cache. It is made once for each state of the files, named by their paths, sizes and times.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuseline.compile.gguf.config import architecture_of, generation_config, is_quantized, model_config
from fuseline.compile.gguf.header import GgufError, Header, read_model, shards
from fuseline.compile.gguf.names import ARCHITECTURES
from fuseline.compile.gguf.table import TABLE

SOURCES = Path(__file__).parent
TEMPLATE = "tokenizer.chat_template"


def find_gguf(path: Path) -> Path | None:
    """The first file of the model that a path names: a file, or a directory with the files of one model.

    None for any other. Raises GgufError.
    """
    if path.is_dir():
        firsts = {shards(found)[0] for found in path.glob("*.gguf")}
        if len(firsts) > 1:
            raise GgufError(f"{path} holds {len(firsts)} models in GGUF files: give the path of one of them")
        return firsts.pop() if firsts else None
    return shards(path)[0] if path.suffix == ".gguf" and path.is_file() else None


def unpacked(path: Path, cache_dir: Path) -> Path:
    """The directory of a model of GGUF files. Raises GgufError."""
    try:
        folder = cache_dir / "gguf" / _key(path)
        if not (folder / TABLE).is_file():
            _write(folder, read_model(path))
        with suppress(OSError):  # a read-only cache keeps no times of use
            os.utime(folder)
    except GgufError as error:
        raise GgufError(str(error) if str(path.parent) in str(error) else f"{path}: {error}") from error
    except OSError as error:
        raise GgufError(f"{path} cannot be read, or {error.filename} written: {error.strerror}") from error
    return folder


def _key(path: Path) -> str:
    files = [file.resolve() for file in shards(path)]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    sources = [file.read_bytes() for file in sorted(SOURCES.glob("*.py"))]
    return hashlib.sha256(repr(states).encode() + b"".join(sources)).hexdigest()


def _write(folder: Path, header: Header) -> None:
    """Writes elsewhere, then renames: a directory of the final name is complete. Raises GgufError, OSError."""
    config = model_config(header)
    files = list(dict.fromkeys(tensor.path.resolve() for tensor in header.tensors.values()))
    rows = [
        [tensor.name, files.index(tensor.path.resolve()), tensor.type_id, tensor.shape, tensor.begin]
        for tensor in header.tensors.values()
    ]
    if is_quantized(header):
        digest = hashlib.sha256(repr([(row[0], row[2], row[3]) for row in rows]).encode()).hexdigest()
        config["quantization_config"] = {"quant_method": "gguf", "tensors": digest}
    architecture = next(name for name, known in ARCHITECTURES.items() if known is architecture_of(header))
    heads = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    table = {"architecture": architecture, "heads": heads, "files": list(map(str, files)), "tensors": rows}
    contents = {
        "config.json": config, "generation_config.json": generation_config(header),
        "tokenizer_config.json": _tokenizer_config(header.settings), TABLE: table,
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, content in contents.items():
            (made / name).write_text(json.dumps(content))
        with suppress(OSError):  # another process was faster
            os.rename(made, folder)
        if not (folder / TABLE).is_file():
            raise OSError(None, "the directory could not be made", str(folder))
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, or several by name; the tokenizer itself is read from the GGUF file."""
    named = {key.removeprefix(TEMPLATE + "."): text for key, text in settings.items() if key.startswith(TEMPLATE + ".")}
    default = settings.get(TEMPLATE)
    if named and default:
        named = {"default": default, **named}
        return {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}
    return {"chat_template": default} if default else {}
