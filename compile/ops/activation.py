"""Gated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fuseline.compile.ops import codes
from fuseline.compile.ops.library import op
from torch import Tensor

ACTIVATIONS = {
    codes.UNARY["silu"]: F.silu,
    codes.UNARY["gelu"]: F.gelu,
    codes.UNARY["gelu_tanh"]: lambda x: F.gelu(x, approximate="tanh"),
    codes.UNARY["relu"]: F.relu,
}


@op("act_mul(Tensor gate, Tensor up, int act) -> Tensor", fake=lambda gate, up, act: torch.empty_like(gate))
def act_mul(gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up; act(gate) is rounded to the dtype first, as Transformers' two ops do."""
    return ACTIVATIONS[act](gate) * up
