"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 2, 3, 4 or 8 bits, a scale a group, any order of the inputs (act-order).

    qweight[K * bits / 32, N] int32: codes in order of k      scales[G, N]
    qzeros[G, N * bits / 32] int32: zeros, in format "gptq" less one; of "gptq_v2" as they are
    g_idx[K]: the group of each input

`dynamic` of a config gives modules settings of their own: by a pattern, "-:" before it for those that stay plain.
Codes of 2 and 3 bits are kept as codes of 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuseline.compile.ops.coded import Coded, Layout
from fuseline.compile.quantization.bits import centered, kind_of, unpack
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
BITS = (2, 3, 4, 8)


def read(config: Mapping[str, Any]) -> Method:
    whole, dynamic = _settings(config), config.get("dynamic") or {}
    own = [(pattern.removeprefix("+:"), _settings({**config, **changes})) for pattern, changes in dynamic.items()
           if not pattern.startswith("-:")]  # fmt: skip

    def find(module: str, tensors: Tensors, value: Read) -> Published | None:
        settings = next((settings for pattern, settings in own if re.match(pattern, module)), whole)
        return settings.find(module, tensors, value)

    return Method("gptq", SUFFIXES, find)


def _settings(config: Mapping[str, Any]) -> _Settings:
    bits = one_of(config.get("bits"), BITS, "gptq: bits")
    form = one_of(config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2"), "gptq: checkpoint_format")
    group = max(config.get("group_size", -1), 0)
    return _Settings(bits, group, form == "gptq", bool(config.get("sym")), bool(config.get("desc_act") and group))


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
        layout = Layout(kind_of(self.bits), self.group, dtype, not self.is_symmetric, has_order=self.has_order)
        return Published(layout, (num_out, words * 32 // self.bits), self.decode)

    def decode(self, tensors: Tensors) -> Coded:
        codes = unpack(tensors[".qweight"].T, self.bits)
        order = self._order(tensors[".g_idx"].long()) if ".g_idx" in tensors else None
        codes = centered(codes if order is None else codes[:, order], self.bits)
        scales, half = tensors[".scales"].T, 1 << (self.bits - 1)
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
