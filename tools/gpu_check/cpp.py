"""The CUDA C++ kernels, at the sizes of the Triton kernels that they stand beside in the table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernels import SILU, Case, Made, Sizes, decode_arguments, line_cases

from fuseline.compile.kernels.cuda import activation as cuda_activation
from fuseline.compile.kernels.cuda import attention as cuda_attention
from fuseline.compile.kernels.cuda import linear as cuda_linear
from fuseline.compile.kernels.cuda import norm as cuda_norm
from fuseline.compile.kernels.cuda import rope as cuda_rope
from fuseline.compile.kernels.cuda.library import CudaLibrary


def cases(s: Sizes, make: Made, lib: CudaLibrary) -> Iterator[Case]:
    yield from _lines(s, make, lib)
    yield from _attention(s, make, lib)
    yield from _linears(s, make, lib)


def _lines(s: Sizes, make: Made, lib: CudaLibrary) -> Iterator[Case]:
    kernels = (cuda_norm.add_rms_norm, cuda_activation.act_mul, cuda_rope.rope_cache)
    runs = {kernel.__name__: partial(kernel, lib) for kernel in kernels}
    return line_cases(s, make.device, runs, (1, s.tokens), ", C++")


def _attention(s: Sizes, make: Made, lib: CudaLibrary) -> Iterator[Case]:
    for num_seqs in s.decode:
        q, caches, batch = decode_arguments(s, make, num_seqs)
        args = (q, *caches, *batch, None)
        if cuda_attention.supports_attention(*args):
            yield Case(
                f"attention, decode {num_seqs} x {s.context}, C++",
                lambda a=args: cuda_attention.decode_or_triton(lib, *a, 0, s.head_dim**-0.5, 0.0),
                caches.nbytes, goal="85 %",
            )  # fmt: skip


def _linears(s: Sizes, make: Made, lib: CudaLibrary) -> Iterator[Case]:
    """Every product of a layer for one row, the largest for more."""
    joined, attended = (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim
    products = [(1, joined, s.hidden), (1, s.hidden, attended), (1, s.hidden, s.inner)]
    products += [(rows, 2 * s.inner, s.hidden) for rows in (1, 8, 16)]
    for rows, num_out, num_in in products:
        x, weight = make(rows, num_in), make(num_out, num_in)
        yield Case(
            f"linear of {rows} rows, {num_in} -> {num_out}, C++",
            lambda x=x, w=weight: cuda_linear.linear(lib, x, w), weight.nbytes, goal="85 %",
        )  # fmt: skip
        yield Case(
            f"linear of {rows} rows, {num_in} -> {num_out}, torch",
            lambda x=x, w=weight: torch.nn.functional.linear(x, w), weight.nbytes,
        )  # fmt: skip
    weight = make(2 * s.inner, s.hidden)
    for rows in (1, 16):
        x = make(rows, s.hidden)
        yield Case(
            f"linear_act_mul of {rows} rows, C++",
            lambda x=x: cuda_linear.linear_act_mul(lib, x, weight, None, SILU), weight.nbytes, goal="85 %",
        )  # fmt: skip
