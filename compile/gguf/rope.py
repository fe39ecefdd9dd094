"""Rotary embeddings of GGUF files as the rope_parameters of Transformers."""

from __future__ import annotations

import array
from typing import Any

from fuseline.compile.gguf.block_types import BLOCK_TYPES
from fuseline.compile.gguf.header import GgufError, Header
from fuseline.compile.gguf.settings import Settings

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every published model; a file has the factors that follow."""
NEAR = 1e-4
"""Relative difference of factors that were computed in float32."""


def rope_parameters(header: Header, head_dim: int) -> dict[str, Any]:
    """Raises GgufError for a kind that is not known here."""
    key = Settings(header.settings)
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": float(key.number("rope.freq_base", 10000.0))}
    rotary = key.number("rope.dimension_count", head_dim)
    if rotary != head_dim:
        values["partial_rotary_factor"] = rotary / head_dim
    kind, factor = key.text("rope.scaling.type"), key.number("rope.scaling.factor", 0.0)
    if "rope_factors_long.weight" in header.tensors:
        return values | _long_rope(header, key)
    if "rope_freqs.weight" in header.tensors:
        factors = _floats(header, "rope_freqs.weight")
        context = key.number("context_length")
        return values | factors_of_wavelengths(factors, rotary, values["rope_theta"], context)
    if kind in ("", "none") and not key.number("rope.scale_linear", 0.0):
        return values
    if kind in ("", "linear"):
        return values | {"rope_type": "linear", "factor": factor or key.number("rope.scale_linear")}
    if kind == "yarn":
        return values | _yarn(key, factor)
    raise GgufError(f"its rope.scaling.type {kind!r} is not supported")


def _yarn(key: Settings, factor: float) -> dict[str, Any]:
    names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    given = {name: key.number(f"rope.scaling.{own}", 0.0) for own, name in names.items()}
    original = key.number("rope.scaling.original_context_length")
    values = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return values | {name: value for name, value in given.items() if value}


def _long_rope(header: Header, key: Settings) -> dict[str, Any]:
    original = key.number("rope.scaling.original_context_length", key.number("context_length"))
    attention = key.number("rope.scaling.attn_factor", 0.0)
    values = {
        "rope_type": "longrope", "original_max_position_embeddings": original,
        "long_factor": _floats(header, "rope_factors_long.weight"),
        "short_factor": _floats(header, "rope_factors_short.weight"),
    }  # fmt: skip
    return values | ({"attention_factor": attention} if attention else {})


def factors_of_wavelengths(factors: list[float], rotary: int, theta: float, context: int) -> dict[str, Any]:
    """Factors of wavelengths: those of Llama 3, or any others, as a longrope that never changes."""
    llama3 = LLAMA3 | {"rope_type": "llama3", "factor": float(round(max(factors)))}
    wanted = _llama3_factors(rotary, theta, llama3)
    if len(wanted) == len(factors) and all(abs(a / b - 1) < NEAR for a, b in zip(factors, wanted, strict=True)):
        return llama3
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def _llama3_factors(rotary: int, theta: float, values: dict[str, Any]) -> list[float]:
    """As the converter of llama.cpp computes them."""
    low, high, factor = values["low_freq_factor"], values["high_freq_factor"], values["factor"]
    found = []
    for index in range(0, rotary, 2):
        waves = values["original_max_position_embeddings"] / (2 * 3.141592653589793 * theta ** (index / rotary))
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _floats(header: Header, name: str) -> list[float]:
    """Values of a tensor of float32. Raises GgufError."""
    info = header.tensors.get(name)
    if info is None or BLOCK_TYPES[info.type_id].name != "F32":
        raise GgufError(f"it has no tensor {name} of type F32: get the file again")
    with open(info.path, "rb") as file:
        file.seek(info.begin)
        return array.array("f", file.read(4 * info.shape[-1])).tolist()
