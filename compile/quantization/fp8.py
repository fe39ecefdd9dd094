"""fp8 checkpoints: weight[N, K] float8_e4m3fn with a scale for all of it, an output, or a block of outputs and inputs.

    weight_scale: [], [1] or [N, 1]             (fp8, fbgemm_fp8, modelopt)
    weight_scale_inv[N / 128, K / 128]          (DeepSeek, Qwen: weight_block_size; it is a factor, whatever its name)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.published import Method, Published, QuantizationError, Read, Tensors, dtype_name

SCALES = (".weight_scale_inv", ".weight_scale")
SUFFIXES = (".weight", *SCALES, ".input_scale")


def read(config: Mapping[str, Any]) -> Method:
    return Method("fp8", SUFFIXES, functools.partial(find, config.get("weight_block_size")))


def find(block: list[int] | None, module: str, tensors: Tensors, value: Read) -> Published | None:
    """A weight of fp8; `block`: outputs and inputs that share a scale. Raises QuantizationError."""
    weight = tensors.get(".weight")
    if weight is None or weight.dtype != torch.float8_e4m3fn:
        return None
    scale = next((suffix for suffix in SCALES if suffix in tensors), "")
    if not scale:
        raise QuantizationError(f"{module}.weight is fp8 without a weight_scale")
    shape, (num_out, num_in) = tuple(tensors[scale].shape), weight.shape
    dtype = dtype_name(tensors[scale])
    if shape in ((), (1,), (1, 1)):
        return Published(Layout("fp8", 0, dtype), tuple(weight.shape), functools.partial(_decode, scale, 0),
                         {".weight": 1})  # fmt: skip
    if shape in ((num_out,), (num_out, 1)):
        rows, group = 1, 0
    elif block and shape == (-(-num_out // block[0]), -(-num_in // block[1])):
        rows, group = block
    else:
        raise QuantizationError(f"{module}{scale} has shape {list(shape)}, the weight {list(weight.shape)}: it fits "
                                f"neither an output nor a block of {block}")  # fmt: skip
    decode = functools.partial(_decode, scale, rows)
    return Published(Layout("fp8", group, dtype), tuple(weight.shape), decode, {".weight": 1, scale: rows})


def _decode(scale: str, rows: int, tensors: Tensors) -> Coded:
    codes, scales = tensors[".weight"], tensors[scale]
    return Coded(codes, _of_rows(scales.reshape(len(scales), -1) if rows else scales.reshape(1, 1), rows, len(codes)))


def _of_rows(scales: Tensor, rows: int, num_out: int) -> Tensor:
    """[blocks, G] -> [N, G], blocks of `rows` outputs; 0: one block."""
    return scales.expand(num_out, -1) if rows == 0 else scales.repeat_interleave(rows, 0)[:num_out]
