"""KV caches of one byte a number on every instruction set: what is written, what is read, and sameness."""

from __future__ import annotations

import pytest
import torch
from fp8_cases import FP8, SCALES, numbers_to_round, over_fp8
from native_attention_cases import Cache, make_queries
from native_fixtures import isa, key_panels, ops, plain_keys, with_threads
from ops_cases import as_bytes, assert_close, cases, copies, run_native, run_reference

from fuseline.compile.ops.attention import paged_attention
from fuseline.compile.ops.codes import CACHES
from fuseline.compile.ops.latent_attention import paged_latent_attention, rope_latent, write_latent
from fuseline.compile.ops.library import Op
from fuseline.compile.ops.rope import from_int8, rope_cache, to_int8, write_cache

__all__ = ["isa"]
DTYPES = [torch.int8, *FP8]
FLOATS = (torch.float32, torch.bfloat16)


def over_codes(op: Op, dtype: torch.dtype, stored: torch.dtype) -> list[tuple]:
    """The op's cases with caches of codes in place of theirs."""
    if stored != torch.int8:
        return list(over_fp8(op, dtype, stored))
    return [tuple(to_int8(arg.float()) if name.endswith("_cache") else arg
                  for name, arg in zip(op.arguments, args, strict=False)) for args in cases(op, dtype)]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("op", [write_cache.op, rope_cache.op, write_latent.op, rope_latent.op], ids=lambda op: op.name)
def test_what_is_written_is_what_the_reference_writes(isa, op, stored, dtype):
    for args in over_codes(op, dtype, stored):
        expected = run_reference(op, tuple(copies(args)))
        found = run_native(op, tuple(copies(args)), expected[: len(expected) - len(op.caches)])
        assert all(torch.equal(as_bytes(one), as_bytes(truth)) for one, truth in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("op", [paged_attention.op, paged_latent_attention.op], ids=lambda op: op.name)
def test_attention_reads_what_is_stored(isa, op, stored, dtype):
    for args in over_codes(op, dtype, stored):
        expected = run_reference(op, tuple(copies(args)))
        (found,) = run_native(op, tuple(copies(args)), expected)
        assert_close(found, expected[0], 30.0)


@pytest.mark.parametrize("stored", FP8)
def test_every_number_is_rounded_as_torch_rounds(isa, stored):
    x = numbers_to_round(stored)
    x = torch.cat((x, x[: -len(x) % 4])).reshape(1, 1, 1, -1)
    k_cache, v_cache = (torch.zeros(1, 1, 1, x.shape[-1]).to(stored) for _ in "kv")
    ops.write_cache_codes(k_cache, v_cache, x, x, torch.tensor([0]), None, None, CACHES[str(stored)[6:]])
    largest = torch.finfo(stored).max
    want = x.clamp(-largest, largest).to(stored)
    for cache in (plain_keys(k_cache), v_cache):
        # Of what is no number only that is kept; torch keeps its sign, too.
        assert torch.equal(as_bytes(cache)[x.isfinite()], as_bytes(want)[x.isfinite()])
        assert cache.float()[x.isnan()].isnan().all()


def test_rows_of_zeros_and_of_large_numbers_have_scales(isa):
    rows = torch.stack((torch.zeros(8), torch.full((8,), 3e38), torch.full((8,), 1e-38), torch.linspace(-1, 1, 8)))
    caches = [torch.full((1, 1, 4, 12), 55, dtype=torch.int8) for _ in "kv"]
    ops.write_cache_codes(*caches, rows[None, None], rows[None, None], torch.arange(4), None, None, CACHES["int8"])
    for cache in (plain_keys(caches[0]), caches[1]):
        torch.testing.assert_close(from_int8(cache)[0, 0], rows, rtol=1 / 250, atol=1 / 250)


class CodedCache(Cache):
    def __init__(self, lengths: list[int], stored: torch.dtype, **options: object) -> None:
        super().__init__(lengths, **options)
        self.code = CACHES[str(stored).removeprefix("torch.")]
        self.scales = (None, None) if stored == torch.int8 else SCALES
        self.k_cache, self.v_cache = (
            to_int8(cache.float()) if stored == torch.int8 else (cache.float() / scale).to(stored)
            for cache, scale in zip((plain_keys(self.k_cache), self.v_cache), SCALES, strict=True)
        )
        self.k_cache = key_panels(self.k_cache)

    def run(self, tensors, ints, floats):
        ops.paged_attention_codes(*tensors, *self.scales, None, *ints, self.code, *floats)


@pytest.mark.parametrize("options", [{}, {"window": 50, "sinks": torch.linspace(-1, 1, 6)},
                                     {"chunk": 40, "slopes": torch.linspace(0.01, 0.4, 6)}], ids=len)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("stored", "block_size"), [(torch.int8, 16), (torch.int8, 20), (FP8[0], 16), (FP8[1], 8)])
def test_a_row_does_not_depend_on_batch_chunking_or_threads(isa, stored, block_size, options, dtype):
    """Slots that hold nothing are NaN: they are never read."""
    lengths = [700, 90, 33]
    cache = CodedCache(lengths, stored, dtype=dtype, key_dim=40, value_dim=24, block_size=block_size)
    queries = make_queries(lengths, key_dim=40, dtype=dtype)
    whole = cache.attend(queries, **options)
    for s, n in enumerate(lengths):
        error = whole[s].double() - cache.reference(s, queries[s], n, **options)
        assert error.norm() < {torch.int8: 0.02, FP8[0]: 0.08, FP8[1]: 0.16}[stored] * whole[s].double().norm()
        for begin, end in [(0, 1), (n - 1, n), (n - 30, n), (n // 3, n // 2)]:
            part = with_threads(1 + s % 2, lambda s=s, b=begin, e=end: cache.attend([queries[s][:, b:e]], [e], [s],
                                                                                   **options)[0])  # fmt: skip
            assert torch.equal(part, whole[s][begin:end]), (s, begin, end)
