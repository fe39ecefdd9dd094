"""Attention of prompts by warp-group products: edges, whom it is offered to, and that a tile changes no bit."""

from __future__ import annotations

from functools import partial

import cuda_emulator
import pytest
import torch
from cuda_attention_cases import LAUNCHES, Decode, Prompts, llama_call
from ops_cases import assert_agrees, assert_lies_as_fake
from triton_attention_cases import SINKS

from fuseline.compile.kernels.cuda import attention
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.library import PREFILL
from fuseline.compile.ops.registry import registry

OP = registry()["paged_attention"]
pytestmark = pytest.mark.skipif(cuda_emulator.ISA != "sm_90", reason="runs on a GPU that the kernel is not for")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dim", (64, 128))
def test_head_sizes(dim, dtype):
    Prompts([300, 40], dim=dim, dtype=dtype).check(scale=dim**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (7, 1), (16, 1), (12, 1), (8, 2)])
def test_groups_of_heads(heads, kv_heads):
    Prompts([150, 33], heads=heads, kv_heads=kv_heads).check()


@pytest.mark.parametrize("block_size", (8, 32, 128, 256))
def test_block_sizes(block_size):
    Prompts([200, 31], [70, 31], block_size=block_size).check()


@pytest.mark.parametrize("counts", [(2, 5, 130), (129, 300, 257), (64, 65, 128)])
def test_later_chunks_of_prompts(counts):
    Prompts([129, 700, 385], counts, dim=128).check()


@pytest.mark.parametrize("window", (1, 7, 128, 280))
@pytest.mark.parametrize("more", ({}, SINKS), ids=("plain", "sinks"))
def test_windows_and_sinks(window, more):
    """What lies before the window may be no block at all."""
    batch = Prompts([700, 129], [300, 129])
    batch.table[0, : (400 - window + 1) // 16] = 10**6
    batch.check(window=window, **more)


def test_sinks_of_all_keys():
    Prompts([150]).check(**SINKS)


def test_more_sequences_than_lanes():
    """The owner of a tile is found in several rounds; some sequences have no tokens."""
    counts = [s % 4 for s in range(70)]
    batch = Prompts([5 + s % 9 for s in range(70)], counts, heads=2, kv_heads=1)
    for s, found in enumerate(batch.run()):
        if counts[s] > 1:
            torch.testing.assert_close(found.double(), batch.reference(s), rtol=0.02, atol=0.02)
        else:
            assert found.isnan().all()


def test_sequences_without_keys_give_zeros():
    batch = Prompts([40, 9])
    batch.lengths[1] = 0
    assert torch.equal(batch.run()[1], torch.zeros(9, 4, 64, dtype=torch.bfloat16))


def test_scores_too_large_for_exp():
    batch = Prompts([150])
    batch.queries = [q * 40 for q in batch.queries]
    batch.check(scale=1.0, tolerance=0.02)


@pytest.mark.parametrize("options", ({}, {"window": 50}), ids=("plain", "window"))
def test_neither_batch_nor_chunk_changes_a_bit(options):
    batch = Prompts([300, 140, 9], dim=128)
    whole = batch.run(**options)
    for seqs in ([0], [2, 1], [1, 0, 2]):
        for s, found in zip(seqs, batch.run(seqs, **options), strict=True):
            assert torch.equal(found, whole[s]), (seqs, s)
    for end, count in ((300, 37), (150, 150), (131, 2)):
        part = Prompts([300, 140, 9], dim=128)
        part.queries[0] = part.queries[0][end - count : end]
        part.lengths, part.counts = [end, 140, 9], [count, 140, 9]
        assert torch.equal(part.run([0], **options)[0], whole[0][end - count : end]), (end, count)


@pytest.mark.parametrize("options", ({}, SINKS), ids=("plain", "sinks"))
def test_a_step_of_prompts_and_single_tokens(options, monkeypatch):
    """One call of the op; the single tokens have the bits of a step of their own."""
    monkeypatch.setattr(Decode, "launch", LAUNCHES["bulk"])
    counts = [30, 1, 0, 1, 40]
    batch = Decode([40, 300, 9, 20, 40], counts=counts)
    out, args = batch.arguments(range(5), options.get("sinks"))
    q, k, v, *rest = args
    args = (q, k.nan_to_num(), v.nan_to_num(), *rest, 0, 0.3, 0.0)
    assert_agrees(OP, args, partial(cuda_emulator.run, attention.decode_or_prefill))
    assert_lies_as_fake(OP, args, partial(cuda_emulator.run, attention.decode_or_prefill))
    found = cuda_emulator.run(attention.decode_or_prefill, *args)[0].split(counts)
    for s, want in zip((1, 3), batch.run([1, 3], **options), strict=True):
        assert torch.equal(found[s], want)


def test_queries_of_any_layout():
    """Heads side by side as a product leaves them, tokens side by side, at any address."""
    batch = Prompts([70], dim=64)
    out, args = batch.arguments([0], None)
    want, q = batch.run()[0], args[0]
    shifted = torch.cat((q.new_zeros(1), q.flatten()))[1:].view(q.shape)
    for other in (q.contiguous(), shifted):
        cuda_emulator.run(attention.prefill_attention, out, other, *args[1:], 0, 0.3, 0.0)
        assert torch.equal(out[0], want)


@pytest.mark.parametrize(("isa", "label"), [
    ("sm_80", attention.MIXED), ("sm_90", attention.OURS), ("sm_100", attention.BULK_MIXED),
])  # fmt: skip
def test_hopper_is_given_it_and_offered_tritons(isa, label, monkeypatch):
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    call = llama_call(90, isa)
    found = [one for one in Kernels(call.target, {}).candidates(call) if PREFILL in one.phases]
    labels = {one.label for one in found}
    assert found[0].label == label and (attention.OURS in labels) == (isa == "sm_90")
    assert isa != "sm_90" or attention.BULK_MIXED in labels


def test_what_the_kernel_does_not_take():
    out, args = Prompts([40]).arguments([0], None)
    supports = attention.supports_prefill
    assert supports(*args, 0, 0.3, 0.0) and supports(*args, 0, 0.3, 0.0, None, None)
    assert not supports(*args, 0, 0.3, 5.0) and not supports(*args, 0, 0.3, 0.0, None, None, torch.ones(4), 0)
    assert not supports(*args, 0, 0.3, 0.0, None, None, None, 8)
    assert not supports(*args, 0, 0.3, 0.0, torch.ones(1), torch.ones(1))
    q, k, v, *rest = args
    wide = [torch.cat((x,) * 4, -1) for x in (q, k, v)]
    assert attention.supports_attention(*wide, *rest) and not supports(*wide, *rest, 0, 0.3, 0.0)
    assert attention.supports_attention(q, k[:, :, :4], v[:, :, :4], *rest)
    assert not supports(q, k[:, :, :4], v[:, :, :4], *rest, 0, 0.3, 0.0)
    assert not supports(q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn), *rest, 0, 0.3, 0.0)
