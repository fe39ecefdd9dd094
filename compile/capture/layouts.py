"""The layout of codes in which each weight of a model is stored: the checkpoint's own, or that of --quantization."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from fuseline.compile.capture.captured import CapturedModel
from fuseline.compile.capture.checkpoint import CodedTensor
from fuseline.compile.capture.coded import layout_of, open_stored
from fuseline.compile.capture.errors import CaptureError
from fuseline.compile.capture.weights import resolve
from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.codes import has_kernel
from fuseline.compile.ops.coded import parse_layout
from fuseline.compile.quantization.methods import method_of, online_layouts
from fuseline.compile.quantization.published import QuantizationError

logger = logging.getLogger(__name__)


def layouts_of(captured: CapturedModel, config: CompileConfig) -> Mapping[str, str]:
    """Name of the layout by parameter; plain ones are left out. Raises CaptureError, LoadError."""
    try:
        method = method_of(config)
    except QuantizationError as error:
        raise CaptureError(str(error)) from error
    found = _stored_layouts(captured, config) if method else _online_layouts(captured, config)
    return found | {name: found[first] for name, first in captured.tied.items() if first in found}


def _stored_layouts(captured: CapturedModel, config: CompileConfig) -> dict[str, str]:
    stored = open_stored(config)
    if not any(isinstance(tensor, CodedTensor) for tensor in stored.values()):
        return {}
    resolved, found, counts = resolve(stored, captured, config), {}, Counter()
    for name, (shape, _) in captured.parameters.items():
        lazy = resolved[name] if name in resolved else None
        if lazy is None or not any(isinstance(part.stored, CodedTensor) for part in lazy.slices):
            continue
        layout = layout_of(lazy)
        if layout is not None and has_kernel(layout, shape):
            found[name] = str(layout)
        counts[found.get(name, "dequantized as they are loaded")] += 1
    for layout, count in counts.most_common():
        logger.info("%d weights are quantized: %s", count, layout)
    return found


def _online_layouts(captured: CapturedModel, config: CompileConfig) -> dict[str, str]:
    dtype = str(captured.dtype).removeprefix("torch.")
    layout, of_head = online_layouts(config, dtype)
    if not layout:
        return {}
    vocab = captured.facts.vocab_size
    return {
        name: of_head if shape[0] == vocab else layout
        for name, (shape, _) in captured.parameters.items()
        if len(shape) == 2 and has_kernel(parse_layout(layout), shape)
    }
