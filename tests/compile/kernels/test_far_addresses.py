"""Tensors of more than 2^32 numbers, as caches, logits and weights of a GPU are: what lies at their end is found.

Their memory is reserved and never filled; only pages that are touched exist. The same kernels over small tensors say
what must come out, to the bit. Strides stay below 2^31, as real ones do: it is their products that a number of 32 bits
would not hold.
"""

from __future__ import annotations

import mmap
from functools import partial

import cuda_emulator
import pytest
import torch
import triton_interpreter
from cuda_attention_cases import Decode, Prompts
from native_sampling_cases import Result
from torch import Tensor
from triton_attention_cases import Batch

from fuseline.compile.kernels.cuda import activation as cuda_activation
from fuseline.compile.kernels.cuda import linear as cuda_linear
from fuseline.compile.kernels.cuda import linear_codes as cuda_codes
from fuseline.compile.kernels.cuda import norm as cuda_norm
from fuseline.compile.kernels.cuda import rope as cuda_rope
from fuseline.compile.kernels.triton import (
    activation,
    code_linear,
    experts,
    linear,
    matmul,
    norm,
    rope,
    route,
    rows,
    sampling,
)
from fuseline.compile.kernels.triton.blocks import copy_blocks
from fuseline.compile.ops import codes
from fuseline.compile.ops.code_rows import code_parts
from fuseline.compile.ops.coded import KINDS
from fuseline.compile.ops.library import Make

__all__ = ["triton_interpreter"]
MAP_NORESERVE = 0x4000  # of Linux; Python's mmap names it from 3.13 on
BLOCKS = (1 << 21) + 100
"""Blocks of a cache: 2^32 numbers at 2048 a block."""
SILU = codes.UNARY["silu"]
LINES, APART = 20, 1 << 28
"""Rows, and numbers from one to the next: 5 * 2^30 in all."""


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def apart(x: Tensor, stride: int = APART) -> Tensor:
    """x[R, ...] with `stride` numbers from one of R to the next."""
    inner = torch.empty(x.shape[1:], device="meta").stride()
    far = sparse((x.shape[0] - 1) * stride + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (stride, *inner))
    return far.copy_(x)


def at_the_end(cache: Tensor) -> Tensor:
    """A cache of BLOCKS blocks, the last of which are the given ones."""
    far = sparse(BLOCKS, *cache.shape[1:], dtype=cache.dtype)
    far[-cache.shape[0] :] = cache
    return far


def assert_same(found: object, want: object) -> None:
    for a, b in zip(*(x if isinstance(x, tuple | list) else (x,) for x in (found, want)), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("is_coded", (False, True), ids=("bf16", "fp8"))
@pytest.mark.parametrize(
    ("kind", "counts"), [(Batch, [1, 40, 3]), (Batch, [1, 1, 1]), (Decode, [1, 1, 1])], ids=("mixed", "decode", "cuda")
)
def test_attention(kind, counts, is_coded):
    dims = {"dim": 64} if kind is Decode else {"key_dim": 64, "value_dim": 64}
    batch = kind([90, 60, 300], counts=counts, dtype=torch.bfloat16, **dims)
    if is_coded:
        batch.k_cache, batch.v_cache = (x.nan_to_num().to(torch.float8_e4m3fn) for x in (batch.k_cache, batch.v_cache))
    assert_same_at_the_end(batch)


def test_attention_of_prompts():
    if cuda_emulator.ISA != "sm_90":
        pytest.skip("runs on a GPU that the kernel is not for")
    assert_same_at_the_end(Prompts([90, 60, 300], [40, 60, 3]))


def assert_same_at_the_end(batch: Batch) -> None:
    want = batch.run()
    batch.table += BLOCKS - batch.k_cache.shape[0]
    batch.k_cache, batch.v_cache = at_the_end(batch.k_cache), at_the_end(batch.v_cache)
    assert_same(batch.run(), want)


@pytest.mark.parametrize("of", (rope, cuda_rope), ids=("triton", "cuda"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float8_e4m3fn), ids=str)
def test_what_is_written_to_a_cache(of, dtype):
    call = partial(cuda_emulator.run, of.rope_cache) if of is cuda_rope else of.rope_cache
    m = make()
    small = [torch.zeros(6, 2, 16, 64, dtype=dtype) for _ in "kv"]
    far = [at_the_end(cache) for cache in small]
    q, k, v, table = m.normal(1, 4, 9, 64), m.normal(1, 2, 9, 64), m.normal(1, 2, 9, 64), m.normal(9, 64)
    slots = m.order(6 * 16)[:9]
    call(*small, q, k, v, table, table, torch.arange(9), slots, 64, 0)
    call(*far, q, k, v, table, table, torch.arange(9), slots + (BLOCKS - 6) * 16, 64, 0)
    for near, cache in zip(small, far, strict=True):
        assert near.float().any() and torch.equal(cache[-6:].view(torch.uint8), near.view(torch.uint8))


def test_blocks_that_are_copied():
    """Words of 8 bytes, so that caches are four times as large."""
    source = make().normal(3, 2, 16, 64)
    far, back = sparse(4 * BLOCKS, 2, 16, 64, dtype=torch.bfloat16), torch.zeros_like(source)
    last = torch.arange(4 * BLOCKS - 3, 4 * BLOCKS)
    copy_blocks(far, source, last, torch.arange(3))
    copy_blocks(back, far, torch.arange(3), last)
    assert torch.equal(back, source)


def test_logits():
    logits = Make(torch.float32, torch.Generator().manual_seed(1)).normal(4, 700)
    options = [{"temperature": 0.0}, {"seed": 5}, {"seed": 6, "top_k": 9, "num_logprobs": 3},
               {"seed": 7, "banned": (3,), "repetition": 1.5, "output": (9, 20)}]  # fmt: skip
    found, want = (Result(x, options, None, 0, 8, sampling.sample) for x in (apart(logits, 3 << 28), logits))
    for name in ("ok", "tokens", "logprobs", "ranks", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(found, name).nan_to_num(), getattr(want, name).nan_to_num()), name
    results = [
        (torch.empty(4), torch.empty(4, dtype=torch.int64), torch.empty(4, 2, dtype=torch.int64), torch.empty(4, 2))
        for _ in range(2)
    ]
    for outputs, x in zip(results, (apart(logits, 3 << 28), logits), strict=True):
        sampling.row_logprobs(*outputs, x, torch.tensor([3, 5, 7, 699]))
    assert_same(*results)


def make() -> Make:
    return Make(torch.bfloat16, torch.Generator().manual_seed(3))


def line(dim: int = 64) -> Tensor:
    return make().normal(LINES, dim)


def heads(x: Tensor) -> Tensor:
    """[T, H * 16] as [1, H, T, 16]."""
    return x.unflatten(-1, (-1, 16)).transpose(0, 1)[None]


TABLE, NTH = line(16), torch.arange(LINES)
SCALE = line()[0]


def coded(kind: str) -> tuple[Tensor, tuple]:
    """(words, other arguments behind them) of a weight of codes with LINES outputs."""
    words, *parts = code_parts(make(), kind, 64, LINES, 64)
    return words, (*parts, None, None, 64, KINDS[kind])


INT4, OF_INT4 = coded("int4")
INT8, OF_INT8 = coded("int8")
CUDA = {
    "rms_norm": (cuda_norm.add_rms_norm, line(), lambda x: (x, x, SCALE, 1e-5, 0)),
    "layer_norm": (cuda_norm.add_layer_norm, line(), lambda x: (x, x, SCALE, SCALE, 1e-5)),
    "act_mul": (cuda_activation.act_mul, line(), lambda x: (x[:, :32], x[:, 32:], SILU)),
    "rope": (cuda_rope.rope, line(), lambda x: (heads(x), TABLE, TABLE, NTH, 16, 0)),
    "linear of rows": (cuda_linear.linear, line()[:16], lambda x: (x, line())),
    "linear": (cuda_linear.linear, line(), lambda x: (line()[:2], x)),
    "linear_act_mul": (cuda_linear.linear_act_mul, line(), lambda x: (line()[:2], x, None, SILU)),
    "codes": (cuda_codes.linear_code_rows, INT4, lambda w: (line()[:2], w, *OF_INT4)),
    "codes of rows": (cuda_codes.linear_code_rows, line()[:16], lambda x: (x, INT8, *OF_INT8)),
}
TRITON = {
    "rms_norm": (norm.add_rms_norm, line(), lambda x: (x, x, SCALE, 1e-5, 0)),
    "layer_norm": (norm.add_layer_norm, line(), lambda x: (x, x, SCALE, SCALE, 1e-5)),
    "act_mul": (activation.act_mul, line(), lambda x: (x[:, :32], x[:, 32:], SILU)),
    "rope": (rope.rope, line(), lambda x: (heads(x), TABLE, TABLE, NTH, 16, 0)),
    "gather_rows": (rows.gather_rows, line(), lambda x: (x, torch.tensor([19, 3, 17]))),
    "route": (route.route_topk, line(), lambda x: (x, 3, 0, 1, torch.bfloat16)),
    "linear of rows": (linear.linear, line()[:16], lambda x: (x, line())),
    "linear": (linear.linear, line(), lambda x: (line()[:2], x)),
    "linear_act_mul": (linear.linear_act_mul, line(), lambda x: (line()[:2], x, None, SILU)),
    "matmul of rows": (matmul.matmul, line(), lambda x: (x, line())),
    "matmul": (matmul.matmul, line(), lambda x: (line(), x)),
    "codes of rows": (code_linear.linear_code_rows, line(), lambda x: (x, INT4, *OF_INT4)),
    "codes of 4 bits": (code_linear.linear_code_rows, INT4, lambda w: (line(), w, *OF_INT4)),
    "codes of 8 bits": (code_linear.linear_code_rows, INT8, lambda w: (line(), w, *OF_INT8)),
    "decoded codes": (code_linear.linear_decoded, INT8, lambda w: (line(), w, *OF_INT8)),
    "embedding": (
        code_linear.embedding_code_rows, INT4, lambda w: (NTH, w, *OF_INT4[:3], 64, 64, KINDS["int4"])
    ),
}  # fmt: skip
MIX = torch.stack([torch.tensor([0, LINES - 1]), torch.tensor([9, 17])]), torch.tensor([[0.5, 0.2], [0.3, 0.6]])
FIRST, SECOND = make().normal(LINES, 96, 64, scale=0.2), make().normal(LINES, 64, 48, scale=0.2)
PLAIN = (None, None, codes.EXPERT_ACTS["silu"], False, 0.0, 0.0)
TRITON |= {
    "experts of rows": (experts.experts, line(), lambda x: (x, NTH[:, None], x[:, :1], FIRST, SECOND, *PLAIN)),
    "experts, first": (experts.experts, FIRST, lambda w: (line()[:2], *MIX, w, SECOND, *PLAIN)),
    "experts, second": (experts.experts, SECOND, lambda w: (line()[:2], *MIX, FIRST, w, *PLAIN)),
}


@pytest.mark.parametrize("name", CUDA)
def test_rows_that_lie_far_apart_by_cuda(name):
    kernel, near, args = CUDA[name]
    assert_same(cuda_emulator.run(kernel, *args(apart(near))), cuda_emulator.run(kernel, *args(near)))


@pytest.mark.parametrize("name", TRITON)
def test_rows_that_lie_far_apart_by_triton(name):
    kernel, near, args = TRITON[name]
    assert_same(kernel(*args(apart(near))), kernel(*args(near)))
