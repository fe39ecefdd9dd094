"""Which kernel of csrc/cuda computes a graph op, a line a kernel; the counterpart of triton/table.py.

`run` takes the library and the op's arguments; what its kernel does not take of them goes on to torch's or Triton's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuseline.compile.kernels.cuda_library import DTYPES, CudaLibrary, address
from fuseline.compile.kernels.native_cuda_attention import (
    decode_or_triton,
    decode_or_triton_into,
    supports_attention,
)
from fuseline.compile.kernels.triton.lines import Lines, lined
from fuseline.compile.ops.rope import FP8

OPS = torch.ops.fuseline
HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 16
LAYER = -1  # the mode of a LayerNorm


@dataclass(frozen=True)
class NativeCudaKernel:
    """`supports` sees the op's arguments, tensors perhaps on meta; what changes from step to step decides in run.
    `weight` is the place of an argument that the kernel may read early, if it is a constant (Overlap.WEIGHTS).
    """

    label: str
    run: Callable
    supports: Callable[..., bool]
    weight: int | None = None
    into: Callable | None = None
    """As `run`, but the result is written to a tensor that comes after the library."""


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
    _launch_linear(lib, "linear_act_mul", out, rows, weight, bias, act)
    return out


def linear_then_act_mul(lib: CudaLibrary, x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    """The same of any number of rows, in two launches."""
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return act_mul(lib, gate, up, act)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor | None:
    """x as [M, K] if the kernel takes it: few rows, lines that begin at multiples of 16 bytes."""
    if not 0 < x.numel() <= FEW_ROWS * x.shape[-1]:
        return None
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) % 8 or (rows.data_ptr() | weight.data_ptr()) % 16:
        return None
    return rows


def _launch_linear(
    lib: CudaLibrary, name: str, out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, *act: int
) -> None:
    lib.call(
        name, out, out.data_ptr(), rows.data_ptr(), weight.data_ptr(), address(bias), rows.stride(0), weight.stride(0),
        rows.shape[0], out.shape[-1], rows.shape[1], *act, DTYPES[out.dtype],
    )  # fmt: skip


def _multiplies(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: int) -> bool:
    lies_right = weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.shape[1] % 8 == 0
    return x.dtype in HALF and weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype) and lies_right


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
        lib.call(
            "norm", out, out.data_ptr(), address(total), x.data_ptr(), address(residual), address(weight),
            address(bias), lines.num_lines, lines.inner, *lines.strides, x.shape[-1], eps, mode, DTYPES[x.dtype],
        )  # fmt: skip
    return out, total


def _norms(x: Tensor, *rest: object) -> bool:
    """All of one dtype."""
    return x.dtype in DTYPES and all(t.dtype == x.dtype for t in rest if isinstance(t, Tensor))


def act_mul(lib: CudaLibrary, gate: Tensor, up: Tensor, act: int) -> Tensor:
    """act(gate) * up of one shape [..., I]; act(gate) is rounded to the dtype first."""
    out = torch.empty_like(gate)
    strides = [_line_stride(t) for t in (out, gate, up)]
    if None in strides:
        return act_mul(lib, gate.contiguous(), up.contiguous(), act).view_as(gate)
    if out.numel():
        dim = gate.shape[-1]
        lib.call(
            "act_mul", out, out.data_ptr(), gate.data_ptr(), up.data_ptr(), out.numel() // dim, dim, *strides, act,
            DTYPES[out.dtype],
        )  # fmt: skip
    return out


def _line_stride(x: Tensor) -> int | None:
    """From line to line where one number tells; None where it takes more."""
    if x.stride(-1) != 1:
        return None
    if x.is_contiguous():
        return x.shape[-1]
    sizes = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    run_on = all(outer == size * inner for (_, outer), (size, inner) in zip(sizes, sizes[1:], strict=False))
    return (sizes[-1][1] if sizes else x.shape[-1]) if run_on else None


def rope(lib: CudaLibrary, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, rotary_dim: int, layout: int) -> Tensor:
    """x[1, H, T, D] with the first R of D rotated by lines rows[T] of cos and sin [P, C], C = R or R / 2."""
    out = torch.empty_like(x)
    if out.numel():
        lib.call(
            "rope", out, out.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows.data_ptr(), *x.shape[1:],
            *x.stride()[1:3], *out.stride()[1:3], cos.stride(0), rotary_dim, cos.shape[1], layout, DTYPES[x.dtype],
            DTYPES[cos.dtype],
        )  # fmt: skip
    return out


def write_cache(
    lib: CudaLibrary, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """k[1, K, T, D], v[1, K, T, E] to slots of caches [N, K, B, D|E]; fp8 ones hold them over k_scale, v_scale [1]."""
    _rope_cache(lib, None, None, k_cache, v_cache, k, v, (None, None, None), slots, (k_scale, v_scale), 0, 0)


def rope_cache(
    lib: CudaLibrary, k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    rows: Tensor, slots: Tensor, rotary_dim: int, layout: int, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotated q; rotated k and v go to the caches."""
    out = torch.empty_like(q)
    scales = (k_scale, v_scale)
    _rope_cache(lib, out, q, k_cache, v_cache, k, v, (cos, sin, rows), slots, scales, rotary_dim, layout)
    return out


def _rope_cache(
    lib: CudaLibrary, out: Tensor | None, q: Tensor | None, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor,
    tables: tuple, slots: Tensor, scales: tuple, rotary_dim: int, layout: int,
) -> None:  # fmt: skip
    if k.numel() == 0:
        return
    v = v if v.stride(3) == 1 else v.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    cos = tables[0]
    lib.call(
        "rope_cache", k, address(out), k_cache.data_ptr(), v_cache.data_ptr(), address(q), k.data_ptr(), v.data_ptr(),
        *map(address, tables), slots.data_ptr(), *map(address, scales), 0 if q is None else q.shape[1], *k.shape[1:],
        v.shape[3], *((0, 0) if q is None else q.stride()[1:3]), *k.stride()[1:3], *v.stride()[1:3],
        *((0, 0) if q is None else out.stride()[1:3]), *k_cache.stride()[:3], *v_cache.stride()[:3], k_cache.shape[2],
        0 if cos is None else cos.stride(0), rotary_dim, 0 if cos is None else cos.shape[1], layout, DTYPES[k.dtype],
        DTYPES[k.dtype if cos is None else cos.dtype], DTYPES[k_cache.dtype],
    )  # fmt: skip


def _rotates(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, *_: object) -> bool:
    """Tables are of x's dtype or wider."""
    dtypes = cos.dtype == sin.dtype and cos.dtype in (x.dtype, torch.float32) and rows.dtype == torch.int64
    return x.dtype in DTYPES and dtypes and x.stride(3) == 1 and cos.stride(1) == 1


def _keeps(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *_: object) -> bool:
    stored = (k.dtype, *FP8)
    lies_right = k_cache.stride(3) == 1 and v_cache.stride(3) == 1
    same = k_cache.dtype == v_cache.dtype and v.dtype == k.dtype and k_cache.dtype in stored
    return k.dtype in DTYPES and same and lies_right and slots.dtype == torch.int64


def _rotates_into_cache(
    k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Tensor,
    slots: Tensor, *_: object,
) -> bool:  # fmt: skip
    rotates = _rotates(q, cos, sin, rows) and _rotates(k, cos, sin, rows) and q.dtype == k.dtype
    return rotates and _keeps(k_cache, v_cache, k, v, slots)


KERNELS: dict[object, NativeCudaKernel] = {
    torch.ops.aten.linear.default: NativeCudaKernel("cuda.linear", linear, _multiplies, weight=1),
    OPS.linear_act_mul.default: NativeCudaKernel("cuda.linear_act_mul", linear_act_mul, _multiplies, weight=1),
    OPS.rms_norm.default: NativeCudaKernel("cuda.rms_norm", rms_norm, _norms),
    OPS.add_rms_norm.default: NativeCudaKernel("cuda.add_rms_norm", add_rms_norm, _norms),
    OPS.layer_norm.default: NativeCudaKernel("cuda.layer_norm", layer_norm, _norms),
    OPS.add_layer_norm.default: NativeCudaKernel("cuda.add_layer_norm", add_layer_norm, _norms),
    OPS.act_mul.default: NativeCudaKernel("cuda.act_mul", act_mul, _norms),
    OPS.rope.default: NativeCudaKernel("cuda.rope", rope, _rotates),
    OPS.write_cache.default: NativeCudaKernel("cuda.write_cache", write_cache, _keeps),
    OPS.rope_cache.default: NativeCudaKernel("cuda.rope_cache", rope_cache, _rotates_into_cache),
    OPS.paged_attention.default: NativeCudaKernel(
        "cuda.decode_attention", decode_or_triton, supports_attention, into=decode_or_triton_into
    ),
}
