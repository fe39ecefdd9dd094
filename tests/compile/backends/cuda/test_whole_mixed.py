"""Steps that mix prompts and decoding as one graph each: the same as op by op, whatever they are padded to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_gpu import GPU, FakeGraphs, capture_when_allocated, no_host_sync
from paged_driver import greedy
from piecewise_cases import mixed_step
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.backends.cuda.model import CudaModel
from fuseline.compile.backends.cuda.whole_mixed import has_fixed_grids
from fuseline.compile.compiler import compile_model
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.graph_inputs import padding
from fuseline.compile.kernels.triton.batch import pad_sequences


def build(family: str, *sizes: int, dtype: str = "float32", **settings) -> CudaModel:
    graphs = GraphConfig((1,), mixed_sizes=sizes, is_mixed_whole=True)
    settings = {"max_num_seqs": 5, **settings}
    return compile_model(CompileConfig(model=str(checkpoint(family, dtype)), **settings), GPU, graphs=graphs)


def capture(model: CudaModel, api: FakeGraphs) -> None:
    model.allocate_caches([12] * len(model.info.cache_groups))
    model.capture_graphs(api=api)
    model.graphs.wait()


@pytest.mark.parametrize(("family", "sizes"), [("llama", (4, 9, 16)), ("gpt_oss", (5, 24)), ("phi3_longrope", (24,))])
def test_greedy_tokens_equal_transformers(family: str, sizes: tuple[int, ...]) -> None:
    """Every step but the longest is one replay, among memory that is NaN wherever nobody owns it or has written it."""
    model, api = build(family, *sizes), FakeGraphs()
    capture_when_allocated(model, api, [])
    prompts = make_prompts((3, 9, 20))
    assert greedy(model, prompts, 6) == truth(checkpoint(family, "float32"), prompts, 6)
    assert set(model.graphs.whole_mixed.captured) == set(sizes) and len(api.replays) >= 5


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_padding_changes_neither_logits_nor_caches(family: str) -> None:
    """Of tokens, sequences and rows; more rows than sequences are replayed in segments."""
    found, rows = [], torch.tensor([3, 4, 5])
    for sizes in ((), (6,), (16,)):
        model, api = build(family, *sizes, dtype="bfloat16"), FakeGraphs()
        capture(model, api)
        step = mixed_step([4, 1, 1], [4, 20, 3], len(model.info.cache_groups))
        some = replace(step, logits_rows=rows[:1])
        found.append((model.run(step).logits.clone(), model.run(some).logits.clone(), *model._caches.values()))
        assert len(api.replays) == (2 if sizes else 0) and api.segment_replays == 0
        assert found[-1][0].shape[0] == 3 and found[-1][1].shape[0] == 1
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_padded_step_of_single_tokens_is_none_of_decoding() -> None:
    """One sequence's only token, whose logits are not the last thing wanted; and no sequence that wants logits."""
    for lengths in ([7], [7, 1, 20]):
        found = []
        for sizes in ((), (4, 9)):
            model, api = build("llama", *sizes, dtype="bfloat16"), FakeGraphs()
            capture(model, api)
            step = mixed_step([1] * len(lengths), lengths)
            step = replace(step, logits_rows=step.logits_rows[:0])
            found.append((model.run(step).logits.clone(), *model._caches.values()))
            assert len(api.replays) == bool(sizes)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_replayed_in_segments() -> None:
    """More sequences than a step may have tokens but one, more rows, longer tables, a size that is not there."""
    model, api = build("llama", 4, 16), FakeGraphs()
    capture(model, api)
    model.run(mixed_step([2, 2], [2, 9]))
    assert api.segment_replays == 0 and len(api.replays) == 1
    inside, width = mixed_step([7, 3], [9, 3]), model.graphs.whole_mixed._inputs.width
    wide = torch.nn.functional.pad(inside.block_tables, (0, width))
    for step in (
        replace(inside, logits_rows=torch.arange(7)), mixed_step([1] * 6 + [2], [3] * 7, width=1),
        replace(inside, block_tables=wide), mixed_step([20], [20]),
    ):  # fmt: skip
        before, expected = api.segment_replays, step.token_ids.shape[0] <= 16
        model.run(step)
        assert len(api.replays) == 1 and (api.segment_replays > before) == expected
    del model.graphs.whole_mixed.captured[4]
    model.run(mixed_step([2, 2], [2, 9]))
    assert len(api.replays) == 1


def test_a_step_waits_for_nothing() -> None:
    model, api, sampled = build("gpt_oss", 8, dtype="bfloat16"), FakeGraphs(), torch.tensor([7, 9])
    capture(model, api)
    step, sources = mixed_step([4, 1, 1], [4, 20, 3], groups=2), torch.tensor([-1, -1, -1, -1, 0, 1]).int()
    with no_host_sync([*step.fields().values(), sources]):
        model.run(replace(step, sources=sources, sampled=sampled))
    assert len(api.replays) == 1


def test_logits_of_all_tokens_are_cut_to_the_wanted_rows() -> None:
    """Without keep_last_logits the graph gives those of all its tokens."""
    step, found = mixed_step([4, 1], [4, 20]), []
    for disabled in ((), ("keep_last_logits",)):
        model, api = build("llama", 8, disabled_passes=disabled), FakeGraphs()
        capture(model, api)
        found.append(model.run(step).logits.clone())
        assert len(api.replays) == 1
    assert found[0].shape == (2, 128)
    torch.testing.assert_close(found[0], found[1])


def test_attention_of_a_library_is_not_captured_with_fixed_grids() -> None:
    model, api = build("llama", 8), FakeGraphs()
    kernels = model._executable.kernels
    assert has_fixed_grids(model._executable)
    node = next(node for node, kernel in kernels.items() if kernel.label == "triton.paged_attention")
    kernels[node] = replace(kernels[node], label="flash_attn_3 | triton.paged_attention")
    assert not has_fixed_grids(model._executable)
    capture(model, api)
    assert model.graphs.whole_mixed.captured == {} and set(model.graphs.mixed.captured) == {8}


def test_sequences_are_padded() -> None:
    """Tables wider than a program's part; what was there before is gone but for columns that nobody reads."""
    groups, seqs, most, width = 2, 3, 7, 300
    padded = padding({"S": 9, "S1": 10, "R": 9, "M": 400}, groups)
    assert list(padded) == ["query_start", "seq_lens", "logits_rows", "block_tables"]
    for memory in padded.values():
        memory.fill_(99)
    step = {
        "query_start": torch.tensor([0, 4, 5, 9]).int(), "seq_lens": torch.tensor([8, 9, 7]).int(),
        "logits_rows": torch.tensor([3, 8]),
        "block_tables": torch.arange(groups * seqs * width).view(groups, seqs, width).int(),
    }  # fmt: skip
    pad_sequences(padded, step, most)
    assert padded["query_start"].tolist() == [0, 4, 5, 9, 9, 9, 9, 9, 99, 99]
    assert padded["seq_lens"].tolist() == [8, 9, 7, 0, 0, 0, 0, 99, 99]
    assert padded["logits_rows"].tolist() == [3, 8, 0, 0, 0, 0, 0, 99, 99]
    assert torch.equal(padded["block_tables"][:, :seqs, :width], step["block_tables"])
    assert (padded["block_tables"][:, seqs:] == 99).all()
