"""Weights of few bits in the form that all readers and kernels agree on: codes, and a scale for each group of inputs.

    weight[n, k] = (value(codes[n, k]) - zeros[n, g]) * scales[n, g],   g = k / group
    weight[n, k] = codes[n, k] * scales[n, g] + zeros[n, g]             of uint4 and uint8

Legend: N outputs, K inputs, G = ceil(K / group) groups; experts have a leading dim. A scale of a whole tensor, or of a
block of outputs, is repeated for each output.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

CODE_TYPES = {
    "int4": torch.uint8, "lut4": torch.uint8, "uint4": torch.uint8, "int8": torch.int8, "uint8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
"""Element type of codes, by kind. Codes of 4 bits are 0 .. 15, those of int4 stand for code - 8, of uint8 0 .. 127."""
COUNTING_UP = ("uint4", "uint8", "uint5")
"""Kinds whose codes count up from the least value of their group: a float, which is stored in the place of its zero."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution (Dettmers et al., QLoRA)."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Floats of 4 bits (OCP Microscaling Formats 1.0)."""
FP4 = (
    0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25, -0.0, -0.0052083333, -0.6666666667,
    -1.0, -0.3333333333, -0.5, -0.1666666667, -0.25,
)  # fmt: skip
"""The fp4 of bitsandbytes."""
IQ4NL = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
"""The iq4_nl and iq4_xs of llama.cpp."""
TABLES = {"nf4": NF4, "fp4": FP4, "e2m1": E2M1, "iq4nl": IQ4NL}
KINDS = {
    "int8": 0, "fp8": 1, "int4": 2, "nf4": 3, "fp4": 4, "e2m1": 5, "iq4nl": 6, "uint4": 7, "uint8": 8, "int5": 9,
    "uint5": 10,
}  # fmt: skip
"""What codes stand for, as kernels are told (CodeKind in codes.h)."""
OFFSETS = {"int4": 8, "int5": 16}
"""Kinds whose codes are unsigned and stand for a number that is so much less."""
FIVES = "5bit"
"""Word of layouts whose codes need 5 bits."""

BY_TOKEN, STATIC = ACTIVATIONS = ("a8", "a8static")
"""Inputs as int8: each token's by its largest magnitude, or all by a published scale."""
MIXED = "mixed"
"""In place of a layout's name: of weights whose codes can only be dequantized."""


@dataclass(frozen=True)
class Layout:
    """How a weight of few bits is stored; its name is `str` of it, such as int4/128/float16/zeros."""

    kind: str
    """A key of CODE_TYPES."""
    group: int = 0
    """Inputs that share a scale; 0: all of a row."""
    scale_dtype: str = "float16"
    has_zeros: bool = False
    table: str = ""
    """Values of a lut4's codes: a key of TABLES."""
    has_order: bool = False
    """Inputs are stored in an order of the weight's own, so that those of a group are neighbours."""
    activations: str = field(default="", compare=False)
    """How inputs are quantized as they are multiplied: one of ACTIVATIONS; empty: not at all. How a weight is stored
    does not depend on it."""
    has_fives: bool = False
    """Codes of int8 are -16 .. 15, those of uint8 0 .. 31: kernels of a CPU may read 5 bits of them."""

    def __str__(self) -> str:
        words = [self.kind, str(self.group or "row"), self.scale_dtype, self.table]
        words += [word for word, is_set in (("zeros", self.has_zeros), ("order", self.has_order)) if is_set]
        words += [FIVES if self.has_fives else "", self.activations]
        return "/".join(filter(None, words))

    @property
    def code_kind(self) -> str:
        """A key of KINDS."""
        return self.table or self.kind

    @property
    def packed_kind(self) -> str:
        """A key of KINDS: of codes that are stored in no more bits than they need."""
        return self.code_kind.replace("8", "5") if self.has_fives else self.code_kind

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers, whose products with those of inputs can be summed exactly."""
        return self.kind.startswith("int")

    @property
    def can_join(self) -> bool:
        """Whether outputs of several weights can be stored as one: each may have inputs of its own."""
        return not self.has_order and self.activations != STATIC

    @property
    def bits(self) -> int:
        return 4 if self.kind.endswith("4") else 8

    def num_groups(self, num_in: int) -> int:
        return -(-num_in // self.group) if self.group else 1


def parse_layout(name: str) -> Layout:
    """The inverse of str. Raises ValueError."""
    kind, group, dtype, *words = name.split("/")
    table = next((word for word in words if word in TABLES), "")
    activations = next((word for word in words if word in ACTIVATIONS), "")
    layout = Layout(
        kind, 0 if group == "row" else int(group), dtype, "zeros" in words, table, "order" in words, activations,
        FIVES in words,
    )  # fmt: skip
    if kind not in CODE_TYPES or str(layout) != name:
        raise ValueError(f"{name} is no layout of weights")
    return layout


@dataclass(frozen=True)
class Coded:
    """Some outputs of a weight."""

    codes: Tensor
    """[N, K] of CODE_TYPES."""
    scales: Tensor
    """[N, G] as published."""
    zeros: Tensor | None = None
    """[N, G] in the units of the codes' values; of kinds COUNTING_UP in those of the weight."""
    order: Tensor | None = None
    """[K]: column j of the codes is input order[j]."""
    input_scale: Tensor | None = None
    """[1] of inputs that are quantized by a published scale."""

    def narrow(self, begin: int, end: int) -> Coded:
        """Outputs (or experts) [begin, end)."""
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return replace(self, codes=self.codes[begin:end], scales=self.scales[begin:end], zeros=zeros)

    def select(self, index: int) -> Coded:
        """One expert's."""
        zeros = None if self.zeros is None else self.zeros[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], zeros=zeros)


def code_values(codes: Tensor, kind: str) -> Tensor:
    """float32 values of codes of one of KINDS, any shape."""
    if kind in TABLES:
        return torch.tensor(TABLES[kind], dtype=torch.float32)[codes.long()]
    return codes.float() - OFFSETS.get(kind, 0)


def dequantize(coded: Coded, layout: Layout) -> Tensor:
    """float32 [N, K], inputs in the model's order. The reference of every kernel."""
    kind = layout.code_kind
    values = scaled(code_values(coded.codes, kind), coded.scales, coded.zeros, layout.group, kind)
    return values if coded.order is None else torch.empty_like(values).index_copy_(-1, coded.order, values)


def scaled(values: Tensor, scales: Tensor, zeros: Tensor | None, group: int, kind: str) -> Tensor:
    """Values [N, K] of codes of one of KINDS as a weight, in their dtype."""
    if kind in COUNTING_UP and zeros is not None:
        return values * _spread(scales, values, group) + _spread(zeros, values, group)
    if zeros is not None:
        values = values - _spread(zeros, values, group)
    return values * _spread(scales, values, group)


def _spread(groups: Tensor, values: Tensor, group: int) -> Tensor:
    """[N, G] -> [N, K], or [N, 1] where a row shares one."""
    groups = groups.to(values.dtype)
    return groups.repeat_interleave(group, -1)[..., : values.shape[-1]] if group else groups
