"""Attention of sequences that compute one token, by csrc/cuda/attention*.cu; those of several are Triton's.

Legend: H query heads, K kv heads, T query tokens, S sequences, N blocks of B keys, D key and value dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fuseline.compile.kernels.cuda.library import BULK_ISAS, DTYPES, CudaLibrary, native
from fuseline.compile.kernels.registry import NATIVE, tunings
from fuseline.compile.kernels.triton.attention import PREFILL_TUNINGS, Tuning
from fuseline.compile.kernels.triton.attention import paged_attention as triton_attention
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.ops.rope import FP8

HEADS = 8  # query heads of a block
SPLIT = 256  # keys of the shortest split
GRID_TARGET = 1024  # blocks that fill a GPU: more workers a sequence are launched only below it
RUN = 4
"""Splits of 256 keys that the kernel of bulk copies merges first; a block computes one or so many at a time."""
MANY_RUNS = 1024
"""Runs, each for one kv head, from which on a block computes whole runs: eight for each of 132 multiprocessors."""
NO_WINDOW = (1 << 31) - 1


def decode_or_triton(lib: CudaLibrary, q: Tensor, *rest: object, **launch: object) -> Tensor:
    """The op: q[1, H, T, D] over caches [N, K, B, D] -> [1, T, H, D]. `tuning` of Triton's launch, others of ours."""
    out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])
    decode_or_triton_into(lib, out, q, *rest, **launch)
    return out


def decode_or_triton_into(
    lib: CudaLibrary, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *rest: object,
    tuning: Tuning | None = None, **launch: object,
) -> None:  # fmt: skip
    """The same to out[1, T, H, D]: a sequence's single token is ours in any step, so that its bits are the same."""
    args = (q, k_cache, v_cache, block_table, *rest)
    num_tokens, num_seqs = q.shape[2], block_table.shape[0]
    if num_tokens <= num_seqs or num_seqs > 1:
        decode_attention(lib, out, *args, **launch)
    if num_tokens > num_seqs:
        triton_attention(out, *args, prefill_from=2, tuning=tuning)


def decode_attention(
    lib: CudaLibrary, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start: Tensor, sinks: Tensor | None, window: int, scale: float, softcap: float,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *_: None, num_workers: int = 0,
    is_bulk: bool = False, run: int = 0,
) -> None:  # fmt: skip
    """out[1, T, H, D]; arguments as triton/attention.py has them. Of more tokens than sequences: only those that are
    their sequence's single one. `num_workers` shares the splits of a row (0: chosen), which changes no bit; with
    `is_bulk` they share those of all rows, of which a block computes `run`, 1 or RUN, at a time (0: chosen)."""
    _, num_heads, num_tokens, dim = q.shape
    num_seqs, kv_heads, block_size = seq_lens.shape[0], k_cache.shape[1], k_cache.shape[2]
    if num_tokens == 0:
        return
    q = _aligned(q)
    parts = kv_heads * -(-num_heads // kv_heads // HEADS)
    # The most splits of a row are a number of the model's; keys that fill a table's line may make fewer.
    most = min(max(8, 256 // parts), 64, -(-block_table.shape[1] * block_size // SPLIT))
    workspace = None
    if most > 1:
        size = min(num_tokens, num_seqs) * num_heads * most * (dim + 2)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    if is_bulk:
        num_runs = min(num_tokens, num_seqs) * parts * -(-most // RUN)
        run = run or (RUN if num_runs >= MANY_RUNS else 1) if dim <= 128 else 1
    elif not num_workers:
        num_workers = min(max(4, GRID_TARGET // (num_seqs * parts)), most)
    (_, out_token, out_head, _), (_, q_head, q_token, _) = out.stride(), q.stride()
    (k_block, k_head, k_token, _), (v_block, v_head, v_token, _) = k_cache.stride(), v_cache.stride()
    lib.call(
        "decode_attention", q, out=out, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table,
        seq_lens=seq_lens, query_start=query_start, sinks=sinks, k_scale=k_scale, v_scale=v_scale, workspace=workspace,
        num_tokens=num_tokens, num_seqs=num_seqs, num_heads=num_heads, num_kv_heads=kv_heads, dim=dim,
        num_splits=max(most, 1), num_workers=num_workers, run=run, out_token=out_token, out_head=out_head,
        q_head=q_head, q_token=q_token, k_block=k_block, k_head=k_head, k_token=k_token, v_block=v_block,
        v_head=v_head, v_token=v_token, table_stride=block_table.stride(0), block_shift=block_size.bit_length() - 1,
        window=window if window > 0 else NO_WINDOW, scale=scale, softcap=softcap, dtype=DTYPES[q.dtype],
        cache_dtype=DTYPES[k_cache.dtype],
    )  # fmt: skip


def supports_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int = 0, scale: float = 1.0, softcap: float = 0.0, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, slopes: Tensor | None = None, chunk: int = 0,
) -> bool:  # fmt: skip
    """Half precision, one size of heads, whole blocks of a power of two keys, up to sixteen query heads a kv head, no
    slopes and no chunks."""
    dim, block_size, group = q.shape[3], k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    if q.dtype not in (torch.bfloat16, torch.float16) or (sinks is not None and sinks.dtype != q.dtype):
        return False
    if slopes is not None or chunk:
        return False
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, *FP8):
        return False
    integers = {block_table.dtype, seq_lens.dtype, query_start.dtype} == {torch.int32}
    sizes = dim in (64, 128, 256) and k_cache.shape[3] == v_cache.shape[3] == dim and group <= 2 * HEADS
    is_laid_out = q.stride(3) == 1 and all(
        cache.stride(3) == 1 and all(stride % 8 == 0 for stride in cache.stride()[:3]) for cache in (k_cache, v_cache)
    )
    return integers and sizes and is_laid_out and block_size & (block_size - 1) == 0


def prefill_attention(
    lib: CudaLibrary, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor,
    query_start: Tensor, sinks: Tensor | None, window: int, scale: float, softcap: float, *_: None,
) -> None:  # fmt: skip
    """out[1, T, H, D] of sequences of several tokens; those of one are left alone."""
    _, num_heads, num_tokens, dim = q.shape
    q = _aligned(q)
    (_, out_token, out_head, _), (_, q_head, q_token, _) = out.stride(), q.stride()
    (k_block, k_head, k_token, _), (v_block, v_head, v_token, _) = k_cache.stride(), v_cache.stride()
    num_taken = torch.empty(1, dtype=torch.int32, device=q.device)
    lib.call(
        "prefill_attention", q, out=out, q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table,
        seq_lens=seq_lens, query_start=query_start, sinks=sinks, num_taken=num_taken, num_tokens=num_tokens,
        num_seqs=seq_lens.shape[0], num_heads=num_heads, num_kv_heads=k_cache.shape[1], dim=dim,
        num_blocks=k_cache.shape[0], out_token=out_token, out_head=out_head, q_head=q_head, q_token=q_token,
        k_block=k_block, k_head=k_head, k_token=k_token, v_block=v_block, v_head=v_head, v_token=v_token,
        table_stride=block_table.stride(0), block_shift=k_cache.shape[2].bit_length() - 1,
        window=window if window > 0 else NO_WINDOW, scale=scale, dtype=DTYPES[q.dtype],
    )  # fmt: skip


def _aligned(q: Tensor) -> Tensor:
    """q[1, H, T, D] with lines at multiples of 16 bytes."""
    if (q.stride(1) | q.stride(2)) % 8 == 0 and q.data_ptr() % 16 == 0:
        return q
    return q.clone(memory_format=torch.contiguous_format)


def supports_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, query_start: Tensor,
    sinks: Tensor | None, window: int, scale: float, softcap: float, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None, *biases: object,
) -> bool:  # fmt: skip
    """What the decode kernel takes, with caches of the queries' dtype, heads of 64 or 128, blocks of 8 keys or more,
    and no soft-cap."""
    args = (q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, k_scale, v_scale)
    has_scales = k_scale is not None or v_scale is not None
    is_plain = k_cache.dtype == q.dtype and softcap == 0.0 and scale > 0.0 and not has_scales
    return is_plain and q.shape[3] <= 128 and k_cache.shape[2] >= 8 and supports_attention(*args, *biases)


def decode_or_prefill(lib: CudaLibrary, q: Tensor, *rest: object) -> Tensor:
    """The op: q[1, H, T, D] over caches [N, K, B, D] -> [1, T, H, D]."""
    out = q.new_empty(1, q.shape[2], q.shape[1], q.shape[3])
    decode_or_prefill_into(lib, out, q, *rest)
    return out


def decode_or_prefill_into(
    lib: CudaLibrary, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *rest: object
) -> None:
    """The same to out[1, T, H, D]."""
    args = (q, k_cache, v_cache, block_table, *rest)
    num_tokens, num_seqs = q.shape[2], block_table.shape[0]
    if num_tokens <= num_seqs or num_seqs > 1:
        decode_attention(lib, out, *args, is_bulk=True)
    if num_tokens > num_seqs:
        prefill_attention(lib, out, *args)


def supports_bulk(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor | None) -> bool:
    """The same, where the keys of a block lie one behind the other, at multiples of 16 bytes."""
    is_laid_out = all(
        cache.stride(2) == cache.shape[3] and all(s * cache.itemsize % 16 == 0 for s in cache.stride()[:3])
        for cache in (k_cache, v_cache)
    )
    return supports_attention(q, k_cache, v_cache, *rest) and is_laid_out


def supports_bulk_and_prefill(*args: object) -> bool:
    """What both kernels take."""
    return supports_prefill(*args) and supports_bulk(*args)


MIXED, BULK_MIXED = (f"cuda.{decode}_attention, triton.paged_attention" for decode in ("decode", "bulk"))
OURS = "cuda.bulk_attention, cuda.prefill_attention"
BULK, BULK_INTO = partial(decode_or_triton, is_bulk=True), partial(decode_or_triton_into, is_bulk=True)
# Of steps with prompts a candidate gives a sequence's single token the bits of the default in a step without.
IMPLEMENTATIONS = (
    native(
        "paged_attention", BULK, supports_bulk, label="cuda.bulk_attention", phases=(DECODE,), into=BULK_INTO,
        tunings=tunings("run", (1, RUN), "r"), order=NATIVE - 1, isas=BULK_ISAS,
    ),
    native(
        "paged_attention", BULK, supports_bulk, label=BULK_MIXED, phases=(PREFILL,), into=BULK_INTO,
        tunings=tunings("tuning", PREFILL_TUNINGS), order=NATIVE - 1, isas=BULK_ISAS,
        hides=(MIXED, "triton.paged_attention"),
    ),
    native(
        "paged_attention", decode_or_prefill, supports_bulk_and_prefill, label=OURS, phases=(PREFILL,),
        order=NATIVE - 2, into=decode_or_prefill_into, isas=("sm_90",),
    ),
    native(
        "paged_attention", decode_or_triton, supports_attention, label="cuda.decode_attention", phases=(DECODE,),
        into=decode_or_triton_into,
    ),
    native(
        "paged_attention", decode_or_triton, supports_attention, label=MIXED, phases=(PREFILL,),
        into=decode_or_triton_into, tunings=tunings("tuning", PREFILL_TUNINGS), hides=("triton.paged_attention",),
    ),
)  # fmt: skip
