"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 4 or 8 bits, a scale a group, any order of the inputs (act-order).

    qweight[K * bits / 32, N] int32: codes in order of k      scales[G, N]
    qzeros[G, N * bits / 32] int32: zeros, in format "gptq" less one; of "gptq_v2" as they are
    g_idx[K]: the group of each input
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import unpack
from fuseline.compile.quantization.published import (
    Method,
    Published,
    QuantizationError,
    Read,
    Tensors,
    dtype_name,
    one_of,
)

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


def read(config: Mapping[str, Any]) -> Method:
    bits = one_of(config.get("bits"), (4, 8), "gptq: bits")
    form = one_of(config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2"), "gptq: checkpoint_format")
    group = max(config.get("group_size", -1), 0)
    settings = _Settings(bits, group, form == "gptq", bool(config.get("sym")), bool(config.get("desc_act")) and group)
    return Method("gptq", SUFFIXES, settings.find)


@dataclass(frozen=True)
class _Settings:
    bits: int
    group: int
    is_less_one: bool
    is_symmetric: bool
    has_order: bool

    def find(self, module: str, tensors: Tensors, value: Read) -> Published | None:
        if ".qweight" not in tensors:
            return None
        words, num_out = tensors[".qweight"].shape
        dtype = dtype_name(tensors[".scales"])
        layout = Layout(f"int{self.bits}", self.group, dtype, not self.is_symmetric, has_order=bool(self.has_order))
        return Published(layout, (num_out, words * 32 // self.bits), self.decode)

    def decode(self, tensors: Tensors) -> Coded:
        half, codes = 1 << (self.bits - 1), unpack(tensors[".qweight"].T, self.bits)
        order = self._order(tensors[".g_idx"].long()) if ".g_idx" in tensors else None
        codes = codes if order is None else codes[:, order]
        if self.bits == 8:
            codes = (codes.to(torch.int16) - half).to(torch.int8)
        scales = tensors[".scales"].T
        zeros = self._zeros(tensors[".qzeros"]) - half
        if not self.is_symmetric:
            return Coded(codes, scales, zeros.T.to(scales.dtype), order)
        if zeros.any():
            raise QuantizationError(f"qzeros are not {half}, as they are where config.json has sym true")
        return Coded(codes, scales, order=order)

    def _zeros(self, words: Tensor) -> Tensor:
        """[G, N] int16. A zero of 0, less one, is stored as the largest."""
        return (unpack(words, self.bits).to(torch.int16) + self.is_less_one) & ((1 << self.bits) - 1)

    def _order(self, groups: Tensor) -> Tensor | None:
        if self.has_order:
            return torch.argsort(groups, stable=True)
        if self.group and not torch.equal(groups, torch.arange(len(groups)) // self.group):
            raise QuantizationError("g_idx is not in order, as it is where config.json has desc_act false")
        return None
