"""Each kernel's share of the GPU's copy bandwidth or matrix rate, at the sizes of an 8B Llama and a Mixtral."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from fuseline.compile.kernels.registry import Implementation, OpCall
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.kernels.triton import attention, matmul, sampling
from fuseline.compile.ops import codes
from fuseline.compile.ops.attention_batch import AttentionLayer, make_batch
from fuseline.compile.ops.library import DECODE, PREFILL, ROWS, Make, ModelShape, moved_bytes
from fuseline.compile.ops.registry import registry
from fuseline.compile.target import Target
from fuseline.compile.tuning import limits as machine
from fuseline.compile.tuning.clock import Clock
from fuseline.compile.tuning.limits import Limits
from gpu_check.table import Table, microseconds, share_of

TABLE = "block_table_0"
BALANCED = 128
"""Rows up to which reading the weights of a product is reckoned to take longer than multiplying."""
FEW_ROWS = 16
"""The same of quantized weights, whose bytes are fewer."""
SILU = codes.UNARY["silu"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured model; trials without a GPU use small ones."""

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
    short_context: int = 512
    product_rows: tuple[int, ...] = (1, 4, 16, 64, 256, 2048)


@dataclass(frozen=True)
class Case:
    """The limit is derived from the bytes `moved`, or, if that is 0, from `operations`."""

    name: str
    call: object
    moved: int = 0
    operations: int = 0
    goal: str = ""
    is_tuning: bool = False


def measure_limits(sizes: Sizes, device: str, clock: Clock, table: Table) -> Limits:
    limits = machine.measure_limits(clock, device, torch.bfloat16, sizes.copied, sizes.square)
    table.add("copy, read and written", f"{limits.bandwidth / 1e12:.2f} TB/s")
    table.add(f"bf16 product of {sizes.square}^3", f"{limits.matrix_rate / 1e12:.0f} TFLOP/s")
    return limits


def measure_kernels(sizes: Sizes, target: Target, clock: Clock, limits: Limits, table: Table) -> None:
    make = Made(sizes, target.device)
    # Default candidates first; the other launches of our kernels take longest and matter least.
    chosen = [*_attention(sizes, target), *_linears(sizes, make, target), *_experts(sizes, make, target)]
    chosen += [*_coded(sizes, target), *_invariant(sizes, make)]
    chosen.sort(key=lambda case: case.is_tuning)
    measure_cases(chain(_lines(sizes, target), _sampling(sizes, make), chosen), clock, limits, table)


def measure_cases(cases: Iterable[Case], clock: Clock, limits: Limits, table: Table) -> None:
    """Measures all cases; a failing one is marked in the table and the next one runs. Raises RuntimeError at the end,
    unless only tunings failed.
    """
    failed = []
    for case in cases:
        limit, needed = (limits.bandwidth, case.moved) if case.moved else (limits.matrix_rate, case.operations)
        try:
            seconds = clock(case.call)
        except Exception as error:
            table.add(case.name, f"FAILED: {type(error).__name__}: {str(error)[:100]}")
            failed += [] if case.is_tuning else [case.name]
            continue
        of = "bandwidth" if case.moved else "matrix rate"
        table.add(case.name, microseconds(seconds), f"{share_of(limit, needed, seconds)} of {of}", case.goal)
    if failed:
        raise RuntimeError(f"{len(failed)} failed: {', '.join(failed)}")


def candidates(op: str, args: tuple, kernels: Kernels, **inputs: str) -> list[Implementation]:
    """Kernels for an op with these arguments; `inputs`: names of the graph's inputs that arguments are."""
    return kernels.candidates(OpCall(registry()[op].target, args, kernels.target, inputs))


def cases_of(
    name: str, found: list[Implementation], args: tuple, phase: str = ROWS, **needed: object
) -> Iterator[Case]:
    """One for each candidate; a tuning of ours stands behind the kernel's name."""
    for candidate in found:
        if phase in candidate.phases:
            kernel, _, tuning = candidate.label.partition(" ")
            is_tuning = bool(tuning) and kernel.startswith("triton.")
            yield Case(f"{name}, {candidate.label}", partial(candidate.run, *args), is_tuning=is_tuning, **needed)


@dataclass(frozen=True)
class Made:
    """Random tensors on the device."""

    sizes: Sizes
    device: str

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def ints(self, values: list[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)


def _lines(s: Sizes, target: Target) -> Iterator[Case]:
    """Every op that works row by row, on its declared workloads: each kernel that computes it, without tunings."""
    make = Make(torch.bfloat16, torch.Generator().manual_seed(0), (1, s.tokens), target.device)
    shape = ModelShape(s.hidden, s.inner, s.heads, s.kv_heads, s.head_dim, s.vocab, s.num_experts)
    kernels = Kernels(target, {})
    for op in registry().values():
        if op.workloads is None or op.is_product or op.reads_cache:
            continue
        for work in op.workloads(make, shape):
            found, moved = candidates(op.name, work.args, kernels), moved_bytes(op, work)
            cases = cases_of(f"{op.name}, {work.label}", found, work.args, moved=moved)
            yield from (case for case in cases if not case.is_tuning)


def _attention(s: Sizes, target: Target) -> Iterator[Case]:
    """Times calls only; host-side planning is done before."""
    half = torch.bfloat16
    layer = AttentionLayer(
        s.heads, s.kv_heads, s.head_dim, s.head_dim, 16, half, half, False, False, 0, s.head_dim**-0.5, 0.0
    )
    kernels = Kernels(target)
    steps = [(num_seqs, s.context) for num_seqs in s.decode]
    for num_seqs, context in (*steps, (s.decode[0], s.short_context), (s.decode[-1], s.short_context)):
        batch = make_batch(layer, [context] * num_seqs, [1] * num_seqs, target.device, TABLE, max_bytes=1 << 40)
        found = candidates("paged_attention", batch.args, kernels, block_table=TABLE)
        moved = sum(cache.nbytes for cache in batch.args[1:3])
        name = f"attention, decode {num_seqs} x {context}"
        yield from cases_of(name, found, batch.args, DECODE, moved=moved, goal="85 %")
    for num_seqs, tokens in ((1, s.tokens), (1, s.tokens // 4), (16, s.tokens // 16)):
        lengths = [tokens] * num_seqs
        batch = make_batch(layer, lengths, lengths, target.device, TABLE, max_bytes=1 << 40)
        found = candidates("paged_attention", batch.args, kernels, block_table=TABLE)
        kernels.prepare(batch.host)
        operations = 2 * num_seqs * tokens * tokens * s.heads * s.head_dim
        name = f"attention, {num_seqs} prompts of {tokens}" if num_seqs > 1 else f"attention, prompt of {tokens}"
        yield from cases_of(name, found, batch.args, PREFILL, operations=operations, goal="65 %")


def _sampling(s: Sizes, make: Made) -> Iterator[Case]:
    wide = torch.randn(s.rows, s.vocab, device=make.device) * 3
    for dtype, logits in (("bf16", wide.bfloat16()), ("fp32", wide)):
        for name, settings in (
            ("greedy", (0.0, 0, 1.0)),
            ("temperature", (1.0, 0, 1.0)),
            ("top_k, top_p", (0.8, 50, 0.95)),
        ):
            call = partial(sampling.sample, *sampling_arguments(logits, *settings))
            yield Case(f"sampling {s.rows} x {s.vocab} of {dtype}, {name}", call, logits.nbytes, goal="45 us")


def sampling_arguments(logits: Tensor, temperature: float, top_k: int, top_p: float, num_logprobs: int = -1) -> tuple:
    """Arguments of sampling.sample: every row with the same settings, without lists."""
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


def _linears(s: Sizes, make: Made, target: Target) -> Iterator[Case]:
    """Every linear of a layer and the logits: few rows, decode steps of many sequences, prompts."""
    kernels, widest = Kernels(target, {}), 2 * s.inner
    joined, attended = (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim
    shapes = ((joined, s.hidden), (s.hidden, attended), (s.hidden, s.inner), (widest, s.hidden), (s.vocab, s.hidden))
    products = [("linear", rows, *shape) for rows in s.product_rows for shape in shapes]
    products += [("linear_act_mul", rows, widest, s.hidden) for rows in (1, 4, 16)]
    for op, rows, num_out, num_in in products:
        weight = make(num_out, num_in)
        args = (make(rows, num_in), weight, None, SILU)[: len(registry()[op].arguments)]
        name = f"{op} of {rows} rows, {num_in} -> {num_out}"
        is_read = rows <= BALANCED
        needed = {"moved": weight.nbytes} if is_read else {"operations": 2 * rows * weight.numel()}
        yield from cases_of(name, candidates(op, args, kernels), args, goal="85 %" if is_read else "", **needed)


def _coded(s: Sizes, target: Target) -> Iterator[Case]:
    """The largest linear of a layer with quantized weights, of each layout that its op declares."""
    make = Make(torch.bfloat16, torch.Generator().manual_seed(0), s.product_rows, target.device)
    shape = ModelShape(s.hidden, s.inner, s.heads, s.kv_heads, s.head_dim, s.vocab, s.num_experts)
    kernels = Kernels(target)
    for name in ("linear_code_rows", "linear_fp8"):
        for work in registry()[name].workloads(make, shape):
            stored = sum(part.nbytes for part in work.args[1:] if isinstance(part, Tensor))
            rows = work.args[0].shape[1]
            needed = {"moved": stored} if rows <= FEW_ROWS else {"operations": work.flops}
            yield from cases_of(f"{name}, {work.label}", candidates(name, work.args, kernels), work.args, **needed)


def _experts(s: Sizes, make: Made, target: Target) -> Iterator[Case]:
    first, second = make(s.num_experts, 2 * s.inner, s.hidden), make(s.num_experts, s.hidden, s.inner)
    for tokens in (1, 64, s.tokens // 2):
        x, ids = make(tokens, s.hidden), torch.rand(tokens, s.num_experts).topk(2).indices
        used = first[0].nbytes * 3 // 2 * len(ids.unique())
        args = (x, ids.to(make.device), make(tokens, 2), first, second, None, None, 0, False, 0.0, 0.0)
        needed = {"moved": used} if tokens <= 64 else {"operations": 6 * 2 * tokens * s.hidden * s.inner}
        found = candidates("experts", args, Kernels(target, {}))
        yield from cases_of(f"experts, {tokens} tokens x 2 of {s.num_experts}", found, args, **needed)


def _invariant(s: Sizes, make: Made) -> Iterator[Case]:
    """The kernels of --batch-invariant, for their cost."""
    for num_out, num_in in ((2 * s.inner, s.hidden), (s.hidden, s.inner)):
        weight = make(num_out, num_in)
        for rows in (1, 64, s.tokens):
            x = make(rows, num_in)
            needed = {"moved": weight.nbytes} if rows <= 64 else {"operations": 2 * rows * num_out * num_in}
            yield Case(
                f"linear, {rows} x {num_in} -> {num_out}, invariant", partial(matmul.matmul, x, weight), **needed
            )
    num_seqs, blocks = s.decode[-1], s.context // 16
    caches = make(2, num_seqs * blocks, s.kv_heads, 16, s.head_dim)
    table = make.ints(torch.randperm(num_seqs * blocks).reshape(num_seqs, blocks))
    q = make(1, s.heads, num_seqs, s.head_dim)
    out = q.new_empty(1, num_seqs, s.heads, s.head_dim)
    args = (table, make.ints([s.context] * num_seqs), make.ints(torch.arange(num_seqs + 1)), None, 0, 0.1, 0.0)
    yield Case(
        f"attention, decode {num_seqs} x {s.context}, invariant",
        partial(attention.paged_attention, out, q, *caches, *args, prefill_from=1), moved=caches.nbytes,
    )  # fmt: skip
