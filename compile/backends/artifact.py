"""Captured models, and models after all passes, on disk: a model is exported once, and lowered once a setting.

The body of such a file (compile/cache.py): 8 bytes of length (little endian), JSON of that length, safetensors of
the constants. Nothing here needs Transformers; what captures is imported when there is something to capture.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import fx

import fuseline.compile
from fuseline import _C
from fuseline.compile import capture, ops
from fuseline.compile.cache import CacheError, read_file, write_file, write_whole
from fuseline.compile.capture.captured import (
    DTYPES,
    EXAMPLE_TOKENS,
    MAX_TOKENS,
    MIN_TOKENS,
    CapturedModel,
    ModelFacts,
)
from fuseline.compile.capture.unneeded import without_unneeded
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_json import GraphFormatError, decode, decode_fixed, encode, module_of
from fuseline.compile.graph.runner import PassReport, PipelineResult
from fuseline.compile.specs import CacheGroup, CacheSpec, RopeSwitchSpec
from fuseline.compile.target import CPU, Target, default_cache_dir

__all__ = ["cache_key", "load_optimized", "load_or_capture", "save_optimized", "write_whole"]

SPECS = {"CacheSpec": CacheSpec, "CacheGroup": CacheGroup}
WITHOUT_EFFECT = {
    "model": "", "cache_dir": "", "load_format": "auto", "seed": 0, "cpu_threads": 0, "wait_compiled": False,
    "cpu_offload_gb": 0.0, "calculate_kv_scales": False,
}  # fmt: skip
"""Settings that change nothing of a graph."""
Value = TypeVar("Value")
Check = Callable[[CapturedModel], str]
"""Gives the verdict on a captured model; raises CaptureError for one that must not be served."""
logger = logging.getLogger(__name__)


def capture_model(config: CompileConfig) -> CapturedModel:
    with without_unneeded():
        from fuseline.compile.capture.export import capture_model

        return capture_model(config)


def load_or_capture(config: CompileConfig, check: Check | None = None) -> CapturedModel:
    """capture_model, or what it gave before. A cache that does not work is reported and done without.

    `check` is asked once for the verdict, which is kept with the graph. Raises CaptureError, also what it raises.
    """
    key = cache_key(config)
    path = key and cache_path(config, "graphs", key)
    found = path and read_cached(path, lambda body: parse_captured(body, key), "the model is captured anew")
    if found and (found.verdict or check is None):
        return found
    captured = capture_model(config)
    if check is not None:
        captured.verdict = check(captured)
    if path:
        write_cached(path, lambda: pack(captured_values(captured, key), captured.constants))
    return captured


def load_optimized(config: CompileConfig, target: Target = CPU) -> tuple[CapturedModel, PipelineResult] | None:
    """What passes made of this model before, if it is in the cache. Meta values are those of EXAMPLE_TOKENS tokens."""
    key = optimized_key(config, target)
    if key is None:
        return None
    return read_cached(
        cache_path(config, "models", key), lambda body: parse_optimized(body, key), "its passes run again"
    )


def save_optimized(config: CompileConfig, target: Target, captured: CapturedModel, result: PipelineResult) -> None:
    """For load_optimized of the next start."""
    key = optimized_key(config, target)
    if key is None:
        return
    graph = cache_path(config, "graphs", cache_key(config) or "")
    write_cached(cache_path(config, "models", key), lambda: optimized_body(captured, result, key), earlier=graph)


def optimized_body(captured: CapturedModel, result: PipelineResult, key: str) -> bytes:
    """The body of the file. Raises GraphFormatError."""
    values = captured_values(captured, key) | {
        "specs": [[type(spec).__name__, asdict(spec)] for spec in result.specs],
        "reports": [asdict(report) for report in result.reports],
        "stage_ops": result.stage_ops,
        "made": sorted(result.constants),
    }
    constants = {f"captured {name}": value for name, value in captured.constants.items()}
    return pack(values, constants | {f"made {name}": value for name, value in result.constants.items()})


def read_cached(path: Path, parse: Callable[[bytes], Value], instead: str) -> Value | None:
    """What `parse` makes of the body; None when there is none. What cannot be used is reported."""
    try:
        return parse(read_file(path))
    except FileNotFoundError:
        return None
    except (OSError, CacheError, GraphFormatError) as error:
        logger.warning("cached %s is not used, %s: %s", path, instead, error)
        return None


def write_cached(path: Path, body: Callable[[], bytes], earlier: Path | None = None) -> None:
    """A cache that cannot be written is reported and done without; once: not when an `earlier` file is missing too."""
    try:
        write_file(path, body())
    except (OSError, GraphFormatError) as error:
        level = logging.WARNING if earlier is None or earlier.exists() else logging.DEBUG
        logger.log(level, "%s is not cached in %s: %s", path.name, path.parent, error)


def cache_path(config: CompileConfig, kind: str, key: str) -> Path:
    return Path(config.cache_dir or default_cache_dir()) / kind / key


def cache_key(config: CompileConfig) -> str | None:
    """SHA-256 of all that the captured graph depends on; None when config.json cannot be read."""
    folders = [Path(package.__file__).parent for package in (capture, ops)]
    settings = (config.hf_overrides, config.dtype, config.trust_remote_code)
    return _key(config, settings, [path for folder in folders for path in folder.glob("*.py")])


def optimized_key(config: CompileConfig, target: Target = CPU) -> str | None:
    """The same for the graph after all passes: any source of the compiler may change it."""
    known = replace(config, **WITHOUT_EFFECT, level=min(config.level, 1))  # all above run the passes of level 1
    settings = (_C.cpu_isa(), target.kind, sorted(asdict(known).items()))
    return _key(config, settings, list(Path(fuseline.compile.__file__).parent.rglob("*.py")))


def _key(config: CompileConfig, settings: object, sources: list[Path]) -> str | None:
    folder = Path(config.model)
    code = sorted(folder.glob("*.py")) if config.trust_remote_code else []
    try:
        own = (folder / "config.json").read_bytes()
    except OSError:
        return None
    versions = [version_of(name) for name in ("torch", "transformers", "fuseline")]
    parts = [own, repr(settings).encode(), repr(versions).encode()]
    parts += [path.read_bytes() for path in [*code, *sorted(sources)]]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # fuseline run from a source tree
        return ""


def pack(values: Mapping[str, Any], constants: Mapping[str, torch.Tensor]) -> bytes:
    """The body of a file."""
    text = json.dumps(values).encode()
    tensors = save({name: value.detach().clone().contiguous() for name, value in constants.items()})
    return struct.pack("<Q", len(text)) + text + tensors


def unpack(body: bytes, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The inverse of pack. Raises GraphFormatError if it is not what was packed for this key."""
    try:
        (length,) = struct.unpack_from("<Q", body)
        values, constants = json.loads(body[8 : 8 + length]), load(body[8 + length :])
        if values["key"] != key:
            raise GraphFormatError("the file is that of another model")
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise GraphFormatError(f"not a captured graph ({type(error).__name__})") from error
    return values, constants


def captured_values(captured: CapturedModel, key: str) -> dict[str, Any]:
    """All but the constants, as JSON. Raises GraphFormatError."""
    return {
        "key": key,
        "facts": asdict(captured.facts),
        "dtype": name_of(captured.dtype),
        "parameters": {name: [list(shape), name_of(dtype)] for name, (shape, dtype) in captured.parameters.items()},
        "tied": captured.tied,
        "verdict": captured.verdict,
        "rope_switch": captured.rope_switch and asdict(captured.rope_switch),
        "graph": encode(captured.graph.graph),
    }


def parse_captured(body: bytes, key: str) -> CapturedModel:
    """Raises GraphFormatError."""
    values, constants = unpack(body, key)
    return _rebuilt(lambda: rebuild(values, decode(values["graph"], MIN_TOKENS, MAX_TOKENS, EXAMPLE_TOKENS), constants))


def parse_optimized(body: bytes, key: str) -> tuple[CapturedModel, PipelineResult]:
    """Raises GraphFormatError."""
    values, constants = unpack(body, key)
    of = {
        kind: {name.removeprefix(kind): value for name, value in constants.items() if name.startswith(kind)}
        for kind in ("captured ", "made ")
    }
    return _rebuilt(
        lambda: (
            rebuild(values, decode_fixed(values["graph"], EXAMPLE_TOKENS), of["captured "]),
            _result(values, of["made "]),
        )
    )


def _result(values: Mapping[str, Any], constants: dict[str, torch.Tensor]) -> PipelineResult:
    if sorted(constants) != values["made"]:
        raise GraphFormatError("constants are missing")
    return PipelineResult(
        reports=[PassReport(**report) for report in values["reports"]],
        stage_ops={stage: Counter(counts) for stage, counts in values["stage_ops"].items()},
        specs=[SPECS[name](**{k: _frozen(v) for k, v in fields.items()}) for name, fields in values["specs"]],
        constants=constants,
    )


def _rebuilt(build: Callable[[], Value]) -> Value:
    try:
        return build()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GraphFormatError(f"not a captured graph ({type(error).__name__})") from error


def rebuild(values: Mapping[str, Any], graph: fx.Graph, constants: dict[str, torch.Tensor]) -> CapturedModel:
    return CapturedModel(
        graph=module_of(graph),
        facts=ModelFacts(**{name: _frozen(value) for name, value in values["facts"].items()}),
        dtype=DTYPES[values["dtype"]],
        parameters={
            name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in values["parameters"].items()
        },
        constants=constants,
        tied=values["tied"],
        verdict=values["verdict"],
        rope_switch=RopeSwitchSpec(**values["rope_switch"]) if values["rope_switch"] else None,
    )


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
