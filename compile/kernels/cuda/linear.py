"""Matrix products of few rows by csrc/cuda/linear.cu; of more rows they are torch's.

`run` takes the library and the op's arguments; what its kernel does not take of them goes on to torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.kernels.cuda.activation import act_mul
from fuseline.compile.kernels.cuda.library import DTYPES, CudaLibrary, has_one_dtype, native
from fuseline.compile.kernels.registry import FIRST, TORCH, Implementation

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 16
WIDE = 8192
"""Outputs of a linear from which on cuBLASLt takes 4 to 14 % less time than our kernel of few rows (H200)."""


def linear(lib: CudaLibrary, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[..., K] times weight[N, K] -> [..., N]: of up to 16 rows ours, of more torch's."""
    rows = _few_rows(x, weight)
    if rows is None:
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    _launch_linear(lib, "linear", out, rows, weight, bias)
    return out


def linear_act_mul(lib: CudaLibrary, x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """act(gate) * up of a joined product with weight [2I, K] -> [..., I]; of more rows torch's product, then ours."""
    rows = _few_rows(x, weight)
    if rows is None:
        return linear_then_act_mul(lib, x, weight, bias, act)
    out = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
    _launch_linear(lib, "linear_act_mul", out, rows, weight, bias, act=act)
    return out


def linear_then_act_mul(lib: CudaLibrary, x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """The same of any number of rows, in two launches."""
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return act_mul(lib, gate, up, act)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor | None:
    """x as [M, K] if the kernel takes it: few rows, each beginning at a multiple of 16 bytes."""
    if not 0 < x.numel() <= FEW_ROWS * x.shape[-1]:
        return None
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) % 8 or (rows.data_ptr() | weight.data_ptr()) % 16:
        return None
    return rows


def _launch_linear(
    lib: CudaLibrary, name: str, out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, **act: int
) -> None:
    lib.call(
        name, out, out=out, x=rows, weight=weight, bias=bias, x_stride=rows.stride(0), weight_stride=weight.stride(0),
        num_rows=rows.shape[0], num_out=out.shape[-1], num_in=rows.shape[1], dtype=DTYPES[out.dtype], **act,
    )  # fmt: skip


def _multiplies(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: int) -> bool:
    is_laid_out = weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.shape[1] % 8 == 0
    return x.dtype in HALF and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype) and is_laid_out


def _multiplies_wide(x: Tensor, weight: Tensor, *rest: object) -> bool:
    return _multiplies(x, weight, *rest) and weight.shape[0] >= WIDE


def _linear_by_torch(lib: CudaLibrary, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


FEW = {"reads_early": "weight", "max_rows": FEW_ROWS, "is_step": True}
IMPLEMENTATIONS = (
    native("linear", _linear_by_torch, _multiplies_wide, label="torch.linear", order=FIRST),
    Implementation("linear", "torch.linear", "cuda", F.linear, order=TORCH),
    native("linear", linear, _multiplies, **FEW),
    native("linear_act_mul", linear_then_act_mul, has_one_dtype, label="torch.linear, cuda.act_mul"),
    native("linear_act_mul", linear_act_mul, _multiplies, **FEW),
)
