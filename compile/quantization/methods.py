"""All methods of quantization by name, and which one a checkpoint and the flag ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fuseline.compile.config import CompileConfig
from fuseline.compile.gguf.table import is_unpacked
from fuseline.compile.overrides import merged
from fuseline.compile.quantization import (
    aqlm,
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    deepspeedfp,
    fp8,
    gptq,
    hqq,
    marlin,
    modelopt,
    mxfp4,
    qqq,
    quark,
)
from fuseline.compile.quantization.published import Method, QuantizationError, Reader
from fuseline.compile.stored_config import ConfigFileError, config_path, read_stored_config

READERS: dict[str, Reader] = {
    "aqlm": aqlm.read,
    "auto-round": auto_round.read,
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "deepspeedfp": deepspeedfp.read,
    "fbgemm_fp8": fp8.read,
    "fp8": fp8.read,
    "gguf": lambda config: Method("gguf", (), lambda *_: None),  # its files say of each tensor how it is stored
    "gptq": gptq.read,
    "gptq_marlin_24": marlin.read_24,
    "hqq": hqq.read,
    "marlin": marlin.read,
    "modelopt": modelopt.read,
    "mxfp4": mxfp4.read,
    "qqq": qqq.read,
    "quark": quark.read,
}
"""By quant_method of a quantization_config."""
SAME_AS = {
    "awq_marlin": ("awq",), "gptq_marlin": ("gptq",), "moe_wna16": ("awq", "gptq"), "ipex": ("awq", "gptq"),
    "gptq": ("marlin", "gptq_marlin_24"), "compressed_tensors": ("compressed-tensors",),
    "modelopt_fp4": ("modelopt",), "inc": ("auto-round",), "intel/auto-round": ("auto-round",),
}  # fmt: skip
"""Names of kernels for checkpoints of other methods, and other spellings: one layout serves them all here."""


class Online(NamedTuple):
    """Layouts that plain weights are quantized to as they are loaded; empty for those that stay plain."""

    linears: str = ""
    experts: str = ""
    head: str = ""
    """Of the linear that gives the logits."""


ONLINE = {
    "int8": Online("int8/128/{}", "int8/128/{}", "int8/128/{}"),
    "int4": Online("int4/32/{}", "int4/32/{}", "int8/128/{}"),
    "fp8": Online("fp8/row/{}", "fp8/row/{}", "fp8/row/{}"),
    "ptpc_fp8": Online("fp8/row/float32", "fp8/row/float32"),
    "tpu_int8": Online("int8/row/float32"),
    "experts_int8": Online(experts="int8/row/float32"),
    "bitsandbytes": Online("lut4/64/float32/nf4", "lut4/64/float32/nf4"),
}
"""By --quantization; {} is the model's dtype."""
OF_PLAIN: dict[str, Reader] = {"deepspeedfp": deepspeedfp.read}
"""Readers that take plain weights for published tensors, by --quantization."""
HALF = ("float16",)
HALVES = ("float16", "bfloat16")
DTYPES = dict.fromkeys(("aqlm", "awq", "gptq", "gptq_marlin_24", "marlin", "qqq"), HALF) | dict.fromkeys(
    ("bitsandbytes", "gguf", "int8", "int4"), (*HALVES, "float32")
)
"""What --dtype may be, by the name of the method or kernel; HALVES for all others."""
KERNEL_OF = {"awq": "awq_marlin", "gptq": "gptq_marlin"}
"""What runs checkpoints of a method where the flag does not ask for the method itself."""
BESIDE = ("quantize_config.json", "quant_config.json")
"""Where older checkpoints have their quantization_config; read if --quantization names their method."""
ROUTER = re.compile(r"\.(gate|router|router\.\w+|shared_expert_gate)\.weight$")


def quantization_config(config: CompileConfig) -> Mapping[str, Any]:
    """The checkpoint's quantization_config, empty for one of plain weights. Raises QuantizationError."""
    path = config_path(config.config_dir, config.config_format)
    values = merged(_stored(config), dict(config.hf_overrides))
    text = values.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    found = values.get("quantization_config") or values.get("compression_config") or inner.get("quantization_config")
    if found is None:
        return _beside(Path(config.model), config.quantization or "")
    if not isinstance(found, Mapping):
        raise QuantizationError(f"{path}: quantization_config is no object")
    return found


def _beside(folder: Path, asked: str) -> Mapping[str, Any]:
    """What files beside a config.json say that has no quantization_config."""
    if is_unpacked(folder):  # --hf-config-path names another one
        return _json(folder / "config.json").get("quantization_config") or {}
    if found := _json(folder / "hf_quant_config.json"):
        return {"quant_method": "modelopt", **found}
    if asked not in READERS and asked not in SAME_AS:
        return {}
    found = next(filter(None, (_json(folder / name) for name in BESIDE)), {})
    return {"quant_method": _canonical(asked), **found} if found else {}


def method_of(config: CompileConfig) -> Method | None:
    """How the checkpoint's weights are quantized; None for plain ones. Raises QuantizationError."""
    found, asked = quantization_config(config), config.quantization or ""
    if not found and asked in OF_PLAIN:
        _check_dtype(asked, config.dtype)
        return OF_PLAIN[asked]({})
    if not found:
        _check_plain(config)
        _check_dtype(asked, config.dtype)
        return None
    name = _method_name(found)
    if name not in READERS:
        raise QuantizationError(f"its weights are quantized by {name}, which is not supported; supported are "
                                f"{', '.join(sorted(READERS))}")  # fmt: skip
    if asked and name != asked and name not in SAME_AS.get(asked, ()):
        raise QuantizationError(f"--quantization {asked}: the checkpoint's weights are quantized by {name}; leave the "
                                "flag out")  # fmt: skip
    _check_dtype(asked or KERNEL_OF.get(name, name), config.dtype)
    return READERS[name](found)


def in_words(config: CompileConfig) -> str:
    """What the start says of the method; empty for plain weights. Raises QuantizationError."""
    found, asked = quantization_config(config), config.quantization or ""
    if not found:
        return f"{asked}, as weights are loaded" if asked else ""
    name = _method_name(found)
    return name if asked in ("", name) else f"{name}, for --quantization {asked}"


def quantizes_plain(config: CompileConfig) -> bool:
    """Whether plain weights are to be quantized as they are loaded. Raises QuantizationError."""
    return (config.quantization or "") in ONLINE and not quantization_config(config)


def online_layouts(config: CompileConfig, dtype: str) -> Online:
    """The layouts that --quantization asks for, where the model's dtype is `dtype`."""
    return Online(*(layout.format(dtype) for layout in ONLINE.get(config.quantization or "", Online())))


def is_router(name: str) -> bool:
    """Whether a weight chooses experts: those stay plain, since a small error chooses others."""
    return bool(ROUTER.search(name))


def _method_name(found: Mapping[str, Any]) -> str:
    name = str(found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else "an unknown method"))
    form = found.get("checkpoint_format")
    if name in ("gptq", "marlin") and (form == "marlin" or found.get("is_marlin_format")):
        return "marlin"
    if name == "gptq" and form == "marlin_24":
        return "gptq_marlin_24"
    return _canonical(name)


def _canonical(name: str) -> str:
    return name if name in READERS else SAME_AS.get(name, (name,))[0]


def _check_plain(config: CompileConfig) -> None:
    asked = config.quantization
    is_gguf = asked == "gguf" and is_unpacked(Path(config.model))
    if asked and asked not in ONLINE and not is_gguf:
        raise QuantizationError(f"--quantization {asked}: config.json has no quantization_config, so its weights are "
                                f"plain; {', '.join(sorted({*ONLINE, *OF_PLAIN}))} quantize them as they are loaded")


def _check_dtype(name: str, dtype: str) -> None:
    """`dtype`: that of the flag; what auto takes is always fit."""
    allowed = DTYPES.get(name, HALVES)
    if name and dtype in (*HALVES, "float32") and dtype not in allowed:
        raise QuantizationError(f"--dtype {dtype}: weights of {name} are computed with in {' or '.join(allowed)}; "
                                "leave the flag out")  # fmt: skip


def _stored(config: CompileConfig) -> dict[str, Any]:
    """The checkpoint's settings; empty where there are none that can be read: capture says so."""
    try:
        return read_stored_config(config.config_dir, config.config_format)
    except ConfigFileError:
        return {}


def _json(path: Path) -> dict[str, Any]:
    """An object; empty where there is no such file or no JSON."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
