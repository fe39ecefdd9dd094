"""Norms by csrc/cuda/norm.cu, with the residual's sum where it comes first."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline.compile.kernels.cuda.library import DTYPES, CudaLibrary, has_one_dtype, native
from fuseline.compile.kernels.triton.lines import Lines, lined

LAYER = -1  # the mode of a LayerNorm


def rms_norm(lib: CudaLibrary, x: Tensor, weight: Tensor | None, eps: float, mode: int) -> Tensor:
    return _norm(lib, x, None, weight, None, eps, mode)[0]


def add_rms_norm(
    lib: CudaLibrary, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, mode: int
) -> tuple[Tensor, Tensor | None]:
    return _norm(lib, x, residual, weight, None, eps, mode)


def layer_norm(lib: CudaLibrary, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _norm(lib, x, None, weight, bias, eps, LAYER)[0]


def add_layer_norm(
    lib: CudaLibrary, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    return _norm(lib, x, residual, weight, bias, eps, LAYER)


def _norm(
    lib: CudaLibrary, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    mode: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(norm, sum): any number of features, any layout that two strides tell; others are copied first."""
    other = x if residual is None else residual
    if x.is_contiguous() and other.is_contiguous():
        out, dim = torch.empty_like(x), x.shape[-1]
        lines = Lines(x.numel() // dim, 1, (dim, 0) * 3)
    else:
        x, other = lined(x, other)
        out = torch.empty_like(x)
        if len({t.stride() for t in (out, x, other)}) > 1:
            x, other = lined(out, x, other)[1:]
        lines = Lines.of(out, x, other)
    total = None if residual is None else torch.empty_like(out)
    if lines.num_lines:
        residual = None if residual is None else other
        out_outer, out_inner, x_outer, x_inner, residual_outer, residual_inner = lines.strides
        lib.call(
            "norm", out, out=out, total=total, x=x, residual=residual, weight=weight, bias=bias,
            num_lines=lines.num_lines, inner=lines.inner, out_outer=out_outer, out_inner=out_inner, x_outer=x_outer,
            x_inner=x_inner, residual_outer=residual_outer, residual_inner=residual_inner, dim=x.shape[-1], eps=eps,
            mode=mode, dtype=DTYPES[x.dtype],
        )  # fmt: skip
    return out, total


IMPLEMENTATIONS = (
    native("rms_norm", rms_norm, has_one_dtype, is_step=True),
    native("add_rms_norm", add_rms_norm, has_one_dtype, is_step=True),
    native("layer_norm", layer_norm, has_one_dtype, is_step=True),
    native("add_layer_norm", add_layer_norm, has_one_dtype, is_step=True),
)
