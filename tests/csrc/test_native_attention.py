"""paged_attention against a plain softmax, and the independence of a row from batch, chunking and threads."""

from __future__ import annotations

import pytest
import torch
from native_attention_cases import Cache, make_queries
from native_fixtures import FLOATS, isa, with_threads

__all__ = ["isa"]


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


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 7}, {"chunk": 64, "softcap": 3.0}, {"chunk": 100}, {}])
@pytest.mark.parametrize("slopes", (None, torch.tensor([0.5, 0.25, 0.1, 0.0, 1.0, 2**-8])))
def test_chunks_and_slopes(isa, options, slopes):
    check(Cache(LENGTHS), make_queries(COUNTS), slopes=slopes, **options)


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


def test_blocks_before_the_chunk_are_not_read(isa):
    cache = Cache([150])
    queries = make_queries([20])
    want = cache.attend(queries, chunk=128)
    cache.table[0, :8] = 10**6
    assert torch.equal(cache.attend(queries, chunk=128)[0], want[0])


def test_scores_too_large_for_exp(isa):
    # Scores reach 400, where one step of fp32 is 3e-5: that much of a probability is all fp32 can give.
    check(Cache([70]), [q * 40 for q in make_queries([70])], scale=1.0, tol=2e-4)


@pytest.mark.parametrize("options", [{}, {"window": 50}, {"sinks": torch.linspace(-1, 1, 6)},
                                     {"chunk": 300, "slopes": torch.linspace(0.001, 0.4, 6)}])
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
