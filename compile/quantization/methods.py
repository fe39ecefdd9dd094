"""All methods of quantization by name, and which one a checkpoint and the flag ask for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuseline.compile.config import CompileConfig
from fuseline.compile.overrides import merged
from fuseline.compile.quantization import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from fuseline.compile.quantization.published import Method, QuantizationError, Reader

READERS: dict[str, Reader] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "mxfp4": mxfp4.read,
}
"""By quant_method of a quantization_config."""
SAME_AS = {
    "awq_marlin": ("awq",), "gptq_marlin": ("gptq",), "moe_wna16": ("awq", "gptq"), "ipex": ("awq", "gptq"),
    "compressed_tensors": ("compressed-tensors",),
}  # fmt: skip
"""Names of kernels for checkpoints of other methods: one layout serves them all here."""
ONLINE = {"int8": ("int8/128", "int8/128"), "int4": ("int4/32", "int8/128"), "fp8": ("fp8/row", "fp8/row")}
"""Layouts, without the scales' dtype, that plain weights are quantized to as they are loaded, by --quantization: those
of linears, and of the one that gives the logits."""


def quantization_config(config: CompileConfig) -> Mapping[str, Any]:
    """The checkpoint's quantization_config, empty for one of plain weights. Raises QuantizationError."""
    folder = Path(config.model)
    values = merged(_json(folder / "config.json"), dict(config.hf_overrides))
    text = values.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    found = values.get("quantization_config") or values.get("compression_config") or inner.get("quantization_config")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise QuantizationError(f"{folder / 'config.json'}: quantization_config is no object")
    return found


def method_of(config: CompileConfig) -> Method | None:
    """How the checkpoint's weights are quantized; None for plain ones. Raises QuantizationError."""
    found = quantization_config(config)
    if not found:
        _check_plain(config.quantization)
        return None
    name = _method_name(found)
    if name not in READERS:
        raise QuantizationError(f"its weights are quantized by {name}, which is not supported; supported are "
                                f"{', '.join(sorted(READERS))}")  # fmt: skip
    asked = config.quantization
    if asked and name != asked and name not in SAME_AS.get(asked, ()):
        raise QuantizationError(f"--quantization {asked}: the checkpoint's weights are quantized by {name}; leave the "
                                "flag out")  # fmt: skip
    return READERS[name](found)


def quantizes_plain(config: CompileConfig) -> bool:
    """Whether plain weights are to be quantized as they are loaded. Raises QuantizationError."""
    return (config.quantization or "") in ONLINE and not quantization_config(config)


def online_layouts(config: CompileConfig, dtype: str) -> tuple[str, str]:
    """Layouts of linears and of the logits' one, with scales of the model's `dtype`; empty to leave weights plain."""
    linears, head = ONLINE.get(config.quantization or "", ("", ""))
    return (f"{linears}/{dtype}", f"{head}/{dtype}") if linears else ("", "")


def _method_name(found: Mapping[str, Any]) -> str:
    name = str(found.get("quant_method", "compressed-tensors" if "config_groups" in found else "an unknown method"))
    return SAME_AS.get(name, (name,))[0]


def _check_plain(asked: str | None) -> None:
    if asked and asked not in ONLINE:
        raise QuantizationError(f"--quantization {asked}: config.json has no quantization_config, so its weights are "
                                f"plain; {', '.join(sorted(ONLINE))} quantize them as they are loaded")  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    """An object; empty where there is no such file or no JSON: capture says so."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
