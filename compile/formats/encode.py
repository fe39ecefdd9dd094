"""Plain weights to codes: the scales of each group, by its largest value or by the least error."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.ops.coded import CODE_TYPES, TABLES, Coded, Layout

LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
SHRINKS = (1.0, 0.9)
"""Candidates for the value of code -8, as parts of the largest weight: a smaller one rounds the others less."""


def encode(weight: Tensor, layout: Layout) -> Coded:
    """[N, K] of any float dtype; int8, int4, fp8 and tables, without zeros."""
    num_in, group = weight.shape[1], layout.group or weight.shape[1]
    parts = F.pad(weight.float(), (0, -num_in % group)).unflatten(1, (-1, group))
    scale_dtype, kind = getattr(torch, layout.scale_dtype), layout.kind
    scales = _scales(parts, kind, scale_dtype)
    if kind == "lut4":
        return Coded(_nearest(parts / scales.float(), layout.table).flatten(1)[:, :num_in], scales.squeeze(-1))
    if kind == "int4":
        scales = _best_scales(parts, scale_dtype)
    codes = _codes(parts, scales, kind).flatten(1)[:, :num_in]
    stored = codes.to(CODE_TYPES[kind]) if kind != "int4" else (codes + 8).to(torch.uint8)
    return Coded(stored, scales.squeeze(-1))


def _scales(parts: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    return (parts.abs().amax(-1, keepdim=True) / LARGEST.get(kind, 1.0)).to(dtype)


def _nearest(values: Tensor, table: str) -> Tensor:
    """uint8 codes of the entries of a table that are nearest to values in -1 .. 1, or NaN for those of no size."""
    entries, codes = torch.tensor(TABLES[table], device=values.device).sort()
    found = torch.bucketize(values.nan_to_num(), (entries[1:] + entries[:-1]) / 2)
    return codes[found].to(torch.uint8)


def _best_scales(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [N, G, 1] of either sign, for codes -8 .. 7, with the least squares of errors among a few."""
    high, low = parts.amax(-1, keepdim=True), parts.amin(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    best, least = torch.zeros_like(extreme, dtype=dtype), torch.full_like(extreme, float("inf"))
    for shrink in SHRINKS:
        codes = _codes(parts, extreme * (shrink / -8), "int4")
        scales = ((codes * parts).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)).to(dtype)
        errors = (_codes(parts, scales, "int4") * scales.float() - parts).square_().sum(-1, keepdim=True)
        best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    return best


def _codes(parts: Tensor, scales: Tensor, kind: str) -> Tensor:
    wide = scales.float()
    ratio = torch.where(wide != 0, parts / wide, 0)
    if kind == "fp8":
        return ratio.clamp(-448, 448)
    return ratio.round_().clamp_(-8 if kind == "int4" else -127, LARGEST[kind])
