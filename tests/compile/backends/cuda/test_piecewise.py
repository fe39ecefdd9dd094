"""Steps that mix prompts and decoding as segments: where the graph is cut, what padding does, what is left op by op."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from fake_cuda import FakeCuda
from fake_gpu import GPU, FakeGraphs, capture_when_allocated, no_host_sync
from paged_driver import greedy
from piecewise_cases import mixed_step
from triton_interpreter import assert_fits, compile_launches
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.backends.cuda.graph_api import CaptureStreams, CudaGraphApi, GraphApi
from fuseline.compile.backends.cuda.model import CudaModel
from fuseline.compile.backends.cuda.segments import Segment, SplitOp, cut
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import MIXED_SIZES, CompileConfig, GraphConfig
from fuseline.compile.graph_inputs import BY_FIELD, padding
from fuseline.compile.kernels.triton.batch import pad_tokens

LAYERS = 3


def build(family: str, graphs: GraphConfig, dtype: str = "float32", **settings) -> CudaModel:
    return compile_model(CompileConfig(model=str(checkpoint(family, dtype)), **settings), GPU, graphs=graphs)


def mixed(*sizes: int, **settings) -> GraphConfig:
    return GraphConfig(sizes=(1,), mixed_sizes=sizes, **settings)


def capture(model: CudaModel, api: GraphApi, num_blocks: int = 8) -> None:
    model.allocate_caches([num_blocks] * len(model.info.cache_groups))
    model.capture_graphs(api=api)
    model.graphs.wait()


@pytest.mark.parametrize(("family", "sizes"), [("llama", (4, 9, 16)), ("gpt_oss", (5, 24)), ("phi3_longrope", (24,))])
def test_greedy_tokens_equal_transformers(family: str, sizes: tuple[int, ...]) -> None:
    """Every step is replayed in segments, among memory that is NaN wherever nobody owns it or has written it."""
    model, api, seen = build(family, GraphConfig((1,), mixed_sizes=sizes, num_warmups=0)), FakeGraphs(), []
    capture_when_allocated(model, api, seen)
    prompts = make_prompts((3, 9, 20))
    assert greedy(model, prompts, 6) == truth(checkpoint(family, "float32"), prompts, 6)
    assert api.segments == (LAYERS + 1) * len(sizes) and api.segment_replays >= 5 * (LAYERS + 1)
    assert seen == [("capturing graphs", k, len(sizes) + 1) for k in range(len(sizes) + 2)]


def test_graphs_are_gone_when_they_are_dropped(monkeypatch) -> None:
    """Not when garbage is collected: by then another thread may capture, and destroying one would spoil that."""
    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(CudaGraphApi, "borrowed", lambda self, tensor: tensor.detach())
    model = build("llama", mixed(8))
    capture(model, CudaGraphApi(CaptureStreams.of(torch.device("cpu"))))
    kinds = (model.graphs.decode, model.graphs.mixed)
    graphs = [weakref.ref(graph) for kind in kinds for graph in kind.captured.values()]
    del kinds
    gc.disable()
    try:
        model.stop_capture()
        assert len(graphs) == 2 and [graph() for graph in graphs] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_graph_is_cut_at_attention_and_before_the_logits(family: str) -> None:
    model = build(family, mixed(8))
    cuts = cut(model._executable)
    assert [type(part) for part in cuts.parts] == [Segment, SplitOp] * LAYERS + [Segment]
    assert all(part.is_attention for part in cuts.parts[1::2])
    labels = {kernel.label: kernel.run for kernel in model._executable.kernels.values()}
    ops = [node.target for part in (*cuts.parts[::2], cuts.tail) for node in part.run.graph.nodes]
    assert labels["triton.paged_attention"] not in ops
    launched = [node.target for node in cuts.tail.run.graph.nodes if node.op == "call_function"]
    assert launched[0] is labels["triton.gather_rows"] and launched.count(labels["torch.linear"]) == 1
    read = {name for segment in cuts.parts[::2] for name in segment.inputs}
    assert "slots_0" in read and not {"seq_lens", "query_start", "logits_rows", "block_table_0"} & read


def test_ops_to_split_at_can_be_named() -> None:
    """With or without a namespace; other engines' names for attention; not what the model has not."""
    splitting = ("vllm.unified_attention_with_output", "fuseline::experts", "embedding")
    model, api = build("gpt_oss", mixed(8, splitting_ops=splitting)), FakeGraphs()
    step = mixed_step([3, 2], [3, 20], groups=2)
    model.allocate_caches([8, 8])
    want = model.run(step).logits.clone()
    capture(model, api)
    assert torch.equal(model.run(step).logits, want) and api.segment_replays == 2 * LAYERS + 2
    wrong = build("llama", mixed(8, splitting_ops=("experts",)))
    wrong.allocate_caches([8])
    with pytest.raises(ValueError, match="^splitting_ops: the model has no op 'experts'$"):
        wrong.capture_graphs(api=FakeGraphs())


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_padding_changes_neither_logits_nor_caches(family: str) -> None:
    """Padded rows hold NaN from the first attention on."""
    found = []
    for sizes in ((), (6,), (16,)):
        model, api = build(family, mixed(*sizes), "bfloat16"), FakeGraphs()
        groups = len(model.info.cache_groups)
        step = mixed_step([4, 1, 1], [4, 20, 3], groups)
        capture(model, api)
        found.append((model.run(step).logits.clone(), model.run(step).logits.clone(), *model._caches.values()))
        assert api.segment_replays == (2 * (LAYERS + 1) if sizes else 0)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_has_no_segments_is_run_op_by_op() -> None:
    """Too many tokens; a size that failed or is not there yet, though a larger one is; after stop_capture."""
    model, api = build("llama", mixed(4, 8)), FakeGraphs()
    capture(model, api)
    model.run(mixed_step([9], [9]))
    assert api.segment_replays == 0
    del model.graphs.mixed.captured[4]
    model.run(mixed_step([4], [4]))
    assert api.segment_replays == 0
    model.run(mixed_step([5], [5]))
    assert api.segment_replays == LAYERS + 1
    model.stop_capture()
    assert model.graphs is None and model.run(mixed_step([5], [5])).logits.isfinite().all()

    def fails(results: object) -> bool:
        return isinstance(results, tuple) and 4 in [
            item for item in results if isinstance(item, int)
        ]  # the first segment gives its tokens

    api = FakeGraphs(fails)
    capture(model, api)
    assert set(model.graphs.mixed.captured) == {8} and api.captured == [1]
    model.run(mixed_step([4], [4]))
    assert api.segment_replays == 0


def test_a_decode_step_that_no_whole_graph_fits_takes_segments() -> None:
    model, api = build("llama", mixed(8)), FakeGraphs()
    capture(model, api)
    model.run(mixed_step([1], [20]))
    assert api.replays == [1] and api.segment_replays == 0
    model.run(mixed_step([1, 1, 1], [20, 3, 1]))
    assert api.replays == [1] and api.segment_replays == LAYERS + 1


def test_a_step_waits_for_nothing() -> None:
    model, sampled = build("gpt_oss", mixed(8), "bfloat16"), torch.tensor([7, 9])
    capture(model, FakeGraphs())
    step, sources = mixed_step([4, 1, 1], [4, 20, 3], groups=2), torch.tensor([-1, -1, -1, -1, 0, 1]).int()
    with no_host_sync([*step.fields().values(), sources]):
        model.run(replace(step, sources=sources, sampled=sampled))


def test_logits_of_all_tokens_are_cut_to_the_wanted_rows() -> None:
    """Without keep_last_logits the graph has no tail."""
    step, found = mixed_step([4, 1], [4, 20]), []
    for disabled in ((), ("keep_last_logits",)):
        for sizes in ((), (8,)):
            model = build("llama", mixed(*sizes), disabled_passes=disabled)
            capture(model, FakeGraphs())
            found.append(model.run(step).logits.clone())
    assert found[0].shape == (2, 128)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_a_program_of_more_than_kernels_is_not_cut() -> None:
    model = build("llama", mixed(8))
    graph = model._executable.program.graph
    first = next(node for node in graph.nodes if node.op == "call_function")
    with graph.inserting_before(first):
        graph.call_method("size", (next(iter(graph.nodes)),))
    assert cut(model._executable) is None


def test_tokens_are_padded() -> None:
    """More than a program's; what was there before is gone."""
    groups, tokens, size = 2, 300, 520
    padded = {name: torch.full_like(memory, 99) for name, memory in padding({"T": 600}, groups).items()}
    assert list(padded) == ["token_ids", "positions", "rope_rows", "slot_mapping"]
    step = {name: torch.arange(memory[..., :tokens].numel()).view_as(memory[..., :tokens]) + k
            for k, (name, memory) in enumerate(padded.items())}  # fmt: skip
    pad_tokens(padded, step, size)
    for name, to in padded.items():
        assert torch.equal(to[..., :tokens], step[name]) and (to[..., size:] == 99).all()
        assert (to[..., tokens:size] == BY_FIELD[name].padding).all()


def test_sizes_of_mixed_steps() -> None:
    assert GraphConfig().resolved_mixed(2048) == MIXED_SIZES
    assert GraphConfig((8, 1, 300)).resolved_mixed(256) == (1, 8)
    assert GraphConfig((8,), mixed_sizes=(64, 16)).resolved_mixed(2048) == (16, 64)
    assert GraphConfig((8,), mixed_sizes=()).resolved_mixed(2048) == ()
    assert GraphConfig(enabled=False).resolved_mixed(2048) == ()


def launches(arch: int) -> None:
    """Graphs of many sizes, odd ones among them, then steps of as many shapes, with one and two groups of layers."""
    steps = (
        ([1], [7]), ([1] * 3, [7, 20, 3]), ([3, 1], [9, 20]), ([7, 7, 1, 1], [9, 20, 3, 4]), ([60], [60]),
        ([1] * 40, [3] * 40), ([70], [70]),
    )  # fmt: skip
    for family in ("llama", "gpt_oss"):
        model = build(family, GraphConfig((1, 2, 3, 8, 16, 24), mixed_sizes=(5, 16, 48)), "bfloat16")
        groups = len(model.info.cache_groups)
        capture(model, FakeGraphs(), 200)
        for counts, lengths in steps:
            step = mixed_step(counts, lengths, groups, width=5)
            model.run(replace(step, sources=torch.full((sum(counts),), -1).int(), sampled=torch.zeros(9).long()))


@pytest.mark.slow
def test_no_size_compiles_a_kernel_of_its_own() -> None:
    """Compiling in the middle of serving holds it up, and 35 times over it is most of the capture."""
    entries = compile_launches("test_piecewise", 90)
    found = Counter(entry["kernel"] for entry in entries)
    assert {name for name, count in found.items() if count == 1} == {
        "act_mul_kernel", "gather_kernel", "few_rows_kernel", "feed_kernel", "route_kernel", "sort_kernel",
        "combine_kernel",
    }  # fmt: skip
    assert {name: count for name, count in found.items() if count > 1} == {
        "pad_kernel": 2, "pad_tokens_kernel": 2,  # of one group of layers and of two
        "rope_cache_kernel": 2, "norm_kernel": 4,  # of either model, with and without a sum
        "gate_up_kernel": 2, "down_kernel": 2,  # of few and of many pairs an expert
        "decode_kernel": 6, "prefill_kernel": 3,  # with sinks and a window or without, for decoding only or not
    }  # fmt: skip
    assert_fits(entries)
