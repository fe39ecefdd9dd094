"""The layout of codes in which each weight of a model is stored: the checkpoint's own, or that of --quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import is_quantized, layout_of, open_stored
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.lazy_tensor import LazyTensor
from fuseline.compile.capture.weights import resolve
from fuseline.compile.config import CompileConfig
from fuseline.compile.ops.coded import BY_TOKEN, MIXED, Layout, parse_layout
from fuseline.compile.quantization.methods import is_router, method_of, online_layouts
from fuseline.compile.quantization.published import QuantizationError


def layouts_of(captured: CapturedModel, config: CompileConfig) -> Mapping[str, str]:
    """Name of the layout by parameter; plain ones are left out. Raises CaptureError, LoadError."""
    try:
        method = method_of(config)
    except QuantizationError as error:
        raise CaptureError(str(error)) from error
    found = _stored_layouts(captured, config) if method else _online_layouts(captured, config)
    if config.activation_dtype == "int8":
        found = _with_int8_inputs(found)
    is_matrix = {name: len(shape) == 2 for name, (shape, _) in captured.parameters.items()}
    found = {name: layout if is_matrix[name] else with_plain_inputs(layout) for name, layout in found.items()}
    return found | {name: found[first] for name, first in captured.tied.items() if first in found}


def _with_int8_inputs(layouts: Mapping[str, str]) -> dict[str, str]:
    """Adds it to the layouts of integers. Raises CaptureError if there are none."""
    known = {name: parse_layout(name) for name in {*layouts.values()} - {MIXED}}
    asked = {name: str(_with_inputs(layout)) for name, layout in known.items()}
    if not any(layout.is_integer for layout in known.values()):
        stored = f"stored as {', '.join(sorted(known))}" if known else "dequantized" if layouts else "plain"
        raise CaptureError(f"--activation-dtype int8 needs weights of int8 or int4, and these are {stored}: give a "
                           "checkpoint of such, or --quantization int8 or int4 for plain weights")  # fmt: skip
    return {name: asked.get(layout, layout) for name, layout in layouts.items()}


def _with_inputs(layout: Layout) -> Layout:
    """Kernels for such inputs read codes of 5 bits as 8."""
    if layout.activations or not layout.is_integer:
        return layout
    return replace(layout, activations=BY_TOKEN, has_fives=False)


def with_plain_inputs(layout: str) -> str:
    """The layout of weights whose inputs stay as they are: of experts, and of all on a GPU."""
    return layout if layout == MIXED else str(replace(parse_layout(layout), activations=""))


def _stored_layouts(captured: CapturedModel, config: CompileConfig) -> dict[str, str]:
    if config.load_format == "dummy":
        return {}  # random weights are plain
    stored = open_stored(config)
    if not any(isinstance(tensor, CodedTensor) for tensor in stored.values()):
        return {}
    resolved = resolve(stored, captured, config)
    found = {name: _layout_in(resolved[name]) for name in captured.parameters if name in resolved}
    return {name: layout for name, layout in found.items() if layout}


def _layout_in(lazy: LazyTensor) -> str:
    """Name of the layout; MIXED for codes that are not a weight of one layout as it is, empty for plain values."""
    if not any(is_quantized(part) for part in lazy.slices):
        return ""
    layout = layout_of(lazy)
    return str(layout) if layout else MIXED


def _online_layouts(captured: CapturedModel, config: CompileConfig) -> dict[str, str]:
    dtype = str(captured.dtype).removeprefix("torch.")
    online = online_layouts(config, dtype)
    vocab = captured.facts.vocab_size
    found = {
        name: online.experts if len(shape) == 3 else online.head if shape[0] == vocab else online.linears
        for name, (shape, _) in captured.parameters.items()
        if len(shape) in (2, 3) and not is_router(name)
    }
    return {name: layout for name, layout in found.items() if layout}
