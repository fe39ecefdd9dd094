"""fp8 checkpoints: weight[N, K] float8_e4m3fn with a scale for all of it, an output, or a block of outputs and inputs.

    weight_scale: [], [1], [N] or [N, 1]                       (fp8, fbgemm_fp8, modelopt, quark)
    weight_scale_inv[N / 128, K / 128]                         (DeepSeek, Qwen: weight_block_size; it is a factor)
    weight_scale[N / 128, 1, K / 128, 1]                       (modelopt)
    weight_scale[N, K / 32] uint8: exponents, 127 being 1      (mxfp8)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.float4 import powers
from fuseline.compile.quantization.published import Method, Published, QuantizationError, Read, Tensors, dtype_name

SCALES = (".weight_scale_inv", ".weight_scale")
SUFFIXES = (".weight", *SCALES, ".input_scale")
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def read(config: Mapping[str, Any]) -> Method:
    block = config.get("weight_block_size")
    return Method("fp8", SUFFIXES, functools.partial(find, [block] if block else []))


def find(blocks: Sequence[Sequence[int]], module: str, tensors: Tensors, value: Read) -> Published | None:
    """A weight of fp8; `blocks`: outputs and inputs that may share a scale. Raises QuantizationError."""
    weight = tensors.get(".weight")
    if weight is None or weight.dtype != torch.float8_e4m3fn:
        return None
    scale = next((suffix for suffix in SCALES if suffix in tensors), "")
    if not scale:
        raise QuantizationError(f"{module}.weight is fp8 without a weight_scale")
    shape = tuple(tensors[scale].shape)
    rows, group = _block(shape, tuple(weight.shape), tensors[scale].dtype in EXPONENTS, blocks)
    if rows < 0:
        raise QuantizationError(f"{module}{scale} has shape {list(shape)}, the weight {list(weight.shape)}: it fits "
                                f"neither an output nor a block of {' or '.join(map(str, blocks))}")  # fmt: skip
    dtype = "float32" if tensors[scale].dtype in EXPONENTS else dtype_name(tensors[scale])
    cuts = {".weight": 1} | ({scale: rows} if rows else {})
    return Published(Layout("fp8", group, dtype), tuple(weight.shape), functools.partial(_decode, scale, rows), cuts)


def _block(
    shape: tuple[int, ...], weight: tuple[int, int], is_micro: bool, blocks: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """(outputs, inputs) that share a scale, 0 for all; -1 if the scales fit no block."""
    num_out, num_in = weight
    shape = tuple(size for at, size in enumerate(shape) if at % 2 == 0) if len(shape) == 4 else shape
    if shape in ((), (1,), (1, 1)):
        return 0, 0
    if shape in ((num_out,), (num_out, 1)):
        return 1, 0
    if is_micro and len(shape) == 2 and shape[0] == num_out and num_in % shape[1] == 0:
        return 1, num_in // shape[1]
    fits = [(rows, group) for rows, group in blocks if shape == (-(-num_out // rows), -(-num_in // group))]
    return fits[0] if fits else (-1, 0)


def _decode(scale: str, rows: int, tensors: Tensors) -> Coded:
    codes, scales = tensors[".weight"], tensors[scale]
    scales = powers(scales.view(torch.uint8)) if scales.dtype in EXPONENTS else scales
    return Coded(codes, _of_rows(scales.reshape(len(scales), -1) if rows else scales.reshape(1, 1), rows, len(codes)))


def _of_rows(scales: Tensor, rows: int, num_out: int) -> Tensor:
    """[blocks, G] -> [N, G], blocks of `rows` outputs; 0: one block."""
    return scales.expand(num_out, -1) if rows == 0 else scales.repeat_interleave(rows, 0)[:num_out]
