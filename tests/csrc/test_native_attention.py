"""paged_attention against a plain softmax, and the independence of a row from batch, chunking and threads."""

from __future__ import annotations

import pytest
import torch
from native_fixtures import FLOATS, isa, key_panels, ops, with_threads

__all__ = ["isa"]


class Cache:
    """Sequences of random keys and values, in a paged cache of shuffled blocks filled up with NaN."""

    def __init__(self, lengths, kv_heads=2, key_dim=32, value_dim=32, block_size=16, dtype=torch.float32, seed=0):
        gen = torch.Generator().manual_seed(seed)
        self.lengths, self.block_size = lengths, block_size
        self.keys = [torch.randn(kv_heads, n, key_dim, generator=gen).to(dtype) for n in lengths]
        self.values = [torch.randn(kv_heads, n, value_dim, generator=gen).to(dtype) for n in lengths]
        per_seq = [-(-n // block_size) for n in lengths]
        order = torch.randperm(sum(per_seq) + 3, generator=gen).to(torch.int32)
        nan = float("nan")
        self.k_cache = torch.full((sum(per_seq) + 3, kv_heads, block_size, key_dim), nan, dtype=dtype)
        self.v_cache = torch.full((sum(per_seq) + 3, kv_heads, block_size, value_dim), nan, dtype=dtype)
        self.table = torch.full((len(lengths), max(per_seq)), -1, dtype=torch.int32)
        for s, blocks in enumerate(order[: sum(per_seq)].split(per_seq)):
            self.table[s, : len(blocks)] = blocks
            for pos in range(lengths[s]):
                self.k_cache[blocks[pos // block_size], :, pos % block_size] = self.keys[s][:, pos]
                self.v_cache[blocks[pos // block_size], :, pos % block_size] = self.values[s][:, pos]
        self.k_cache = key_panels(self.k_cache)

    def attend(self, queries, seen=None, seqs=None, sinks=None, window=0, scale=0.2, softcap=0.0):
        """queries: one [H, n, D] a sequence, its last n tokens out of `seen`. Returns one [n, H, E] a sequence."""
        seqs = list(range(len(self.lengths))) if seqs is None else seqs
        seen = [self.lengths[s] for s in seqs] if seen is None else seen
        counts = [q.shape[1] for q in queries]
        q = torch.cat(queries, dim=1).transpose(0, 1).contiguous().transpose(0, 1)[None]
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        out = torch.full((1, sum(counts), q.shape[1], self.v_cache.shape[-1]), float("nan"), dtype=q.dtype)
        lens = torch.tensor(seen, dtype=torch.int32)
        ops.paged_attention(
            out, q, self.k_cache, self.v_cache, self.table[seqs], lens, starts, sinks, window, scale, softcap
        )
        return list(out[0].split(counts))

    def reference(self, s, query, seen, sinks=None, window=0, scale=0.2, softcap=0.0):
        heads, n, _ = query.shape
        group = heads // len(self.keys[s])
        k = self.keys[s][:, :seen].double().repeat_interleave(group, 0)
        v = self.values[s][:, :seen].double().repeat_interleave(group, 0)
        scores = query.double() @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows, cols = torch.arange(seen - n, seen)[:, None], torch.arange(seen)[None]
        hidden = (cols > rows) | ((cols <= rows - window) if window else False)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, n, 1)], -1)
        return (scores.softmax(-1)[..., :seen] @ v).transpose(0, 1)


def make_queries(counts, heads=6, key_dim=32, dtype=torch.float32):
    gen = torch.Generator().manual_seed(5)
    return [torch.randn(heads, n, key_dim, generator=gen).to(dtype) for n in counts]


def check(cache, queries, seen=None, tol=2e-6, **kwargs):
    seen = seen or cache.lengths
    for s, out in enumerate(cache.attend(queries, seen, **kwargs)):
        want = cache.reference(s, queries[s], seen[s], **kwargs)
        torch.testing.assert_close(out.double(), want, rtol=tol, atol=tol)


LENGTHS, COUNTS = [1, 130, 64, 200, 17, 65], [1, 130, 1, 37, 16, 2]


@pytest.mark.parametrize("block_size", (1, 5, 16, 128))
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (7, 1), (70, 1)])
def test_prefill_prefix_and_decode_in_one_batch(isa, block_size, heads, kv_heads):
    cache = Cache(LENGTHS, kv_heads, block_size=block_size)
    check(cache, make_queries(COUNTS, heads))


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 1), (40, 24), (64, 64), (80, 80), (96, 100), (192, 128), (256, 256)]
)
def test_head_sizes(isa, key_dim, value_dim):
    cache = Cache([90, 33], 2, key_dim, value_dim)
    check(cache, make_queries([20, 1], key_dim=key_dim), scale=key_dim**-0.5)


@pytest.mark.parametrize("window", (1, 7, 64, 100))
@pytest.mark.parametrize("softcap", (0.0, 3.0))
@pytest.mark.parametrize("has_sinks", (False, True))
def test_window_softcap_and_sinks(isa, window, softcap, has_sinks):
    sinks = torch.linspace(-2, 3, 6) if has_sinks else None
    check(Cache(LENGTHS), make_queries(COUNTS), sinks=sinks, window=window, softcap=softcap)


@pytest.mark.parametrize("cache_dtype", FLOATS)
@pytest.mark.parametrize("q_dtype", FLOATS)
def test_dtypes(isa, q_dtype, cache_dtype):
    cache = Cache([100, 20], dtype=cache_dtype, key_dim=48, value_dim=72)
    tol = 2e-6 if q_dtype == torch.float32 else torch.finfo(q_dtype).eps
    check(cache, make_queries([33, 1], key_dim=48, dtype=q_dtype), tol=tol)


def test_blocks_behind_the_window_are_not_read(isa):
    cache = Cache([150])
    queries = make_queries([3])
    want = cache.attend(queries, window=20)
    cache.table[0, :8] = 10**6
    assert torch.equal(cache.attend(queries, window=20)[0], want[0])


def test_scores_too_large_for_exp(isa):
    # Scores reach 400, where one step of fp32 is 3e-5: that much of a probability is all fp32 can give.
    check(Cache([70]), [q * 40 for q in make_queries([70])], scale=1.0, tol=2e-4)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"sinks": torch.linspace(-1, 1, 6)}])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_row_does_not_depend_on_batch_chunking_or_threads(isa, options, dtype):
    lengths = [1500, 700, 90, 33]
    cache, queries = (
        Cache(lengths, dtype=dtype, key_dim=40, value_dim=24),
        make_queries(lengths, key_dim=40, dtype=dtype),
    )
    whole = cache.attend(queries, **options)
    for threads in (1, 2):
        for s, n in enumerate(lengths):
            for begin, end in [(0, 1), (n - 1, n), (n - 30, n), (n // 3, n // 2), (0, n)]:
                part = with_threads(
                    threads,
                    lambda s=s, b=begin, e=end: cache.attend([queries[s][:, b:e]], [e], [s], **options)[0],
                )
                assert torch.equal(part, whole[s][begin:end]), (threads, s, begin, end)


def test_long_decode_split_over_threads_is_exact(isa):
    cache = Cache([5000, 2100], kv_heads=1, key_dim=16, value_dim=16)
    queries = make_queries([1, 1], heads=3, key_dim=16)
    check(cache, queries)
    alone = cache.attend(queries)
    split = with_threads(2, lambda: cache.attend(queries))
    assert all(torch.equal(a, b) for a, b in zip(alone, split, strict=True))
