"""decode_attention of csrc/cuda by its emulator on the CPU: against a plain softmax; whom a row's bits depend on."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch
import triton_interpreter
from cuda_attention_cases import LAUNCHES, Decode, _cast
from fp8_cases import numbers
from triton_attention_cases import SINKS, SOFTCAP

from fuseline.compile.kernels.cuda import attention
from fuseline.compile.ops.rope import FP8

__all__ = ["triton_interpreter"]
LENGTHS = [1, 40, 300, 700]


@pytest.fixture(autouse=True, params=LAUNCHES)
def launch(request, monkeypatch):
    """Every test is one of each kernel."""
    monkeypatch.setattr(Decode, "launch", LAUNCHES[request.param])
    return LAUNCHES[request.param]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_head_sizes(dim, dtype):
    Decode(LENGTHS[1:3], dim=dim, dtype=dtype).check(scale=dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (7, 1), (16, 2), (12, 1), (32, 2)])
def test_groups_of_heads(heads, kv_heads):
    Decode([90, 33], heads, kv_heads).check()


@pytest.mark.parametrize("block_size", (1, 4, 16, 128))
def test_block_sizes(block_size):
    Decode(LENGTHS, block_size=block_size).check()


@pytest.mark.parametrize("window", (0, 1, 7, 64, 280))
@pytest.mark.parametrize("more", ({}, SOFTCAP, SINKS), ids=("plain", "softcap", "sinks"))
def test_window_softcap_and_sinks(window, more):
    Decode(LENGTHS).check(window=window, **more)


def test_many_splits():
    Decode([5000, 2100], 2, 1).check()


def test_splits_of_many_keys():
    """Of 32 kv heads a row has no more than eight splits."""
    Decode([2500, 300], 32, 32).check()


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dim", (64, 128))
def test_fp8_cache(dim, fp8):
    """Keys and values are the stored numbers times their scales: the plain attention over those, to the bit."""
    plain, coded = (Decode([300, 20], dim=dim) for _ in range(2))
    k_scale, v_scale = torch.tensor([0.5]), torch.tensor([0.25])
    for name, scale in (("k_cache", k_scale), ("v_cache", v_scale)):
        stored = (getattr(plain, name).float().nan_to_num(1e6) / scale).to(fp8)
        setattr(plain, name, (stored.float() * scale).bfloat16())
        setattr(coded, name, stored)
    for found, want in zip(coded.run(k_scale=k_scale, v_scale=v_scale), plain.run(), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_byte_of_fp8_is_read_right(dtype, fp8):
    """One key a sequence: its value comes out as it is stored, normal or not, whatever the sign."""
    want = torch.ones(256)
    want[: len(numbers(fp8))] = numbers(fp8)
    batch = Decode([1], 1, 1, 256, dtype, block_size=1)
    batch.k_cache = torch.zeros(batch.k_cache.shape).to(fp8)
    batch.v_cache = want.expand(batch.v_cache.shape).to(fp8)
    assert torch.equal(batch.run()[0][0, 0].float(), want)


@pytest.mark.parametrize("options", ({}, {"window": 600}, SINKS), ids=("plain", "window", "sinks"))
def test_who_works_on_a_split_changes_no_bit(options):
    batch = Decode([900, 1, 270, 1500], 2, 1)
    found = [torch.cat(batch.run(num_workers=workers, **options)) for workers in (1, 3, 8)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("options", ({}, {"window": 50}), ids=("plain", "window"))
def test_a_row_does_not_depend_on_its_batch(options):
    """Nor on the width of the table, which is that of the longest sequence."""
    batch = Decode([600, 1, 270, 40], 2, 1)
    whole = batch.run(**options)
    for seqs in ([0], [2], [3, 0], [1, 2, 3]):
        for s, found in zip(seqs, batch.run(seqs, **options), strict=True):
            assert torch.equal(found, whole[s]), (seqs, s)
    batch.table = batch.table[:, :17]
    assert torch.equal(batch.run([2], **options)[0], whole[2])


def test_sequences_of_several_tokens_and_of_none():
    Decode([40, 9, 60, 90, 2, 2], counts=[0, 0, 3, 1, 0, 0]).check()
    batch = Decode([5, 9])
    batch.lengths[1] = 0
    assert torch.equal(batch.run()[1], torch.zeros(1, 4, 64, dtype=torch.bfloat16)), "padding"


def test_scores_too_large_for_exp():
    batch = Decode([70])
    batch.queries = [q * 40 for q in batch.queries]
    batch.check(scale=1.0, tolerance=0.02)


@pytest.mark.parametrize("options", ({}, {"window": 60}, SINKS), ids=("plain", "window", "sinks"))
def test_single_tokens_among_prompts_have_the_bits_of_a_step_of_their_own(options, launch):
    """And the others those of Triton's prefill kernel, in one call; keys of one to several splits."""
    batch = Decode([40, 900, 9, 600, 3, 5, 300], counts=[30, 1, 0, 1, 2, 5, 1])
    singles, several = [1, 3, 6], [0, 4, 5]
    q = torch.cat(batch.queries)[None].transpose(1, 2)
    lengths, starts = (torch.tensor(numbers).int() for numbers in (batch.lengths, [0, *batch.counts]))
    numbers = {"window": 0, "scale": 0.3, "softcap": 0.0, **options}
    sinks = _cast(numbers.pop("sinks", None), q.dtype)
    args = (q, batch.k_cache, batch.v_cache, batch.table, lengths, starts.cumsum(0).int(), sinks, *numbers.values())
    found = cuda_emulator.run(attention.decode_or_triton, *args, **launch)[0].split(batch.counts)
    alone = batch.run(singles, **options)
    assert all(torch.equal(found[s], want) for s, want in zip(singles, alone, strict=True))
    whole = torch.empty(1, q.shape[2], 4, 64, dtype=q.dtype)
    attention.triton_attention(whole, *args, prefill_from=1)
    assert all(torch.equal(found[s], whole[0].split(batch.counts)[s]) for s in several)
    for s in range(len(batch.lengths)):
        want = batch.reference(s, **options) if batch.counts[s] else found[s].double()
        torch.testing.assert_close(found[s].double(), want, rtol=0.02, atol=0.02)


def test_what_is_left_alone_is_not_written():
    batch = Decode([40, 9], counts=[30, 1])
    found = batch.run()
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_what_the_kernel_does_not_take():
    batch = Decode([40, 9])
    q = torch.cat(batch.queries)[None].transpose(1, 2)
    lengths, starts = torch.tensor([40, 9]).int(), torch.tensor([0, 1, 2]).int()
    args = (q, batch.k_cache, batch.v_cache, batch.table, lengths, starts, None)
    k, v, table, sinks = *args[1:4], torch.zeros(4)
    for other in (
        (q.float(), k, v, table, lengths, starts, None), (q, k.half(), v, table, lengths, starts, None),
        (q, k, v, table.long(), lengths, starts, None), (q, k, v, table, lengths, starts, sinks),
        (q, k[:, :, :12], v, table, lengths, starts, None), (q[..., :48], k[..., :48], v[..., :48], *args[3:]),
        (q.repeat(1, 10, 1, 1), *args[1:]), (*args, 0, 0.3, 0.0, None, None, sinks, 0),
        (*args, 0, 0.3, 0.0, None, None, None, 8),
    ):  # fmt: skip
        assert not attention.supports_attention(*other) and not attention.supports_bulk(*other)
