"""A CUDA target without a GPU: the lowered graph, the model run through Triton's interpreter, graphs, no waiting."""

from __future__ import annotations

import dataclasses
import functools

import cuda_emulator
import pytest
import torch
from cuda_target_cases import build, count_kernels, decode_step
from fake_gpu import GPU, FakeGraphs, HostSync, capture_when_allocated, no_host_sync, waiting_for_nothing
from native_sampling_cases import Result, make_logits
from paged_driver import greedy
from triton_interpreter import assert_fits, compile_launches
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.compiler import optimize
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.kernels.choice import default_choices
from fuseline.compile.kernels.cuda import library as cuda_library
from fuseline.compile.kernels.registry import ANY, OpCall, implementations
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.kernels.triton.batch import feed_tokens
from fuseline.compile.kernels.triton.experts import default_tile
from fuseline.compile.kernels.triton.sampling import sample
from fuseline.compile.ops.registry import registry
from fuseline.compile.residency.uploads import ALIGNMENT, DeviceInputs
from fuseline.compile.target import CPU, DeviceError, Target, detect_target

FUSED = "triton.linear_act_mul | torch.linear, triton.act_mul"
LAYERS = 3
COMMON = {"triton.paged_attention": LAYERS, "triton.gather_rows": 2, "torch.embedding": 1}
GOLDEN = {
    "llama": COMMON | {
        "triton.rms_norm": 1, "triton.add_rms_norm": 6, "triton.rope_cache": 3, FUSED: 3, "torch.linear": 10,
    },
    "gpt_oss": COMMON | {
        "triton.rms_norm": 1, "triton.add_rms_norm": 6, "triton.rope_cache": 3, "triton.route_topk": 3,
        "triton.experts": 3, "torch.linear": 10,
    },
    "gemma3": COMMON | {
        "triton.rms_norm": 13, "triton.add_rms_norm": 6, "triton.rope_cache": 3, FUSED: 3, "torch.linear": 10,
    },
}  # fmt: skip
"""Kernels of a step, without views and single ops of torch."""


@pytest.mark.parametrize("family", GOLDEN)
def test_kernels_of_a_step_are_the_golden_ones(family: str) -> None:
    captured, result = optimize(CompileConfig(model=str(checkpoint(family, "bfloat16"))), GPU)
    found = count_kernels(captured.graph)
    ours = {label: count for label, count in found.items() if label.startswith("triton")}
    golden = GOLDEN[family]
    assert ours == {label: count for label, count in golden.items() if label.startswith("triton")}
    assert {label: found[label] for label in golden} == golden
    assert result.stage_ops["lower"]["linear_panels"] == 0, "weights stay rows"


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "level"), [
    ("llama", "float32", 0), ("gemma2", "bfloat16", 1), ("gpt_oss", "bfloat16", 1), ("deepseek_v3", "float32", 1),
])  # fmt: skip
def test_greedy_tokens_equal_transformers(family: str, dtype: str, level: int) -> None:
    prompts = make_prompts((3, 9, 20))
    found = greedy(build(family, dtype, level=level), prompts, 6)
    assert found == truth(checkpoint(family, dtype), prompts, 6)


def test_where_there_are_kernels_in_cpp_they_compute_the_step(monkeypatch) -> None:
    """Those that take the shapes: heads of 16 are Triton's."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())
    captured, _ = optimize(CompileConfig(model=str(checkpoint("llama", "bfloat16"))), GPU)
    found = count_kernels(captured.graph)
    assert {label: count for label, count in found.items() if "cuda." in label or "triton." in label} == {
        "cuda.rms_norm": 1, "cuda.add_rms_norm": 6, "cuda.rope_cache": 3, "cuda.linear | torch.linear": 10,
        "torch.linear, cuda.act_mul": 3, "triton.paged_attention": 3, "triton.gather_rows": 2,
    }  # fmt: skip
    model, prompts = build("llama"), make_prompts((3, 9, 20))
    assert greedy(model, prompts, 6) == truth(checkpoint("llama", "bfloat16"), prompts, 6)


def test_defaults_are_what_was_fastest_on_a_gpu(monkeypatch) -> None:
    """Figures of an H200: act_mul 71 us by C++ and 150 by Triton, a sequence of 4,096 keys 19 and 493; wide linears."""
    monkeypatch.setattr(cuda_library, "library_for", lambda target: cuda_emulator.emulator())

    def default(op: object, *args: object) -> list[tuple[int, str]]:
        choices = default_choices(Kernels(GPU, {}).candidates(OpCall(op, args, GPU)))
        return choices.get("decode") or choices["rows"]

    half = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    fused, linear = torch.ops.fuseline.linear_act_mul.default, torch.ops.fuseline.linear.default
    by_both = [(ANY, "torch.linear, cuda.act_mul")]
    assert default(fused, half(1, 4096), half(28672, 4096), None, 1) == by_both
    assert default(fused, half(1, 4096).float(), half(28672, 4096).float(), None, 1) == by_both
    assert default(linear, half(1, 4096), half(28672, 4096), None) == [(ANY, "torch.linear")]
    assert default(linear, half(1, 4096), half(4096, 4096), None) == [(16, "cuda.linear"), (ANY, "torch.linear")]
    ints = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, 256), (1,), (2,)))
    caches = (half(300, 8, 16, 128) for _ in "kv")
    attention = torch.ops.fuseline.paged_attention.default
    found = default(attention, half(1, 32, 1, 128), *caches, *ints, None, 0, 0.1, 0.0)
    assert found == [(ANY, "cuda.bulk_attention")]
    assert str(default_tile(4096 * 2, 8, 2)) == "128x128x64 8w 3s"


@pytest.mark.parametrize(("family", "sizes"), [("llama", (2, 4)), ("phi3_longrope", (3,))])
def test_padded_graphs_give_the_tokens_of_transformers(family: str, sizes: tuple[int, ...]) -> None:
    model, api, seen = build(family, "float32", GraphConfig(sizes, mixed_sizes=())), FakeGraphs(), []
    capture_when_allocated(model, api, seen)
    prompts = make_prompts((3, 9, 20))
    assert greedy(model, prompts, 6) == truth(checkpoint(family, "float32"), prompts, 6)
    assert api.captured == sorted(sizes, reverse=True), "largest first"
    assert seen == [("capturing graphs", k, len(sizes)) for k in range(len(sizes) + 1)]
    assert set(api.replays) == set(sizes)


def test_padding_changes_neither_logits_nor_caches() -> None:
    inputs = decode_step([3, 20, 1])
    found = []
    for sizes in ((), (3,), (8,)):
        model = build("llama", graphs=GraphConfig(sizes, enabled=bool(sizes), mixed_sizes=()))
        model.allocate_caches([8])
        model.capture_graphs(api=FakeGraphs())
        if model.graphs:
            model.graphs.wait()
        found.append((model.run(inputs).logits.clone(), model.run(inputs).logits.clone(), *model._caches.values()))
        assert (model.graphs is None) == (not sizes)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_a_graph_cannot_do_is_run_op_by_op() -> None:
    """Too many sequences, too long ones, rows in another order, a capture that failed."""
    model, api = build("llama", graphs=GraphConfig((2,), max_seq_len=32, mixed_sizes=())), FakeGraphs()
    model.allocate_caches([16])
    model.capture_graphs(api=api)
    model.graphs.wait()
    turned = dataclasses.replace(decode_step([3, 4]), logits_rows=torch.tensor([1, 0]))
    for inputs in (decode_step([3, 4, 5]), decode_step([3, 40], width=3), turned):
        assert model.run(inputs).logits.shape == (inputs.logits_rows.shape[0], model.info.vocab_size)
    assert not api.replays
    model.run(decode_step([3]))
    assert api.replays == [2]
    model.allocate_caches([16])
    assert model.graphs is None, "graphs of caches that are gone are gone"
    model.capture_graphs(api=FakeGraphs(fails=lambda results: True))
    model.graphs.wait()
    assert model.graphs.decode.captured == {} and model.run(decode_step([3])).logits.shape[0] == 1


def rounding_to(fp8: torch.dtype, num_caches: int, write):
    """`write`, then all that the caches hold as fp8 would hold it."""

    def write_rounded(*args):
        out = write(*args)
        for cache in args[:num_caches]:
            cache.copy_(cache.to(fp8).to(cache.dtype))
        return out

    return write_rounded


@pytest.mark.parametrize(("family", "op", "flag", "fp8"), [
    ("llama", "rope_cache", "fp8", torch.float8_e4m3fn), ("llama", "rope_cache", "fp8_e5m2", torch.float8_e5m2),
    ("gpt2", "write_cache", "fp8_e5m2", torch.float8_e5m2),
    ("deepseek_v3", "rope_latent", "fp8_e5m2", torch.float8_e5m2),
])  # fmt: skip
def test_an_fp8_cache_is_a_cache_of_numbers_rounded_to_fp8(
    family: str, op: str, flag: str, fp8: torch.dtype, monkeypatch
) -> None:
    """The same logits, from half the bytes."""
    prompt = dataclasses.replace(
        decode_step([3]), token_ids=torch.tensor([4, 5, 6]), positions=torch.arange(3), rope_rows=torch.arange(3),
        query_start=torch.tensor([0, 3], dtype=torch.int32), slot_mapping=torch.arange(16, 19)[None],
        logits_rows=torch.tensor([2]),
    )  # fmt: skip
    coded = build(family, kv_cache_dtype=flag)
    (*_, kernel) = implementations("cuda")[op]
    write = dataclasses.replace(kernel, run=rounding_to(fp8, len(registry()[op].caches), kernel.run), tunings=())
    monkeypatch.setitem(implementations("cuda"), op, (write,))
    rounded = build(family)
    for model in (coded, rounded):
        model.allocate_caches([4])
    assert torch.equal(coded.run(prompt).logits, rounded.run(prompt).logits)
    half, whole = coded.info.cache_specs[0], rounded.info.cache_specs[0]
    assert half.bytes_per_token() * 2 == whole.bytes_per_token()
    assert coded._caches["k_cache_0"].dtype == fp8 and coded._caches["k_cache_0"].float().any()


def test_sizes_of_graphs() -> None:
    assert GraphConfig().resolved(256) == (1, 2, 4, *range(8, 257, 8)) and len(GraphConfig().resolved(256)) == 35
    assert GraphConfig((64, 1, 300, 0)).resolved(100) == (1, 64)
    assert GraphConfig(enabled=False).resolved(100) == ()


def test_a_step_waits_for_nothing() -> None:
    """Prompts, a replayed step whose tokens come from the step before, and sampling with all that a row can ask."""
    model = build("llama", graphs=GraphConfig((4,), mixed_sizes=()))
    model.allocate_caches([16])
    model.capture_graphs(api=FakeGraphs())
    model.graphs.wait()
    step, sources = decode_step([3, 20, 1]), torch.tensor([1, -1, 0], dtype=torch.int32)
    prompt = dataclasses.replace(
        decode_step([3]), token_ids=torch.tensor([4, 5, 6]), positions=torch.arange(3), rope_rows=torch.arange(3),
        query_start=torch.tensor([0, 3], dtype=torch.int32), slot_mapping=torch.arange(16, 19)[None],
        logits_rows=torch.tensor([2]),
    )  # fmt: skip
    host = [*step.fields().values(), *prompt.fields().values(), sources]
    asked = {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition": 1.1, "output": (3,), "bias": {1: 1.0},
             "banned": (2,), "num_logprobs": 3}  # fmt: skip

    with no_host_sync(host):
        model.run(prompt)
        logits = model.run(dataclasses.replace(step, sources=sources, sampled=torch.tensor([7, 9]))).logits
    found = Result(logits.clone(), [asked, {"temperature": 0.0}, {}], sample=waiting_for_nothing(sample))
    assert found.ok.tolist() == [1, 1, 1]


def launches(arch: int) -> None:
    """A prompt, replayed decode steps, a swap: a dense and a routed model, with the dtypes that an engine gives."""
    for family, kv_cache_dtype in (("llama", "fp8"), ("llama", "fp8_e5m2"), ("llama", "auto"), ("gpt_oss", "auto")):
        model = build(family, graphs=GraphConfig((4,)), kv_cache_dtype=kv_cache_dtype)
        model.allocate_caches([16] * len(model.info.cache_groups))
        model.allocate_host_blocks([2] * len(model.info.cache_groups))
        model.capture_graphs(api=FakeGraphs())
        model.graphs.wait()
        groups = len(model.info.cache_groups)
        for step in (decode_step([3, 20, 1]), decode_step([3] * 5)):
            step.slot_mapping = step.slot_mapping.expand(groups, -1).contiguous()
            step.block_tables = step.block_tables.expand(groups, -1, -1).contiguous()
            step.sources = torch.zeros(len(step.token_ids), dtype=torch.int32)
            step.sampled = torch.zeros(9, dtype=torch.int64)
            model.run(step)


@pytest.mark.slow
def test_all_that_a_step_launches_compiles() -> None:
    entries = compile_launches("test_cuda_target", 90)
    assert {entry["kernel"] for entry in entries} >= {
        "feed_kernel", "pad_kernel", "decode_kernel", "rope_cache_kernel", "few_rows_kernel", "gate_up_kernel",
        "route_kernel", "copy_kernel",
    }  # fmt: skip
    assert_fits(entries)


@pytest.mark.parametrize(("target", "dtype"), [(GPU, torch.float16), (CPU, torch.bfloat16)])
def test_half_precision_stays_what_it_is_on_a_gpu(target: Target, dtype: torch.dtype) -> None:
    """A CPU computes bf16 for it; what is asked for is taken everywhere."""
    model = str(checkpoint("llama", "float16"))
    captured, _ = optimize(CompileConfig(model=model), target)
    assert captured.dtype == dtype
    asked, _ = optimize(CompileConfig(model=model, dtype="bfloat16"), target)
    assert asked.dtype == torch.bfloat16


def test_the_fake_gpu_notices_waiting() -> None:
    x, host = torch.zeros(3), torch.zeros(3)
    for wait in (lambda: x.tolist(), lambda: float(x[0]), lambda: x.nonzero(), lambda: x[x > 0], lambda: bool(x.any())):
        with pytest.raises(HostSync), no_host_sync([host]):
            wait()
    with no_host_sync([host]):
        host.tolist()


def test_tokens_of_the_step_before_are_fed_on_the_device() -> None:
    tokens, sampled = torch.arange(300), torch.arange(1000, 1300)
    sources = torch.full((300,), -1, dtype=torch.int32)
    sources[[0, 7, 299]] = torch.tensor([5, 0, 299], dtype=torch.int32)
    feed_tokens(tokens, sources, sampled)
    want = torch.arange(300)
    want[[0, 7, 299]] = torch.tensor([1005, 1000, 1299])
    assert torch.equal(tokens, want)


def test_uploads_are_whole_and_aligned() -> None:
    """Also of the sizes of the step before, whose views serve again, and when they grow."""
    uploads = DeviceInputs(torch.device("cpu"))
    for size in (3, 3, 1, 3, 50, 50, 0):
        tensors = {"a": torch.randn(size), "b": torch.arange(size)[None], "c": torch.arange(7, dtype=torch.int32)[::2]}
        found = uploads.upload(tensors)
        assert found.keys() == tensors.keys(), "what the last one took out is there"
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        # An empty tensor has no address.
        assert len({tensor.data_ptr() % ALIGNMENT for tensor in found.values() if tensor.numel()}) == 1
        found.pop("b")


def test_a_missing_gpu_is_said_in_words() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="^--device cuda: .+. Available devices: cpu.$"):
        detect_target(1, "cuda")
    assert detect_target(1, "auto").kind == detect_target(1).kind == "cpu"
    assert make_logits(1, 2).device.type == GPU.device
