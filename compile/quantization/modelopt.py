"""ModelOpt checkpoints (NVIDIA): fp8 and NVFP4, told by config.json or by hf_quant_config.json beside it.

    fp8    weight[N, K] float8_e4m3fn, weight_scale as in fp8.py
    NVFP4  weight[N, K / 2] uint8, weight_scale[N, K / 16] fp8, weight_scale_2: a float32 factor (float4.py)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fuseline.compile.quantization import float4, fp8
from fuseline.compile.quantization.published import Method, Published, QuantizationError, Read, Tensors, one_of

ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PC_PT", "FP8_PB_WO", "MXFP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION",
)  # fmt: skip
FLOAT4 = (".weight", ".weight_scale", ".weight_scale_2")
BLOCK = (128, 128)
OF_INPUTS = ".pre_quant_scale"


def read(config: Mapping[str, Any]) -> Method:
    settings = config.get("quantization") or config
    one_of(settings.get("quant_algo"), ALGORITHMS, "modelopt: quant_algo")
    for name, layer in (settings.get("quantized_layers") or {}).items():
        one_of(layer.get("quant_algo"), ALGORITHMS, f"modelopt: quant_algo of {name}")
    suffixes = (*fp8.SUFFIXES, ".weight_scale_2", OF_INPUTS)
    return Method("modelopt", suffixes, functools.partial(_find, settings.get("weight_block_size") or BLOCK))


def _find(block: tuple[int, int], module: str, tensors: Tensors, value: Read) -> Published | None:
    if OF_INPUTS in tensors:
        raise QuantizationError(f"{module}{OF_INPUTS}: weights whose inputs are scaled first are not supported")
    return float4.find(FLOAT4, False, module, tensors) or fp8.find([block], module, tensors, value)
