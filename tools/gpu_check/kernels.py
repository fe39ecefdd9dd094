"""Each kernel's share of the card's copy bandwidth or matrix rate, at the sizes of an 8B Llama and a Mixtral."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from table import Clock, Limits, Table, microseconds, share_of
from torch import Tensor

from fuseline.compile.kernels.triton import activation, attention, linear, matmul, norm, rope, sampling
from fuseline.compile.kernels.triton.experts import experts
from fuseline.compile.ops import codes

SILU = codes.UNARY["silu"]


@dataclass(frozen=True)
class Sizes:
    """Of what is measured; a trial without a card takes small ones."""

    tokens: int = 8192
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    decode: tuple[int, ...] = (1, 64, 256)
    context: int = 4096
    vocab: int = 128256
    rows: int = 256
    num_experts: int = 8
    copied: int = 1 << 30
    square: int = 8192


@dataclass(frozen=True)
class Case:
    """`moved` bytes, or 0 and `operations`, are what its limit is reckoned from."""

    name: str
    call: object
    moved: int = 0
    operations: int = 0
    goal: str = ""


def measure_limits(sizes: Sizes, device: str, clock: Clock, table: Table) -> Limits:
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * sizes.copied / clock(lambda: target.copy_(source))
    a, b = (torch.randn(sizes.square, sizes.square, device=device).bfloat16() for _ in range(2))
    rate = 2 * sizes.square**3 / clock(lambda: a @ b)
    table.add("copy, read and written", f"{bandwidth / 1e12:.2f} TB/s")
    table.add(f"bf16 product of {sizes.square}^3", f"{rate / 1e12:.0f} TFLOP/s")
    return Limits(bandwidth, rate)


def measure_kernels(sizes: Sizes, device: str, clock: Clock, limits: Limits, table: Table) -> None:
    make = Made(sizes, device)
    for cases in (_lines, _attention, _sampling, _linears, _experts, _invariant):
        for case in cases(sizes, make):
            seconds = clock(case.call)
            limit, needed = (
                (limits.bandwidth, case.moved) if case.moved else (limits.matrix_rate, case.operations)
            )  # fmt: skip
            of = "bandwidth" if case.moved else "matrix rate"
            table.add(case.name, microseconds(seconds), f"{share_of(limit, needed, seconds)} of {of}", case.goal)


@dataclass(frozen=True)
class Made:
    """Random tensors on the device."""

    sizes: Sizes
    device: str

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def ints(self, values: list[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)


def _lines(s: Sizes, make: Made) -> Iterator[Case]:
    x, weight = make(s.tokens, s.hidden), make(s.hidden)
    yield Case("add_rms_norm", lambda: norm.add_rms_norm(x, x, weight, 1e-5, 0), 4 * x.nbytes)
    joined = make(s.tokens, 2 * s.inner)
    gate, up = joined.split(s.inner, -1)
    yield Case("act_mul", lambda: activation.act_mul(gate, up, SILU), 3 * gate.numel() * 2)
    q, k = (
        make(1, s.tokens, s.heads, s.head_dim).transpose(1, 2),
        make(1, s.tokens, s.kv_heads, s.head_dim).transpose(1, 2),
    )
    caches = make(2, s.tokens // 16 + 1, s.kv_heads, 16, s.head_dim)
    tables, at = make(s.tokens, s.head_dim), make.ints(torch.arange(s.tokens), torch.int64)
    yield Case(
        "rope_cache", lambda: rope.rope_cache(*caches, q, k, k, tables, tables, at, at, s.head_dim, 0),
        2 * (q.nbytes + 2 * k.nbytes) + 2 * tables.nbytes,
    )  # fmt: skip


def _attention(s: Sizes, make: Made) -> Iterator[Case]:
    for num_seqs in s.decode:
        blocks = s.context // 16
        caches = make(2, num_seqs * blocks, s.kv_heads, 16, s.head_dim)
        table = make.ints(torch.randperm(num_seqs * blocks).reshape(num_seqs, blocks))
        q = make(1, s.heads, num_seqs, s.head_dim)
        args = (table, make.ints([s.context] * num_seqs), make.ints(torch.arange(num_seqs + 1)))
        yield _attend(f"attention, decode {num_seqs} x {s.context}", q, caches, args, moved=caches.nbytes, goal="85 %")
    caches = make(2, s.tokens // 16, s.kv_heads, 16, s.head_dim)
    q = make(1, s.tokens, s.heads, s.head_dim).transpose(1, 2)
    args = (make.ints(torch.arange(s.tokens // 16))[None], make.ints([s.tokens]), make.ints([0, s.tokens]))
    operations = 2 * s.tokens * s.tokens * s.heads * s.head_dim
    yield _attend(f"attention, prompt of {s.tokens}", q, caches, args, operations=operations, goal="60 %")


def _attend(name: str, q: Tensor, caches: Tensor, args: tuple, **needed: object) -> Case:
    out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])
    scale = q.shape[3] ** -0.5
    return Case(name, lambda: attention.paged_attention(out, q, *caches, *args, None, 0, scale, 0.0), **needed)


def _sampling(s: Sizes, make: Made) -> Iterator[Case]:
    logits = torch.randn(s.rows, s.vocab, device=make.device) * 3
    for name, settings in (
        ("greedy", (0.0, 0, 1.0)),
        ("temperature", (1.0, 0, 1.0)),
        ("top_k, top_p", (0.8, 50, 0.95)),
    ):
        args = sampling_arguments(logits, *settings)
        yield Case(
            f"sampling {s.rows} x {s.vocab}, {name}", lambda a=args: sampling.sample(*a), logits.nbytes, goal="60 us"
        )


def sampling_arguments(logits: Tensor, temperature: float, top_k: int, top_p: float, num_logprobs: int = -1) -> tuple:
    """Of sampling.sample, every row with the same settings, no lists."""
    count, device = logits.shape[0], logits.device

    def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    outputs = (ids(count), column(0.0), ids(count), ids(count, 0), column(0.0)[:, None][:, :0], column(0, torch.uint8))
    i64, empty = torch.int64, (ids(count + 1), ids(0))
    return (
        *outputs, logits, column(temperature), column(top_k, i64), column(top_p), column(0.0), column(1.0), column(0.0),
        column(0.0), torch.arange(count, device=device), ids(count), column(num_logprobs, i64), *empty, ids(count),
        *empty, column(0.0)[:0], *empty, *empty, None, 0,
    )  # fmt: skip


def _linears(s: Sizes, make: Made) -> Iterator[Case]:
    weight = make(2 * s.inner, s.hidden)
    for rows in (1, 16):
        x = make(rows, s.hidden)
        yield Case(f"linear of {rows} rows, ours", lambda x=x: linear.linear(x, weight), weight.nbytes)
        yield Case(f"linear of {rows} rows, torch", lambda x=x: F.linear(x, weight), weight.nbytes)
        yield Case(f"linear_act_mul of {rows} rows, ours", lambda x=x: linear.linear_act_mul(x, weight, None, SILU),
                   weight.nbytes)  # fmt: skip
        yield Case(f"linear_act_mul of {rows} rows, torch and ours", lambda x=x: _apart(x, weight), weight.nbytes)


def _apart(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, -1)
    return activation.act_mul(gate, up, SILU)


def _experts(s: Sizes, make: Made) -> Iterator[Case]:
    first, second = make(s.num_experts, 2 * s.inner, s.hidden), make(s.num_experts, s.hidden, s.inner)
    for tokens in (1, 64, s.tokens // 2):
        x, ids = make(tokens, s.hidden), torch.rand(tokens, s.num_experts).topk(2).indices
        used = first[0].nbytes * 3 // 2 * len(ids.unique())
        ids, scores = ids.to(make.device), make(tokens, 2)
        needed = {"moved": used} if tokens <= 64 else {"operations": 6 * 2 * tokens * s.hidden * s.inner}
        yield Case(
            f"experts, {tokens} tokens x 2 of {s.num_experts}",
            lambda x=x, i=ids, w=scores: experts(x, i, w, first, second, None, None, 0, False, 0.0, 0.0),
            **needed,
        )


def _invariant(s: Sizes, make: Made) -> Iterator[Case]:
    """What --batch-invariant costs, and tiles of the same kernel that are made for many rows."""
    for num_out, num_in in ((2 * s.inner, s.hidden), (s.hidden, s.inner)):
        weight = make(num_out, num_in)
        for rows in (1, 64, s.tokens):
            x, name = make(rows, num_in), f"linear, {rows} x {num_in} -> {num_out}"
            needed = {"moved": weight.nbytes} if rows <= 64 else {"operations": 2 * rows * num_out * num_in}
            yield Case(f"{name}, torch", lambda x=x, w=weight: F.linear(x, w), **needed)
            yield Case(f"{name}, invariant", lambda x=x, w=weight: matmul.matmul(x, w), **needed)
            for tile in matmul.TILES if rows > 64 else ():
                yield Case(f"{name}, tile {tile}", lambda x=x, w=weight, t=tile: matmul.matmul(x, w, tile=t), **needed)
    num_seqs, blocks = s.decode[-1], s.context // 16
    caches = make(2, num_seqs * blocks, s.kv_heads, 16, s.head_dim)
    table = make.ints(torch.randperm(num_seqs * blocks).reshape(num_seqs, blocks))
    q = make(1, s.heads, num_seqs, s.head_dim)
    out = q.new_empty(1, num_seqs, s.heads, s.head_dim)
    args = (table, make.ints([s.context] * num_seqs), make.ints(torch.arange(num_seqs + 1)), None, 0, 0.1, 0.0)
    yield Case(
        f"attention, decode {num_seqs} x {s.context}, invariant",
        lambda: attention.paged_attention(out, q, *caches, *args, is_one_kernel=True), moved=caches.nbytes,
    )  # fmt: skip
