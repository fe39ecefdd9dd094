"""Attention of installed libraries without them: arguments, masks and layouts, on fakes with the real signatures."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
from collections.abc import Mapping
from functools import partial
from types import ModuleType

import fake_libraries as fakes
import pytest
import torch
import triton_interpreter
from cuda_target_cases import build, decode_step
from fake_gpu import GPU, no_host_sync
from ops_cases import assert_close, cases
from paged_driver import greedy
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.backends.cuda.executable import chosen_kernels
from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig
from fuseline.compile.kernels import select
from fuseline.compile.kernels.external import attention as external
from fuseline.compile.kernels.external.flashinfer import PlannedPrefill
from fuseline.compile.kernels.registry import OpCall, implementations, with_library
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.attention import paged_attention as reference
from fuseline.compile.ops.attention_batch import AttentionLayer, make_batch
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.ops.registry import registry
from fuseline.compile.target import Target

__all__ = ["triton_interpreter"]
OP = registry()["paged_attention"]
ALL = {
    "flash_attn_3": fakes.flash_attn_with_kvcache, "flash_attn_2": fakes.flash_attn_varlen_func,
    "torch.varlen_attn": fakes.varlen_attn, "flashinfer": fakes.BatchPrefillWithPagedKVCacheWrapper,
}  # fmt: skip
LAYER = AttentionLayer(8, 2, 64, 64, 256, torch.float16, torch.float16, False, False, 0, 0.125, 0.0)


def repaged(args: tuple, size: int) -> tuple:
    """The same keys and values in blocks of `size`, all else NaN."""
    q, *caches, table, lengths, starts, sinks, window, scale, softcap = args[:10]
    width = -(-int(lengths.max()) // size)
    blocks = torch.randperm(len(lengths) * width + 1, generator=torch.Generator().manual_seed(2)).int()
    new_table = blocks[: len(lengths) * width].reshape(len(lengths), width)
    new = [torch.full((len(blocks), c.shape[1], size, c.shape[3]), float("nan"), dtype=c.dtype) for c in caches]
    for old, to in zip(caches, new, strict=True):
        for s, length in enumerate(lengths.tolist()):
            at = torch.arange(length)
            rows = old[table[s, at // old.shape[2]].long(), :, at % old.shape[2]]
            to[new_table[s, at // size].long(), :, at % size] = rows
    return q, *new, new_table, lengths, starts, sinks, window, scale, softcap


def host_of(args: tuple) -> dict[str, torch.Tensor]:
    return {"block_table_0": args[3], "seq_lens": args[4], "query_start": args[5]}


def kernel(name: str, args: tuple):
    """The library's function over our arguments."""
    if name == "flash_attn_3":
        return partial(external.flash_3, fakes.flash_attn_with_kvcache)
    if name == "flash_attn_2":
        return partial(external.flash_2, fakes.flash_attn_varlen_func)
    if name == "varlen":
        return partial(external.varlen, fakes.varlen_attn)
    layer = AttentionLayer.of(*args)
    planned = PlannedPrefill(fakes.BatchPrefillWithPagedKVCacheWrapper, layer, "block_table_0", "cpu", reference)
    planned.plan(host_of(args))
    return planned.run


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("flash_attn_3", (16, 3, 256)), ("flash_attn_2", (256,)), ("varlen", (256,)), ("flashinfer", (16, 5))],
)
def test_arguments_mean_what_the_op_means(name, sizes, dtype):
    """All of the registry's inputs that the library is for: prompts, prefixes, one token; windows and soft-caps."""
    tried = 0
    for given in cases(OP, dtype):
        is_same = given[1].shape[3] == given[2].shape[3]
        is_plain = given[6] is None and len(given) == 10  # no sinks, slopes or chunks
        if not is_plain or not (is_same or name == "flash_attn_3") or (given[9] and name == "varlen"):
            continue
        for size in sizes:
            args = repaged(given, size)
            found = kernel(name, args)(*args)
            assert found.is_contiguous()
            assert_close(found, reference(*args), OP.tolerance)
            tried += 1
    assert tried >= 2 * len(sizes)


def test_one_token_a_sequence_by_flash_attn_3():
    layer = dataclasses.replace(LAYER, block_size=16, window=20)
    batch = make_batch(layer, [40, 1, 17], [1, 1, 1], "cpu", "block_table_0")
    seen = {}

    def attend(*args, **kwargs):
        seen.update(kwargs)
        return fakes.flash_attn_with_kvcache(*args, **kwargs)

    assert_close(external.flash_3(attend, *batch.args), reference(*batch.args), OP.tolerance)
    assert seen["max_seqlen_q"] == 1 and seen["num_splits"] == 0


NEAR_MISSES = (
    {"has_sinks": True}, {"has_scales": True}, {"has_slopes": True}, {"chunk": 8},
    {"dtype": torch.float32, "cache_dtype": torch.float32},
    {"cache_dtype": torch.float8_e4m3fn}, {"cache_dtype": torch.bfloat16}, {"key_dim": 576, "value_dim": 512},
    {"key_dim": 68, "value_dim": 68}, {"key_dim": 264, "value_dim": 264},
)  # fmt: skip


@pytest.mark.parametrize("change", NEAR_MISSES, ids=str)
def test_layers_of_no_library(change):
    layer = dataclasses.replace(LAYER, **change)
    assert not (external.supports_flash_3(layer) or external.supports_flash_2(layer))
    assert not (external.supports_varlen(layer) or external.supports_flashinfer(layer))


def test_layers_of_some_libraries(monkeypatch):
    monkeypatch.setattr(torch.testing, "assert_close", lambda *_, **__: None)
    change(monkeypatch, "triton.paged_attention", run=lambda *args: None)
    for label in ALL:
        change(monkeypatch, label, run=lambda *args: None, bind=with_library)

    def offers(isa="sm_90", **changed) -> list[bool]:
        layer = dataclasses.replace(LAYER, **changed)
        found = {c.label for c in candidates(ALL, layer, dataclasses.replace(GPU, isa=isa))}
        return [label in found for label in ("flash_attn_3", "flash_attn_2", "torch.varlen_attn", "flashinfer")]

    assert offers() == offers(window=7) == offers(key_dim=256, value_dim=256) == [True] * 4
    assert offers("sm_80") == offers("sm_100") == [False, True, True, True]
    assert offers(block_size=128) == offers(block_size=16) == [True, False, False, True]
    assert offers(softcap=30.0) == [True, True, False, True]
    assert offers(key_dim=80, value_dim=80) == [True, True, True, False]
    assert offers(key_dim=192, value_dim=128) == offers(key_dim=64, value_dim=512) == [True, False, False, False]
    assert offers(key_dim=128, value_dim=64) == [False] * 4


def candidates(libraries: Mapping[str, object], layer: AttentionLayer = LAYER, target: Target = GPU):
    """Those of libraries."""
    args = make_batch(layer, [3, 5], [3, 1], "cpu", "block_table_0").args
    call = OpCall(OP.target, args, target, {"block_table": "block_table_0"})
    return [c for c in Kernels(target, libraries).candidates(call) if not c.label.startswith("triton.")]


def change(monkeypatch, label: str, **fields: object) -> None:
    """Another declaration of an attention kernel."""
    kernels = implementations("cuda")
    changed = tuple(
        dataclasses.replace(one, **fields) if one.label == label else one for one in kernels["paged_attention"]
    )
    monkeypatch.setitem(kernels, "paged_attention", changed)


@pytest.fixture
def quick(monkeypatch):
    """Trials against the op's reference instead of an interpreted kernel."""
    change(monkeypatch, "triton.paged_attention", run=reference)


def test_what_is_offered_and_in_which_order(quick):
    found = [(c.label, c.phases) for c in candidates(ALL)]
    assert found == [
        ("flash_attn_3", (PREFILL,)), ("flashinfer", (PREFILL,)), ("flash_attn_2", (PREFILL,)),
        ("torch.varlen_attn", (PREFILL,)), ("flash_attn_3", (DECODE,)),
    ]  # fmt: skip
    assert not candidates({}) and not candidates(ALL, dataclasses.replace(LAYER, has_sinks=True))


def off_by_one(*args, window_size, **kwargs):
    return fakes.flash_attn_with_kvcache(*args, window_size=(window_size[0] + 1, window_size[1]), **kwargs)


def without_page_table(*args, **kwargs):
    raise TypeError("unexpected keyword argument 'page_table'\nand more")


@pytest.mark.parametrize(
    ("broken", "said"), [(off_by_one, "AssertionError"), (without_page_table, "TypeError: unexpected keyword")]
)
def test_a_library_that_fails_its_trial_is_not_used(quick, broken, said, caplog):
    layer = dataclasses.replace(LAYER, block_size=16, window=3)
    with caplog.at_level(logging.WARNING):
        assert candidates({"flash_attn_3": broken}, layer) == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all(line.startswith("flash_attn_3 is not used for") and said in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_a_trial_passes_by_our_kernel():
    assert candidates({"flash_attn_3": fakes.flash_attn_with_kvcache}, dataclasses.replace(LAYER, block_size=16))


def test_what_is_installed(monkeypatch, caplog):
    """Only on a GPU; a library whose function takes other arguments is none, in words."""
    gpu = Target("cuda", "sm_90", 1)
    for name in ("flash_attn", "flash_attn_interface", "flashinfer", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["flash_attn"].flash_attn_varlen_func = lambda q, k, v: None
    sys.modules["flash_attn_interface"].flash_attn_with_kvcache = fakes.flash_attn_with_kvcache
    sys.modules["torch.nn.attention.varlen"].varlen_attn = fakes.varlen_attn
    with caplog.at_level(logging.WARNING):
        found = select.installed(gpu)
    assert found == {
        "flash_attn_3": fakes.flash_attn_with_kvcache,
        "torch.varlen_attn": fakes.varlen_attn,
        "torch._scaled_mm": torch._scaled_mm,
    }
    assert "flash_attn.flash_attn_varlen_func is not used: it does not take block_table" in caplog.text
    assert "flashinfer is installed and not used: AttributeError" in caplog.text
    assert select.installed(GPU) == {}


def test_what_was_not_planned_is_computed_by_ours():
    """Another thread's steps, steps of fewer tokens than planned, steps of one token a sequence."""
    layer = dataclasses.replace(LAYER, block_size=16)
    prompt = make_batch(layer, [30, 20], [30, 2], "cpu", "block_table_0")
    single = make_batch(layer, [30, 20], [1, 1], "cpu", "block_table_0")
    calls = []

    def other(*args):
        calls.append(args[0].shape[2])
        return reference(*args)

    planned = PlannedPrefill(fakes.BatchPrefillWithPagedKVCacheWrapper, layer, "block_table_0", "cpu", other)
    planned.plan(prompt.host)
    assert_close(planned.run(*prompt.args), reference(*prompt.args), OP.tolerance)
    assert calls == []
    thread = threading.Thread(target=lambda: planned.run(*prompt.args))
    thread.start()
    thread.join()
    assert calls == [32]
    planned.run(*single.args)
    assert calls == [32, 2]
    planned.plan(single.host)
    planned.run(*single.args)
    planned.run(*prompt.args)
    assert calls == [32, 2, 2, 32]


def test_rows_of_padding_are_left_alone():
    layer = dataclasses.replace(LAYER, block_size=16)
    batch = make_batch(layer, [30, 20], [30, 2], "cpu", "block_table_0")
    planned = PlannedPrefill(fakes.BatchPrefillWithPagedKVCacheWrapper, layer, "block_table_0", "cpu", None)
    planned.plan(batch.host)
    q = torch.cat((batch.args[0], torch.zeros(1, 8, 5, 64, dtype=torch.float16)), 2)
    found = planned.run(q, *batch.args[1:])
    assert found.shape == (1, 37, 8, 64)
    assert_close(found[:, :32], reference(*batch.args), OP.tolerance)


@pytest.mark.parametrize("name", ("flash_attn_3", "flashinfer"))
def test_a_model_over_a_library_gives_the_tokens_of_transformers(name, monkeypatch):
    """Mixed steps by the library, steps of one token by ours; FlashInfer is planned once a step and kind of layer."""
    made = []

    class Wrapper(fakes.BatchPrefillWithPagedKVCacheWrapper):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    libraries = {"flash_attn_3": fakes.flash_attn_with_kvcache}
    if name == "flashinfer":
        libraries = {"flashinfer": Wrapper}
        change(monkeypatch, "flashinfer", supports=lambda *args: True)  # 16 features a head are too few
    monkeypatch.setattr(select, "installed", lambda target: libraries)
    model, prompts = build("llama", "bfloat16"), make_prompts((3, 9, 20))
    labels = {kernel.label for kernel in model._executable.kernels.values()}
    assert f"{name} | triton.paged_attention" in labels
    assert greedy(model, prompts, 4) == truth(checkpoint("llama", "bfloat16"), prompts, 4)
    if name == "flashinfer":
        assert len(made) == 2 and abs(made[0].num_plans - made[1].num_plans) <= 1 and made[0].num_plans > 1


@pytest.mark.parametrize(
    ("size", "label"), [(256, "flash_attn_2 | triton.paged_attention"), (16, "triton.paged_attention")]
)
def test_the_model_s_block_size_decides(size, label, monkeypatch):
    monkeypatch.setattr(select, "installed", lambda target: {"flash_attn_2": fakes.flash_attn_varlen_func})
    captured, _ = optimize(CompileConfig(str(checkpoint("llama", "bfloat16")), block_size=size), GPU)
    kernels = chosen_kernels(captured.graph, Kernels(GPU))
    assert [kernel.label for node, kernel in kernels.items() if "paged_attention" in node.name] == [label] * 3


def test_planning_waits_for_nothing(monkeypatch):
    class Wrapper(fakes.BatchPrefillWithPagedKVCacheWrapper):
        def plan(self, *arrays, **settings):
            pass

        def run(self, q, caches, out):
            return out.zero_()

    monkeypatch.setattr(torch.testing, "assert_close", lambda *_, **__: None)
    change(monkeypatch, "flashinfer", supports=lambda *args: True)
    monkeypatch.setattr(select, "installed", lambda target: {"flashinfer": Wrapper})
    model = build("llama", "bfloat16")
    model.allocate_caches([4])
    prompt = dataclasses.replace(
        decode_step([3]), token_ids=torch.tensor([4, 5, 6]), positions=torch.arange(3), rope_rows=torch.arange(3),
        query_start=torch.tensor([0, 3], dtype=torch.int32), slot_mapping=torch.arange(16, 19)[None],
        logits_rows=torch.tensor([2]),
    )  # fmt: skip
    with no_host_sync(prompt.fields().values()):
        assert model.run(prompt).logits.shape[0] == 1
