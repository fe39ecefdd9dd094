"""Formats of weights by the names of --load-format: the packages they need, and their keys of
--model-loader-extra-config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType

SHARD_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
"""Names of the files of sharded_state."""


@dataclass(frozen=True)
class LoadFormat:
    keys: Mapping[str, type] = field(default_factory=dict)
    package: str = ""
    """Module that reads the files, of the extra of the same name as the format."""


THREADS = {"enable_multithread_load": bool, "num_threads": int}
"""Accepted without effect: weights are read by as many threads as there are cores, four at most."""
LOAD_FORMATS: Mapping[str, LoadFormat] = MappingProxyType({
    "auto": LoadFormat(THREADS),
    "safetensors": LoadFormat(THREADS),
    "pt": LoadFormat(THREADS),
    "npcache": LoadFormat(THREADS),
    "dummy": LoadFormat(),
    "mistral": LoadFormat(THREADS),
    "bitsandbytes": LoadFormat(THREADS),
    "gguf": LoadFormat(THREADS),
    "sharded_state": LoadFormat({"pattern": str}),
    "tensorizer": LoadFormat({"tensorizer_uri": str, "tensorizer_dir": str, "verify_hash": bool}, "tensorizer"),
    "runai_streamer": LoadFormat({"concurrency": int, "memory_limit": int}, "runai_model_streamer"),
})  # fmt: skip


def missing_package(name: str) -> str:
    """What to install for a format; empty if nothing is missing."""
    package = LOAD_FORMATS[name].package if name in LOAD_FORMATS else ""
    if not package or find_spec(package) is not None:
        return ""
    return f"{package} is not installed: pip install 'fuseline[{name}]'"


def wrong_extra(name: str, extra: Mapping[str, object]) -> str:
    """What is wrong with --model-loader-extra-config for a format; empty if nothing is."""
    keys = LOAD_FORMATS[name].keys if name in LOAD_FORMATS else {}
    for key, value in extra.items():
        if key not in keys:
            known = f" (keys: {', '.join(keys)})" if keys else ""
            return f"there is no key {key!r} for --load-format {name}{known}"
        if type(value) is not keys[key]:
            return f"{key} must be of type {keys[key].__name__}"
        if keys[key] is int and value < 1:
            return f"{key} must be at least 1"
    pattern = str(extra.get("pattern", SHARD_PATTERN))
    if "{rank}" not in pattern or "{part}" not in pattern or "/" in pattern or pattern.count("{") != 2:
        return f"pattern {pattern!r} must be a file's name with {{rank}} and {{part}} in it, like {SHARD_PATTERN}"
    return ""
