"""deepspeedfp: plain weights that DeepSpeed's FP quantizer would round to 6, 8 or 12 bits as they are loaded.

Groups follow each other through the whole weight. A value is |largest| / range of its group times a float: of
`exponent` bits, no subnormals and no infinities, the mantissa rounded half away from zero; what is below the smallest
float becomes it, but 0 stays 0 (csrc/fp_quantizer/fp_quantize_impl.cu of DeepSpeed, deterministic rounding).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.quantization.published import Method, Published, Read, Tensors, one_of

FORMS = {6: (3, 2, 28.0), 8: (4, 3, 480.0), 12: (7, 4, 510.0)}
"""(exponent bits, mantissa bits, range) by bits."""
NOT_LINEAR = re.compile(r"(^|\.)(lm_head|[^.]*embed[^.]*|wte|wpe|gate|router|shared_expert_gate)$")


def read(config: Mapping[str, Any]) -> Method:
    bits = one_of(config.get("bits", 8), tuple(FORMS), "deepspeedfp: bits")
    return Method("deepspeedfp", (".weight",), functools.partial(_find, bits, config.get("group_size", 512)))


def _find(bits: int, group: int, module: str, tensors: Tensors, value: Read) -> Published | None:
    weight = tensors[".weight"]
    if weight.ndim != 2 or not weight.is_floating_point() or NOT_LINEAR.search(module):
        return None
    return Published(None, tuple(weight.shape), functools.partial(_decode, bits, group))


def _decode(bits: int, group: int, tensors: Tensors) -> Tensor:
    weight = tensors[".weight"]
    return rounded(weight.float().flatten(), bits, group).view(weight.shape)


def rounded(values: Tensor, bits: int, group: int) -> Tensor:
    """[n] float32 to the nearest floats of so many bits."""
    exponent, mantissa, largest = FORMS[bits]
    parts = F.pad(values, (0, -len(values) % group)).view(-1, group)
    peak = parts.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = parts * (largest / peak)
    drop = 23 - mantissa
    words = (scaled.abs().view(torch.int32) + (1 << (drop - 1))) >> drop << drop
    least = 2.0 ** (2 - 2 ** (exponent - 1))
    floats = words.view(torch.float32).clamp(min=least) * (peak / largest)
    return torch.where(parts == 0, 0.0, torch.copysign(floats, parts)).flatten()[: len(values)]
