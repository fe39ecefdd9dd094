"""The stored tensors of a checkpoint, whatever the format of its weights (SPEC 22.2)."""

from __future__ import annotations

from pathlib import Path

from fuseline.compile.capture.checkpoint import StoredTensor, open_checkpoint
from fuseline.compile.capture.errors import LoadError
from fuseline.compile.config import CompileConfig
from fuseline.compile.load_format import SHARD_PATTERN, missing_package


def open_weights(config: CompileConfig) -> dict[str, StoredTensor]:
    """Every stored tensor by its name in Transformers' checkpoints; only headers are read. Raises LoadError."""
    folder, extra = Path(config.model), dict(config.model_loader_extra_config)
    if reason := missing_package(config.load_format):
        raise LoadError(reason)
    # Most starts need none of these.
    match config.load_format:
        case "npcache":
            from fuseline.compile.capture.np_cache import open_np_cache

            return open_np_cache(folder, open_checkpoint(folder, "pt", config.ignore_patterns))
        case "mistral":
            from fuseline.compile.capture.mistral_weights import open_mistral

            return open_mistral(folder)
        case "sharded_state":
            from fuseline.compile.capture.sharded_state import open_sharded_state

            return open_sharded_state(folder, str(extra.get("pattern", SHARD_PATTERN)))
        case "tensorizer":
            from fuseline.compile.capture.tensorizer_file import open_tensorizer

            return open_tensorizer(folder, extra)
        case "runai_streamer":
            from fuseline.compile.capture.runai import streamed

            return streamed(open_checkpoint(folder, "safetensors", config.ignore_patterns), extra)
        case "bitsandbytes":
            return open_checkpoint(folder, "auto", config.ignore_patterns)
    return open_checkpoint(folder, config.load_format, config.ignore_patterns)


def try_weights(config: CompileConfig) -> None:
    """What `open_weights` would refuse, without writing or streaming anything. Raises LoadError."""
    folder = Path(config.model)
    kind = {"npcache": "pt", "runai_streamer": "safetensors"}.get(config.load_format)
    if kind is None:
        open_weights(config)
    elif reason := missing_package(config.load_format):
        raise LoadError(reason)
    else:
        open_checkpoint(folder, kind, config.ignore_patterns)
