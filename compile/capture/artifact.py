"""Captured models, and models after all passes, on disk: a model is exported once, and lowered once a setting.

The body of such a file (cache/store.py): 8 bytes of length (little endian), JSON of that length, safetensors of
the constants. Nothing here needs Transformers; what captures is imported when there is something to capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import fx

from fuseline.compile.cache.keys import cache_key, optimized_key, sources_key
from fuseline.compile.cache.store import cache_path, pack, read_cached, unpack, write_cached
from fuseline.compile.capture.captured import DTYPES, EXAMPLE_TOKENS, MAX_TOKENS, MIN_TOKENS, CapturedModel, ModelFacts
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.unneeded import without_unneeded
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_json import GraphFormatError, decode, decode_fixed, encode, module_of
from fuseline.compile.graph.runner import PassReport, PipelineResult
from fuseline.compile.specs import (
    FP8_DTYPES,
    CacheGroup,
    CacheSpec,
    FeedSpec,
    QuantizedSpec,
    RopeSwitchSpec,
    StateSpec,
    TapSpec,
)
from fuseline.compile.target import CPU, Target

SPECS = {spec.__name__: spec for spec in (CacheSpec, CacheGroup, FeedSpec, QuantizedSpec, StateSpec, TapSpec)}
Value = TypeVar("Value")
Check = Callable[[CapturedModel], str]
"""Gives the verdict on a captured model; raises CaptureError for one that must not be served."""


def capture_model(config: CompileConfig) -> CapturedModel:
    with without_unneeded():
        from fuseline.compile.capture.export import capture_model

        return capture_model(config)


def load_or_capture(config: CompileConfig, check: Check | None = None) -> CapturedModel:
    """capture_model, or what it gave before. A cache that does not work is reported and done without.

    `check` is asked once for the verdict, which is kept with the graph for as long as the compiler's sources stay.
    Raises CaptureError, also what `check` raises.
    """
    key = cache_key(config)
    path = key and cache_path(config, "graphs", key)
    found = path and read_cached(path, lambda body: parse_captured(body, key), "the model is captured anew")
    captured = found or capture_model(config)
    refuse_rounded_bias(captured, config)
    if found and (check is None or found.checked_by == sources_key()):
        return found
    if check is not None:
        captured.verdict, captured.checked_by = check(captured), sources_key()
    if path:
        write_cached(path, lambda: pack(captured_values(captured, key), captured.constants))
    return captured


def refuse_rounded_bias(captured: CapturedModel, config: CompileConfig) -> None:
    """Raises CaptureError. The graph is the same for every type of cache, and found in the cache for any."""
    if captured.has_key_bias and config.kv_cache_dtype in ("int8", *FP8_DTYPES):
        raise CaptureError(
            f"{captured.facts.model_type} keeps a bias beside each key, which a cache of {config.kv_cache_dtype} would "
            "round: give --kv-cache-dtype auto"
        )


def load_optimized(config: CompileConfig, target: Target = CPU) -> tuple[CapturedModel, PipelineResult] | None:
    """Load the optimized model from the cache, if present. Meta values are those of EXAMPLE_TOKENS tokens."""
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


def captured_values(captured: CapturedModel, key: str) -> dict[str, Any]:
    """All but the constants, as JSON. Raises GraphFormatError."""
    return {
        "key": key,
        "facts": asdict(captured.facts),
        "dtype": name_of(captured.dtype),
        "parameters": {name: [list(shape), name_of(dtype)] for name, (shape, dtype) in captured.parameters.items()},
        "tied": captured.tied,
        "num_distinct_layers": captured.num_distinct_layers,
        "has_key_bias": captured.has_key_bias,
        "verdict": captured.verdict,
        "checked_by": captured.checked_by,
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
    except GraphFormatError:
        raise
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
        num_distinct_layers=values["num_distinct_layers"],
        has_key_bias=values["has_key_bias"],
        verdict=values["verdict"],
        checked_by=values["checked_by"],
        rope_switch=RopeSwitchSpec(**values["rope_switch"]) if values["rope_switch"] else None,
    )


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
