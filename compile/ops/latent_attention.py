"""Attention over a paged cache of latents: a token's value is the beginning of its key (DeepSeek's MLA, absorbed).

Legend: H query heads, K kv heads, T query tokens, D key dim, E value dim (E <= D), S sequences, M table columns, N
blocks of B keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fuseline.compile.ops import codes
from fuseline.compile.ops.attention import attention_size, batch_of, paged_attention
from fuseline.compile.ops.attention_batch import AttentionLayer
from fuseline.compile.ops.library import ROWS, CallShape, Make, ModelShape, StepSize, Workload, batch_invariant, op
from fuseline.compile.ops.rope import from_int8, make_heads, rope, store_rows, tables


def latent_sizes(shape: ModelShape) -> tuple[int, int]:
    """(rank, rotated dim) as DeepSeek has them: 512 and 64 for heads of 128."""
    return 4 * shape.head_dim, shape.head_dim // 2


def latent_slots(make: Make, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """A cache of 1,024 tokens, or of as many as a step has, and slots there."""
    cache = make.fill(max(64, -(-tokens // 16)), 1, 16, width)
    return cache, make.order(cache.shape[0] * 16)[:tokens]


def write_latent_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    width = sum(latent_sizes(shape))
    for tokens in make.tokens:
        cache, slots = latent_slots(make, tokens, width)
        moved = 2 * tokens * width * make.dtype.itemsize
        yield Workload(f"{tokens} x {width}", (cache, make.fill(1, 1, tokens, width), slots), num_bytes=moved)


def write_latent_inputs(make: Make) -> Iterator[tuple]:
    """The second token has no slot."""
    slots = make.order(6 * 16)[:5]
    slots[1] = -1
    yield make.normal(6, 1, 16, 24), make.normal(1, 1, 5, 24), slots


@op(
    writes=("latent_cache",),
    fake=lambda *_: None,
    inputs=write_latent_inputs,
    tolerance=0.0,
    workloads=write_latent_workloads,
    sums=False,
    calls=CallShape(lambda latent_cache, k, *_: (ROWS, k.shape[2]), make_heads),
    written=lambda latent_cache, k, *_: (k,),
)
def write_latent(latent_cache: Tensor, k: Tensor, slots: Tensor, latent_scale: Tensor | None = None) -> None:
    """Writes k[1, K, T, D] to slot = block * block_size + offset of a cache [N, K, B, D]; slot -1 writes nothing.

    Caches of fp8 and int8 as write_cache has them.
    """
    store_rows(latent_cache, k, slots, latent_scale)


def rope_latent_inputs(make: Make) -> Iterator[tuple]:
    """Every layout, with tables as wide as the rotary dim and half of it; the second token has no slot."""
    half, pairs, split = codes.ROPE_HALF, codes.ROPE_INTERLEAVED, codes.ROPE_SPLIT
    for layout, columns in ((half, 8), (half, 4), (pairs, 8), (split, 8), (split, 4)):
        q_nope, q_pe = make.normal(1, 5, 4, 32).transpose(1, 2).split((24, 8), -1)
        latent, k_pe = make.normal(1, 1, 5, 32).split((24, 8), -1)
        slots = make.order(6 * 16)[:5]
        slots[1] = -1
        turning = *tables(make, 8, columns), make.ids(40, 5)
        yield make.normal(6, 1, 16, 32), q_nope, q_pe, latent, k_pe, *turning, slots, 8, layout


def rope_latent_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    rank, pe_dim = latent_sizes(shape)
    for tokens in make.tokens:
        new = [
            make.fill(1, tokens, heads, dim).transpose(1, 2)
            for heads in (shape.num_heads, 1) for dim in (rank, pe_dim)
        ]  # fmt: skip
        cache, slots = latent_slots(make, tokens, rank + pe_dim)
        turning = make.fill(2048, pe_dim), make.fill(2048, pe_dim), make.ids(2048, tokens)
        moved = 2 * sum(one.numel() for one in new) * make.dtype.itemsize
        args = (cache, *new, *turning, slots, pe_dim, codes.ROPE_SPLIT)
        yield Workload(f"{tokens} x {shape.num_heads} + 1 heads", args, num_bytes=moved)


@op(
    writes=("latent_cache",),
    fake=lambda latent_cache, q_nope, q_pe, *_: q_nope.new_empty(*q_nope.shape[:3], q_nope.shape[3] + q_pe.shape[3]),
    inputs=rope_latent_inputs,
    tolerance=0.0,
    workloads=rope_latent_workloads,
    weights=("cos", "sin"),
    sums=False,
    calls=CallShape(lambda latent_cache, q_nope, *_: (ROWS, q_nope.shape[2]), make_heads),
    written=lambda latent_cache, q_nope, q_pe, latent, k_pe, cos, sin, rows, slots, rotary_dim, layout, *_: (
        torch.cat((latent, rope(k_pe, cos, sin, rows, rotary_dim, layout)), -1),
    ),
)
def rope_latent(
    latent_cache: Tensor, q_nope: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor,
    rows: Tensor, slots: Tensor, rotary_dim: int, layout: int, latent_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotates q_pe[1, H, T, P] and k_pe[1, K, T, P], and returns q_nope[1, H, T, R] with the one behind it.

    latent[1, K, T, R] with the other behind it goes to the cache as write_latent writes it.
    """
    turning = (cos, sin, rows, rotary_dim, layout)
    write_latent(latent_cache, torch.cat((latent, rope(k_pe, *turning)), -1), slots, latent_scale)
    return torch.cat((q_nope, rope(q_pe, *turning)), -1)


def latent_attention_inputs(make: Make) -> Iterator[tuple]:
    """As of paged_attention: prompts, a continued one, single tokens; few and many heads; a value as long as a key."""
    seq_lens, block_size = [7, 90, 19], 16
    prompts, decode = [7, 5, 1], [1, 1, 1]
    for new, heads, key_dim, value_dim in ((prompts, 4, 40, 32), (prompts, 20, 88, 64), (decode, 16, 72, 50),
                                           (decode, 2, 24, 24)):  # fmt: skip
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()])
        cache = make.normal(18, 1, block_size, key_dim)
        table = make.order(18).reshape(3, 6).int()
        query, sinks = make.normal(1, heads, sum(new), key_dim), make.normal(heads)
        for sink, window, softcap in ((None, 0, 0.0), (sinks, 6, 0.0), (None, 0, 30.0)):
            lengths = torch.tensor(seq_lens).int()
            yield query, cache, table, lengths, starts.int(), sink, value_dim, window, 0.1, softcap


def latent_attention_workloads(make: Make, shape: ModelShape) -> Iterator[Workload]:
    """Single tokens, then a prompt; blocks are scattered over the cache."""
    block_size, value_dim, key_dim = 16, latent_sizes(shape)[0], sum(latent_sizes(shape))
    for sequences, tokens, keys in ((1, 1, 4096), (16, 1, 256), (1, 128, 128)):
        blocks = keys // block_size
        cache = make.fill(sequences * blocks, 1, block_size, key_dim)
        table = make.order(sequences * blocks).reshape(sequences, blocks).int()
        starts = (torch.arange(sequences + 1, device=make.device) * tokens).int()
        lengths = torch.full((sequences,), keys, device=make.device).int()
        query = make.fill(1, shape.num_heads, sequences * tokens, key_dim)
        seen = keys if tokens == 1 else (keys + 1) / 2
        yield Workload(
            f"{sequences} x {tokens} of {keys} keys",
            (query, cache, table, lengths, starts, None, value_dim, 0, key_dim**-0.5, 0.0),
            flops=int(2 * shape.num_heads * sequences * tokens * seen * (key_dim + value_dim)),
        )


def latent_size(q: Tensor, latent_cache: Tensor, block_table: Tensor, *_: object) -> tuple[str, int]:
    """(phase, tokens), as of paged_attention."""
    return attention_size(q, latent_cache, latent_cache, block_table)


def _layer_of(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, sinks: Tensor | None,
    value_dim: int, window: int, scale: float, softcap: float, latent_scale: Tensor | None = None,
) -> AttentionLayer:  # fmt: skip
    values = latent_cache[..., :value_dim]
    rest = (block_table, seq_lens, query_start, sinks, window, scale, softcap, latent_scale)
    return AttentionLayer.of(q, latent_cache, values, *rest)


def make_latents(inputs: Mapping[str, Tensor], fixed: Mapping[str, object], step: StepSize) -> dict[str, Tensor]:
    """A prompt, or sequences of one token, as of paged_attention."""
    known = {**inputs, **fixed}
    names = paged_latent_attention.op.arguments
    layer = _layer_of(*(known[name] for name in names if name in known))
    query, cache, _, *batch = batch_of(layer, step)[:6]
    return {name: arg for name, arg in zip(names, (query, cache, *batch), strict=False) if name in inputs}


def describe_latents(names: Iterable[str], args: Iterable[object], weights: Iterable[bool]) -> str:
    return f"{_layer_of(*args)} of latents"


@op(
    fake=lambda q, latent_cache, block_table, seq_lens, query_start, sinks, value_dim, *_: q.new_empty(
        q.shape[0], q.shape[2], q.shape[1], value_dim
    ),
    inputs=latent_attention_inputs,
    tolerance=8.0,
    half_tolerance=2.0,
    workloads=latent_attention_workloads,
    invariant="paged_latent_attention_invariant",
    calls=CallShape(latent_size, make_latents, describe_latents),
)
def paged_latent_attention(
    q: Tensor, latent_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor, sinks: Tensor | None,
    value_dim: int, window: int, scale: float, softcap: float, latent_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q[1, H, T, D] of several sequences over a cache [N, K, B, D] -> [1, T, H, value_dim].

    A token's value is the first `value_dim` numbers of its key. Caches of fp8 and int8 as paged_attention has them.
    """
    if latent_cache.dtype == torch.int8:
        latent_cache = from_int8(latent_cache)
    values = latent_cache[..., :value_dim]
    scales = (latent_scale, latent_scale)
    rest = (block_table, seq_lens, query_start, sinks, window, scale, softcap)
    return paged_attention(q, latent_cache, values, *rest, *scales)


paged_latent_attention_invariant = batch_invariant(paged_latent_attention)
