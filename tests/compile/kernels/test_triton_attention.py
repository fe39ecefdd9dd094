"""The Triton paged_attention through the interpreter: against a plain softmax; whom a row's bits depend on."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter
from fp8_cases import STORED, fp8_of, numbers
from triton_attention_cases import CHUNKS, SINKS, SLOPES, SOFTCAP, Batch
from triton_interpreter import assert_fits, compile_launches

from fuseline.compile.kernels.triton import attention
from fuseline.compile.ops.attention import attend

__all__ = ["triton_interpreter"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


MIXED = {"lengths": [1, 150, 40, 300, 17, 290], "counts": [1, 150, 1, 37, 2, 3]}
DECODE = {"lengths": [1, 40, 300, 700], "counts": [1, 1, 1, 1]}


@pytest.mark.parametrize("batch", (MIXED, DECODE), ids=("mixed", "decode"))
@pytest.mark.parametrize("block_size", (1, 5, 16, 128))
def test_prefill_prefix_and_decode(batch, block_size):
    Batch(**batch, block_size=block_size).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1), (20, 1), (70, 1)])
def test_groups_of_heads(heads, kv_heads):
    Batch([90, 33, 10], [70, 1, 3], heads, kv_heads).check()
    Batch([90, 33], [1, 1], heads, kv_heads).check()


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 1), (40, 24), (64, 64), (80, 96), (192, 128), (256, 256), (576, 512)]
)
def test_head_sizes(key_dim, value_dim):
    Batch([60, 33], [40, 1], key_dim=key_dim, value_dim=value_dim).check(scale=key_dim**-0.5)


@pytest.mark.parametrize("window", (1, 7, 64, 280))
@pytest.mark.parametrize("more", ({}, SOFTCAP, SINKS), ids=("plain", "softcap", "sinks"))
def test_window_softcap_and_sinks(window, more):
    Batch(**MIXED).check(window=window, **more)
    Batch(**DECODE).check(window=window, **more)


@pytest.mark.parametrize("chunk", (0, 1, 7, 64, 280))
@pytest.mark.parametrize("more", ({}, SLOPES), ids=("plain", "slopes"))
def test_chunks_and_slopes(chunk, more):
    Batch(**MIXED).check(chunk=chunk, **more)
    Batch(**DECODE).check(chunk=chunk, **more)


@pytest.mark.parametrize("more", (SOFTCAP, SINKS), ids=("softcap", "sinks"))
def test_softcap_and_sinks_without_a_window(more):
    Batch(**MIXED).check(**more)
    Batch(**DECODE).check(**more)


@pytest.mark.parametrize("cache_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype, cache_dtype):
    # A cache of more bits than q is read in q's.
    wide = torch.promote_types(dtype, cache_dtype) != dtype
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.bfloat16).eps if wide else 0.0)
    batch = Batch([100, 20], [33, 1], dtype=dtype, cache_dtype=cache_dtype)
    batch.check(tolerance=3e-6 if dtype == torch.float32 else 2 * step)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_fp8_cache(dtype, stored):
    """Keys and values are the stored numbers times their scales: the plain attention over those."""
    plain = Batch([100, 300, 20], [33, 1, 1], dtype=dtype)
    coded = Batch([100, 300, 20], [33, 1, 1], dtype=dtype)
    k_scale, v_scale = torch.tensor([0.5]), torch.tensor([0.25])
    for name, scale in (("k_cache", k_scale), ("v_cache", v_scale)):
        numbers = (getattr(plain, name).float().nan_to_num(1e6) / scale).to(fp8_of(stored))
        setattr(plain, name, (numbers.float() * scale).to(dtype))
        setattr(coded, name, numbers.view(stored))
    tolerance = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for found, want in zip(coded.run(k_scale=k_scale, v_scale=v_scale), plain.run(), strict=True):
        torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_byte_of_fp8_is_read_right(stored, dtype):
    """One key a sequence: its value comes out as it is stored, normal or not, whatever the sign."""
    want = numbers(fp8_of(stored))
    batch = Batch([1], [1], 1, 1, value_dim=len(want), block_size=1, dtype=dtype)
    batch.k_cache = torch.zeros(batch.k_cache.shape).to(fp8_of(stored)).view(stored)
    batch.v_cache = want.to(fp8_of(stored)).view(stored).expand(len(batch.v_cache), 1, 1, -1).contiguous()
    assert torch.equal(batch.run()[0][0, 0].float(), want)


@pytest.mark.parametrize("options", ({}, {"window": 600}, SINKS, CHUNKS), ids=("plain", "window", "sinks", "chunks"))
def test_who_folds_the_splits_changes_no_bit(options, monkeypatch):
    """One program in registers, or many workers through the workspace."""
    batch = Batch([900, 1, 270, 1500, 40], [1, 1, 1, 2, 0], 2, 1, dtype=torch.bfloat16)
    found = []
    for folded, workers in ((1, 8), (1, 3), (4, 5), (8, 1)):
        monkeypatch.setattr(attention.AttentionShape, "max_folded", folded)
        monkeypatch.setattr(attention.AttentionShape, "num_workers", workers)
        found.append(torch.cat(batch.run(**options)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("tuning", (*attention.DECODE_TUNINGS, *attention.PREFILL_TUNINGS), ids=str)
def test_no_tuning_changes_a_bit(tuning):
    batch = Batch([900, 1, 270, 150], [1, 1, 2, 140], 4, 1, dtype=torch.bfloat16)
    for seqs in (None, [0, 1]):
        for found, plain in zip(batch.run(seqs, tuning=tuning), batch.run(seqs), strict=True):
            assert torch.equal(found, plain)


@pytest.mark.parametrize("options", ({}, {"window": 50}, CHUNKS), ids=("plain", "window", "chunks"))
def test_a_row_does_not_depend_on_its_batch(options):
    batch = Batch([600, 1, 270, 90, 40], [1, 1, 2, 60, 1], 2, 1, dtype=torch.bfloat16)
    whole = batch.run(**options)
    for seqs in ([0], [2], [3], [4, 0], [1, 2, 3]):
        for s, found in zip(seqs, batch.run(seqs, **options), strict=True):
            assert torch.equal(found, whole[s]), (seqs, s)


def test_large_batches_fold_and_small_ones_split():
    small, large = (attention.AttentionShape(n, n, 8, 4, 16, 128, 128, 8192, 2) for n in (1, 256))
    assert (small.max_folded, small.num_workers, large.max_folded, large.num_workers) == (1, 32, 8, 4)
    assert small.num_splits == large.num_splits


def test_many_splits():
    Batch([5000, 2100], [1, 3], 2, 1).check()


def test_more_sequences_than_tokens():
    """Empty sequences, and one of many tokens, where only the decode kernel runs."""
    Batch([40, 9, 5, 60, 8, 90, 7, 3] + [2] * 40, [0, 0, 0, 40, 0, 1, 0, 0] + [0] * 40).check()


def test_nothing_to_do_and_rows_of_padding():
    batch = Batch([5, 9], [1, 1])
    batch.lengths[1] = 0
    assert torch.equal(batch.run()[1], torch.zeros(1, 4, 16))
    batch.counts, batch.queries = [0, 0], [q[:0] for q in batch.queries]
    assert [out.shape[0] for out in batch.run()] == [0, 0]


def test_scores_too_large_for_exp():
    batch = Batch([70], [70])
    batch.queries = [q * 40 for q in batch.queries]
    batch.check(scale=1.0, tolerance=2e-4)


def test_the_reference_of_this_file_is_that_of_the_op():
    batch = Batch([50], [20])
    want = attend(batch.queries[0].transpose(0, 1), batch.keys[0], batch.values[0], None, 0.3, 7, 0.0, True)
    torch.testing.assert_close(batch.reference(0, window=7).float(), want.transpose(0, 1))


def launches(arch: int) -> None:
    """Launches of the compile test: on Hopper the shapes of Llama, gpt-oss (window, sinks, fp8), Gemma and DeepSeek
    (plain and with its one latent head); on the others those that differ there. An sm_80 reads e4m3 as bytes."""
    scales = {"k_scale": torch.ones(1), "v_scale": torch.ones(1)}
    coded = {"window": 128, "sinks": torch.zeros(64), **scales}
    shapes = [
        (32, 8, 128, 128, torch.bfloat16, torch.bfloat16, {}),
        (64, 8, 64, 64, torch.bfloat16, torch.float8_e5m2, coded),
        (64, 8, 64, 64, torch.bfloat16, torch.uint8 if arch == 80 else torch.float8_e4m3fn, coded),
        (8, 4, 256, 256, torch.float16, torch.float16, {"softcap": 50.0}),
        (16, 16, 192, 128, torch.bfloat16, torch.bfloat16, {}),
        (128, 1, 576, 512, torch.bfloat16, torch.bfloat16, {}),
        (128, 1, 576, 512, torch.bfloat16, torch.float8_e5m2, scales),
        (4, 1, 64, 64, torch.float16, torch.float8_e5m2, scales),
        (4, 1, 64, 64, torch.float32, torch.float8_e5m2, scales),
    ]
    for heads, kv_heads, key_dim, value_dim, dtype, cache_dtype, options in shapes[: {80: 3, 90: 9, 100: 3}[arch]]:
        batch = Batch([50, 333], [40, 1], heads, kv_heads, key_dim, value_dim, dtype=dtype)
        batch.k_cache, batch.v_cache = batch.k_cache.to(cache_dtype), batch.v_cache.to(cache_dtype)
        batch.run(**options)
    plain = Batch([50, 333], [40, 1], *shapes[0][:4], dtype=torch.bfloat16)
    for tuning in (*attention.DECODE_TUNINGS, *attention.PREFILL_TUNINGS) if arch == 90 else ():
        plain.run(tuning=tuning)


@pytest.mark.slow
def test_every_kernel_compiles():
    entries = compile_launches("test_triton_attention", 80, 90, 100)
    assert {e["kernel"] for e in entries} == {"decode_kernel", "merge_kernel", "prefill_kernel"}
    assert_fits(entries)
