"""Attention: dense as captured, and over the paged KV cache.

Legend: H query heads, K kv heads, T query tokens, L keys, D key dim, E value dim, S sequences, M table columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fuseline.compile.ops.attention_batch import AttentionLayer, make_batch
from fuseline.compile.ops.library import (
    DECODE,
    PREFILL,
    CallShape,
    Make,
    ModelShape,
    StepSize,
    Workload,
    batch_invariant,
    op,
)
from fuseline.compile.ops.rope import from_int8
from fuseline.compile.specs import SCALE_BYTES

CONTEXT = 1024
"""Keys of a sequence where kernels are measured in steps of one token each."""


@op(fake=lambda q, k, v, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: int, scale: float, window: int, softcap: float,
    causal: bool, slopes: Tensor | None = None, chunk: int = 0, relative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one dense sequence: q[1, H, T, D], k[1, K, T, D], v[1, K, T, E] -> [1, T, H, E]."""
    biases = None if relative is None else relative[0]
    out = attend(q[0], k[0], v[0], sinks, scale, window, softcap, causal, slopes, chunk, biases)
    return out.transpose(0, 1)[None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float, causal: bool,
    slopes: Tensor | None = None, chunk: int = 0, relative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q[H, T, D] over k[K, L, D], v[K, L, E], the queries at the last T of L positions -> [H, T, E].

    A query sees the last `window` keys, or those from the last multiple of `chunk` on (0: all). slopes[H] (float32)
    times the distance to a key, 0 or less, is added to its score (ALiBi), and relative[H, T, R] (float32) of the query
    to those of the keys at distances 0 .. R - 1. Computed in float32, or in float64 if the queries are float64.
    """
    heads, tokens, keys = q.shape[0], q.shape[1], k.shape[1]
    group = heads // k.shape[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).repeat_interleave(group, 0).transpose(1, 2) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    query_at = torch.arange(keys - tokens, keys)[:, None]
    key_at = torch.arange(keys)[None]
    if slopes is not None:
        scores = scores + slopes.to(wide)[:, None, None] * (key_at - query_at)
    if relative is not None:
        distance = query_at - key_at
        biases = relative.to(wide).gather(-1, distance.clamp(0, relative.shape[-1] - 1).expand(heads, -1, -1))
        scores = scores + biases * ((distance >= 0) & (distance < relative.shape[-1]))
    seen = key_at <= query_at if causal else torch.ones(tokens, keys, dtype=torch.bool)
    if window > 0:
        seen = seen & (key_at > query_at - window)
    if chunk > 0:
        seen = seen & (key_at >= query_at // chunk * chunk)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(heads, tokens, 1)), -1)
    weights = scores.softmax(-1)[..., :keys]
    return (weights @ v.to(wide).repeat_interleave(group, 0)).to(q.dtype)


def paged_attention_inputs(make: Make) -> Iterator[tuple]:
    """Three sequences over shuffled blocks: a prompt, a continued prompt and one token; then single tokens only."""
    seq_lens, block_size = [7, 40, 19], 16
    prompts, decode = [7, 5, 1], [1, 1, 1]
    for new, heads, kv_heads, key_dim, value_dim in (
        (prompts, 4, 2, 16, 16), (prompts, 4, 4, 24, 16), (decode, 8, 2, 64, 64),
    ):  # fmt: skip
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()])
        caches = make.normal(9, kv_heads, block_size, key_dim), make.normal(9, kv_heads, block_size, value_dim)
        table = make.order(9).reshape(3, 3).int()
        query = make.normal(1, heads, sum(new), key_dim)
        sinks = make.normal(heads)
        batch = query, *caches, table, torch.tensor(seq_lens).int(), starts.int()
        for sink, window, softcap in ((None, 0, 0.0), (sinks, 0, 0.0), (None, 6, 0.0), (None, 0, 30.0)):
            yield *batch, sink, window, 0.25, softcap
        slopes = 2.0 ** -torch.arange(1, heads + 1)
        for slope, chunk in ((slopes, 0), (None, 6), (slopes, 6)):
            yield *batch, None, 0, 0.25, 0.0, None, None, slope, chunk


def paged_attention_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Single tokens, then a prompt; blocks are scattered over the cache."""
    block_size, dim = 16, shape.head_dim
    for sequences, tokens, keys in ((1, 1, 256), (1, 1, 4096), (16, 1, 256), (1, 256, 256)):
        blocks = keys // block_size
        caches = (make.fill(sequences * blocks, shape.num_kv_heads, block_size, dim) for _ in "kv")
        table = make.order(sequences * blocks).reshape(sequences, blocks).int()
        starts = (torch.arange(sequences + 1, device=make.device) * tokens).int()
        lengths = torch.full((sequences,), keys, device=make.device).int()
        query = make.fill(1, shape.num_heads, sequences * tokens, dim)
        seen = keys if tokens == 1 else (keys + 1) / 2
        yield Workload(
            f"{sequences} x {tokens} of {keys} keys",
            (query, *caches, table, lengths, starts, None, 0, dim**-0.5, 0.0),
            flops=int(4 * shape.num_heads * sequences * tokens * seen * dim),
        )


def gather_rows_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    for rows in make.tokens[1:]:
        width = shape.hidden_size
        moved = 2 * rows * width * make.dtype.itemsize
        yield Workload(f"{rows} x {width} of 2048", (make.fill(2048, width), make.ids(2048, rows)), num_bytes=moved)


def attention_size(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *_: object) -> tuple[str, int]:
    """(phase, tokens) of q[1, H, T, D], block_table[S, M]; as many sequences as tokens is a step of one token each."""
    num_tokens = q.shape[2]
    return (DECODE if num_tokens <= block_table.shape[0] else PREFILL), num_tokens


def make_attention(inputs: Mapping[str, Tensor], fixed: Mapping[str, object], step: StepSize) -> dict[str, Tensor]:
    """A prompt, or sequences of one token; their keys are as many as are not found in a cache."""
    known = {**inputs, **fixed}
    layer = AttentionLayer.of(*(known[name] for name in paged_attention.op.arguments if name in known))
    args = batch_of(layer, step)
    return {name: arg for name, arg in zip(paged_attention.op.arguments, args, strict=False) if name in inputs}


def batch_of(layer: AttentionLayer, step: StepSize) -> tuple:
    """Arguments of paged_attention for a step of that size."""
    is_prompt = step.phase == PREFILL
    lengths, counts = ([step.rows], [step.rows]) if is_prompt else ([CONTEXT] * step.rows, [1] * step.rows)
    return make_batch(layer, lengths, counts, str(step.device)).args


def describe_attention(names: Iterable[str], args: Iterable[object], weights: Iterable[bool]) -> str:
    return str(AttentionLayer.of(*args))


@op(
    fake=lambda q, k_cache, v_cache, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], value_dim(v_cache)),
    inputs=paged_attention_inputs,
    tolerance=6.0,
    workloads=paged_attention_workloads,
    invariant="paged_attention_invariant",
    calls=CallShape(attention_size, make_attention, describe_attention),
)
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int, scale: float, softcap: float, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, slopes: Tensor | None = None, chunk: int = 0,
) -> Tensor:  # fmt: skip
    """q[1, H, T, D] of several sequences over caches [N, K, B, D|E] -> [1, T, H, E].

    `attend` defines window, chunk and slopes. An fp8 cache stores values divided by k_scale[1] and v_scale[1]
    (float32; None: 1), an int8 cache those divided by a scale behind each token's (write_cache).
    """
    batch = block_table, seq_lens, query_start
    return over_pages(q, k_cache, v_cache, *batch, sinks, window, scale, softcap, k_scale, v_scale, slopes, chunk)


def over_pages(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int, scale: float, softcap: float, k_scale: Tensor | None, v_scale: Tensor | None,
    slopes: Tensor | None = None, chunk: int = 0, relative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attend` for each sequence over its blocks."""
    out = q.new_empty(1, q.shape[2], q.shape[1], value_dim(v_cache))
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for s, length in enumerate(lengths):
        begin, end = starts[s], starts[s + 1]
        blocks = block_table[s, : -(-length // k_cache.shape[2])].long()
        k, v = (
            _values(cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length], scale_of)
            for cache, scale_of in ((k_cache, k_scale), (v_cache, v_scale))
        )
        biases = None if relative is None else relative[0, :, begin:end]
        seen = attend(q[0, :, begin:end], k, v, sinks, scale, window, softcap, True, slopes, chunk, biases)
        out[0, begin:end] = seen.transpose(0, 1)
    return out


def value_dim(v_cache: Tensor) -> int:
    """Numbers of a token and head in a cache of values."""
    return v_cache.shape[3] - (SCALE_BYTES if v_cache.dtype == torch.int8 else 0)


def _values(stored: Tensor, scale: Tensor | None) -> Tensor:
    if stored.dtype == torch.int8:
        return from_int8(stored)
    return stored if scale is None else stored.float() * scale


paged_attention_invariant = batch_invariant(paged_attention)


@op(
    fake=lambda x, rows: x.new_empty(rows.shape[0], x.shape[1]),
    inputs=lambda make: [(make.normal(9, 33), make.ids(9, 4))],
    tolerance=0.0,
    workloads=gather_rows_workloads,
    sums=False,
    picks_rows=True,
)
def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[T, D] -> the rows x[rows[R]]."""
    return x[rows]
