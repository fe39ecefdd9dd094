"""mxfp4 checkpoints (gpt-oss): experts of 4-bit floats with a power of two for each 32 inputs.

    NAME_blocks[E, N, K / 32, 16] uint8: two codes a byte, the first in the low half
    NAME_scales[E, N, K / 32] uint8: exponents, 127 being 1      The model has NAME[E, K, N].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import unpack_nibbles
from fuseline.compile.quantization.float4 import powers
from fuseline.compile.quantization.published import Method, Published, Read, Tensors

BLOCKS, SCALES = "_blocks", "_scales"


def read(config: Mapping[str, Any]) -> Method:
    return Method("mxfp4", (BLOCKS, SCALES), _find, weight="")


def _find(module: str, tensors: Tensors, value: Read) -> Published | None:
    if BLOCKS not in tensors or SCALES not in tensors:
        return None
    experts, num_out, groups, size = tensors[BLOCKS].shape
    layout = Layout("lut4", 2 * size, "float32", table="e2m1")
    shape = experts, num_out, groups * 2 * size
    return Published(layout, shape, _decode, {BLOCKS: 1, SCALES: 1}, is_transposed=True)


def _decode(tensors: Tensors) -> Coded:
    return Coded(unpack_nibbles(tensors[BLOCKS]).flatten(-2), powers(tensors[SCALES]))
