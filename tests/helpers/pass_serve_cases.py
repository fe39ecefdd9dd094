"""Ops, tables and RoPE cases for tests of the serving passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pass_cases import Case, case
from torch import Tensor

OPS = torch.ops.fuseline

TOKENS, HEADS, KV_HEADS, DIM = 6, 4, 2, 8


def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = 0, window: int = 0, causal: bool = True) -> Tensor:
    return OPS.attention(q, k, v, None, layer, DIM**-0.5, window, 0.0, causal)


Q, K = torch.randn(1, HEADS, TOKENS, DIM), torch.randn(1, KV_HEADS, TOKENS, DIM)

V = torch.randn(1, KV_HEADS, TOKENS, DIM)

TABLES = {name: torch.randn(64, DIM) for name in ("cos", "sin", "other")}

ROPE_ROWS = torch.arange(TOKENS)


def rope_case(function: Callable, dtype: torch.dtype) -> Case:
    return case(function, dtype, q=Q, k=K, v=V, rows=ROPE_ROWS, **TABLES)


def turned_alike(q, k, v, rows, cos, sin, other):
    return attend(OPS.rope(q, cos, sin, rows, DIM, 0), OPS.rope(k, cos, sin, rows, DIM, 0), v) + other[0, 0]
