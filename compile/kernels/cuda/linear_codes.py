"""Products of few rows with weights of codes by csrc/cuda/linear_codes.cu; of more rows they are Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline.compile.kernels.cuda.library import DTYPES, CudaLibrary, native
from fuseline.compile.kernels.triton import code_linear
from fuseline.compile.ops.linear_codes import EIGHT_BITS

HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 16


def linear_code_rows(
    lib: CudaLibrary, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None,
    order: Tensor | None, bias: Tensor | None, group: int, kind: int,
) -> Tensor:  # fmt: skip
    """x[..., K] times a weight of codes [N, W] -> [..., N]: of up to 16 rows ours, of more Triton's."""
    num_in = x.shape[-1]
    rows = (x if order is None else x.index_select(-1, order)).reshape(-1, num_in)
    is_laid_out = rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    if not 0 < rows.shape[0] <= FEW_ROWS or not is_laid_out:
        return code_linear.linear_code_rows(x, codes, scales, zeros, table, order, bias, group, kind)
    out = x.new_empty(*x.shape[:-1], codes.shape[0])
    lib.call(
        "linear_codes", out, out=out, x=rows, codes=codes, scales=scales, zeros=zeros, table=table, bias=bias,
        x_stride=rows.stride(0), code_stride=codes.stride(0) * 4, scale_stride=scales.stride(0),
        num_rows=rows.shape[0], num_out=codes.shape[0], num_in=num_in, group=group, num_groups=scales.shape[0],
        kind=kind, scale_dtype=DTYPES[scales.dtype], dtype=DTYPES[out.dtype],
    )  # fmt: skip
    return out


def _multiplies(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, order: Tensor | None,
    bias: Tensor | None, group: int, kind: int,
) -> bool:  # fmt: skip
    """Groups that end where the lanes of a matrix instruction do."""
    is_group = group % (64 if kind in EIGHT_BITS else 32) == 0
    is_bias = bias is None or bias.dtype == x.dtype
    return x.dtype in HALF and is_bias and is_group and x.shape[-1] % 8 == 0


IMPLEMENTATIONS = (
    native("linear_code_rows", linear_code_rows, _multiplies, reads_early="codes", max_rows=FEW_ROWS),
)  # fmt: skip
