"""Plain weights to codes: the scales of each group, by its largest value or by the least error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.coded import CODE_TYPES, Coded, Layout

LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Candidates for the largest code's value, as parts of the largest weight: a smaller one rounds the others less."""


def encode(weight: Tensor, layout: Layout) -> Coded:
    """[N, K] of any float dtype; int8, int4 and fp8, without zeros."""
    num_in, group = weight.shape[1], layout.group or weight.shape[1]
    parts = F.pad(weight.float(), (0, -num_in % group)).unflatten(1, (-1, group))
    scale_dtype, kind = getattr(torch, layout.scale_dtype), layout.kind
    scales = _scales(parts, kind, scale_dtype)
    if kind == "int4":
        scales = _best_scales(parts, scale_dtype)
    codes = _codes(parts, scales, kind).flatten(1)[:, :num_in]
    stored = codes.to(CODE_TYPES[kind]) if kind != "int4" else (codes + 8).to(torch.uint8)
    return Coded(stored, scales.squeeze(-1))


def _scales(parts: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    return (parts.abs().amax(-1, keepdim=True) / LARGEST[kind]).to(dtype)


def _best_scales(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [N, G, 1] of codes -8 .. 7, of either sign, with the least squares of errors."""
    extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(extreme, dtype=dtype), torch.full_like(extreme, float("inf"))
    for shrink in SHRINKS:
        for largest in (-8.0, 7.0):
            scales = (extreme * (shrink / largest)).to(dtype)
            errors = (_codes(parts, scales, "int4") * scales.float() - parts).square().sum(-1, keepdim=True)
            best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def _codes(parts: Tensor, scales: Tensor, kind: str) -> Tensor:
    wide = scales.float()
    ratio = torch.where(wide != 0, parts / wide, 0)
    if kind == "fp8":
        return ratio.clamp(-448, 448)
    return ratio.round_().clamp_(-8 if kind == "int4" else -127, LARGEST[kind])
