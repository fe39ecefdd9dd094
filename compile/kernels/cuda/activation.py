"""Gated activations by csrc/cuda/activation.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from fuseline.compile.kernels.cuda.library import DTYPES, CudaLibrary, has_one_dtype, native


def act_mul(lib: CudaLibrary, gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up of one shape [..., I]; act(gate) is rounded to the dtype first."""
    out = torch.empty_like(gate)
    strides = [_line_stride(t) for t in (out, gate, up)]
    if None in strides:
        return act_mul(lib, gate.contiguous(), up.contiguous(), act).view_as(gate)
    if out.numel():
        dim = gate.shape[-1]
        out_stride, gate_stride, up_stride = strides
        lib.call(
            "act_mul", out, out=out, gate=gate, up=up, num_lines=out.numel() // dim, dim=dim, out_stride=out_stride,
            gate_stride=gate_stride, up_stride=up_stride, act=act, dtype=DTYPES[out.dtype],
        )  # fmt: skip
    return out


def _line_stride(x: Tensor) -> int | None:
    """Elements from a row to the next; None where one number cannot say that."""
    if x.stride(-1) != 1:
        return None
    if x.is_contiguous():
        return x.shape[-1]
    sizes = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    run_on = all(outer == size * inner for (_, outer), (size, inner) in zip(sizes, sizes[1:], strict=False))
    return (sizes[-1][1] if sizes else x.shape[-1]) if run_on else None


IMPLEMENTATIONS = (native("act_mul", act_mul, has_one_dtype),)
