"""Decode attention by bulk copies: whom it is offered to, what it takes, and that its launch changes no bit."""

from __future__ import annotations

from functools import partial

import cuda_emulator
import pytest
import torch
import triton_interpreter
from cuda_attention_cases import LAUNCHES, Decode, llama_call
from fp8_cases import over_fp8
from ops_cases import assert_agrees, cases
from triton_attention_cases import SINKS

from fuseline.compile.kernels.cuda import attention
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.ops.registry import registry
from fuseline.compile.ops.rope import FP8

__all__ = ["triton_interpreter"]
OP = registry()["paged_attention"]


@pytest.fixture(autouse=True)
def by_bulk(monkeypatch):
    monkeypatch.setattr(Decode, "launch", LAUNCHES["bulk"])


@pytest.mark.parametrize("run", (0, 1, attention.RUN))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_it_agrees_with_the_ops_reference(dtype, run):
    """Over every case of the op that it takes, caches in fp8 as well."""
    found = [*cases(OP, dtype), *(args for fp8 in FP8 for args in over_fp8(OP, dtype, fp8))]
    found = [args for args in found if attention.supports_bulk(*args)]
    assert len(found) > 2
    kernel = partial(cuda_emulator.run, partial(attention.decode_or_triton, is_bulk=True, run=run))
    for args in found:
        assert_agrees(OP, args, kernel)


@pytest.mark.parametrize("options", ({}, {"window": 2200}, SINKS), ids=("plain", "window", "sinks"))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (16, 16)])
def test_neither_the_splits_nor_the_number_of_blocks_changes_a_bit(heads, kv_heads, options):
    """Rows of up to ten splits, or eight where the layer has many heads."""
    if options is SINKS:
        options = {"sinks": torch.linspace(-2, 3, heads)}
    batch = Decode([2500, 1, 1030, 270], heads, kv_heads)
    found = [
        torch.cat(batch.run(run=run, num_workers=workers, **options))
        for run, workers in ((1, 0), (attention.RUN, 0), (1, 1), (attention.RUN, 7))
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_more_sequences_than_one_launch_lists():
    """Its list is what a ring of three stages and the results of eight heads leave of shared memory."""
    Decode([1 + s % 3 for s in range(600)], 8, 1, 128, block_size=4).check()


def test_caches_that_it_does_not_take():
    batch = Decode([40, 9])
    q, lengths = torch.cat(batch.queries)[None].transpose(1, 2), torch.tensor([40, 9]).int()
    k, v = batch.k_cache, batch.v_cache
    rest = (batch.table, lengths, torch.tensor([0, 1, 2]).int(), None)
    assert attention.supports_bulk(q, k, v, *rest)
    apart = [cache.new_zeros(*cache.shape[:3], 2 * cache.shape[3])[..., : cache.shape[3]] for cache in (k, v)]
    for caches in ((apart[0], v), (k, apart[1])):
        assert attention.supports_attention(q, *caches, *rest) and not attention.supports_bulk(q, *caches, *rest)
    assert not attention.supports_bulk(q.float(), k, v, *rest)


@pytest.mark.parametrize(("isa", "is_offered"), [
    ("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True), ("sm_120", False),
])  # fmt: skip
def test_gpus_that_have_bulk_copies_use_it(isa, is_offered, monkeypatch):
    """For steps of single tokens, and for such tokens among prompts, which then have the same bits."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    call = llama_call(1, isa)
    found = Kernels(call.target, {}).candidates(call)
    default, other = ("bulk", "decode") if is_offered else ("decode", "bulk")
    labels = {phase: [one.label for one in found if phase in one.phases] for phase in (DECODE, PREFILL)}
    assert labels[DECODE][0] == f"cuda.{default}_attention"
    assert f"cuda.{default}_attention, triton.paged_attention" in labels[PREFILL]
    assert all(label.startswith(f"cuda.{default}_attention, ") for label in labels[PREFILL])
    assert (f"cuda.{other}_attention" in labels[DECODE]) == is_offered
    assert ("cuda.bulk_attention 4r" in labels[DECODE]) == is_offered
