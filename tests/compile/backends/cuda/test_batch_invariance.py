"""A row's bits whatever else is in its batch, when that is asked for: kernels, the pass, whole models."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from cuda_target_cases import count_kernels
from fake_gpu import GPU, FakeGraphs
from native_fixtures import FLOATS
from ops_cases import assert_close
from pass_cases import case
from piecewise_cases import mixed_step
from torch import nn
from triton_attention_cases import Batch
from triton_interpreter import assert_fits, compile_launches
from zoo import checkpoint, make_prompts, truth

from fuseline.compile.backends.cuda.model import CudaModel
from fuseline.compile.compiler import compile_model, optimize
from fuseline.compile.config import CompileConfig, GraphConfig
from fuseline.compile.kernels.triton.attention import attention
from fuseline.compile.kernels.triton.experts import experts_invariant
from fuseline.compile.kernels.triton.matmul import TILES, matmul
from fuseline.compile.kernels.triton.tile import Tile
from fuseline.compile.ops import codes
from fuseline.compile.ops.library import Make
from fuseline.compile.ops.registry import registry
from fuseline.compile.ops.rope import FP8
from fuseline.compile.passes.find_linear import find_linear
from fuseline.compile.passes.make_batch_invariant import make_batch_invariant

ROWS = (1, 3, 17, 64)
paged_attention_invariant = partial(attention, prefill_from=1)


def make(dtype: torch.dtype) -> Make:
    return Make(dtype, torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("num_out", "num_in"), [(130, 75), (64, 256)])
def test_a_row_of_a_linear_does_not_depend_on_the_others(num_out: int, num_in: int, dtype: torch.dtype) -> None:
    m = make(dtype)
    x, weight, bias = m.normal(64, num_in), m.normal(num_out, num_in, scale=0.1), m.normal(num_out)
    whole = matmul(x, weight, bias)
    for rows in ROWS:
        assert torch.equal(matmul(x[:rows], weight, bias), whole[:rows])
        # Elsewhere in its tile.
        assert torch.equal(matmul(x[64 - rows :], weight, bias), whole[64 - rows :])


@pytest.mark.parametrize("tile", [None, *TILES, Tile(16, 16, 16, 1, 1)], ids=str)
def test_a_linear_of_many_tiles_is_the_reference(tile: Tile | None) -> None:
    """More tiles of rows than go together, and an odd number of them; views; nothing at all."""
    m = make(torch.bfloat16)
    x, weight = m.normal(300, 2 * 75)[:, ::2], m.normal(40, 75, scale=0.1)
    want = torch.nn.functional.linear(x.double(), weight.double()).bfloat16()
    assert_close(matmul(x, weight, tile=tile), want, 12.0)
    assert_close(matmul(x[None, :7], weight.T.contiguous().T, tile=tile), want[None, :7], 12.0)
    assert matmul(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_token_of_experts_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """From a pair or two an expert to more than the tiles of few pairs are for."""
    m = make(dtype)
    x, first, second = m.normal(64, 40), m.normal(3, 96, 40, scale=0.2), m.normal(3, 40, 48, scale=0.2)
    ids = torch.stack([m.order(3)[:2] for _ in range(64)])
    weights = m.normal(64, 2).abs()
    args = (first, second, None, None, codes.EXPERT_ACTS["silu"], False, 0.0, 0.0)
    whole = experts_invariant(x, ids, weights, *args)
    for rows in ROWS:
        assert torch.equal(experts_invariant(x[:rows], ids[:rows], weights[:rows], *args), whole[:rows])


@pytest.mark.parametrize("window", (0, 20))
def test_a_token_of_attention_does_not_depend_on_its_chunk(window: int) -> None:
    """Its whole prompt, a chunk of it, or alone as in decoding, in a batch of others."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = Batch([150], [150], dtype=dtype)
        want = whole.run(window=window, prefill_from=1)[0]
        for end, count in ((150, 1), (150, 37), (97, 2), (64, 64)):
            part = Batch([40, 150], [5, 150], dtype=dtype)
            part.lengths, part.counts = [40, end], [5, count]
            part.keys[1], part.values[1], part.k_cache, part.v_cache = (
                whole.keys[0], whole.values[0], whole.k_cache, whole.v_cache
            )  # fmt: skip
            part.queries[1] = whole.queries[0][end - count : end]
            part.table = torch.cat((whole.table, whole.table))
            found = part.run(window=window, prefill_from=1)[1]
            assert torch.equal(found, want[end - count : end]), (dtype, end, count)


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_scales_of_a_coded_cache_are_multiplied(fp8: torch.dtype) -> None:
    op = registry()["paged_attention_invariant"]
    q, k_cache, v_cache, *rest = next(iter(op.inputs(make(torch.float32))))
    coded = [cache.to(fp8) for cache in (k_cache, v_cache)]
    scales = torch.tensor([0.5]), torch.tensor([3.0])
    found = paged_attention_invariant(q, *coded, *rest, *scales)
    torch.testing.assert_close(found, op.reference(q, *coded, *rest, *scales), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, paged_attention_invariant(q, *coded, *rest))


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.second(self.first(x)), torch.ones(4, 2))


def test_the_pass_takes_linears_and_nothing_else() -> None:
    """Near miss: a product of two values is none of a weight."""
    products = case(Products(), torch.float32, x=torch.randn(3, 8))
    want = products.run()
    assert products.apply(find_linear) == products.apply(make_batch_invariant) == 2
    ops = products.ops()
    assert ops["linear_invariant"] == 2 and ops["aten.matmul"] == 1 and "linear" not in ops
    torch.testing.assert_close(products.run(), want)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_nothing_that_depends_on_the_batch_is_left(family: str) -> None:
    config = CompileConfig(model=str(checkpoint(family, "bfloat16")), batch_invariant=True)
    captured, _ = optimize(config, GPU)
    found = count_kernels(captured.graph)
    assert found["triton.linear_invariant"] == (13 if family == "llama" else 10)
    assert found["triton.paged_attention_invariant"] == 3
    assert found["triton.experts_invariant"] == (3 if family == "gpt_oss" else 0)
    assert not any("torch.linear" in label or label in ("triton.experts", "triton.paged_attention") for label in found)


def build(family: str, dtype: str, graphs: GraphConfig | None = None) -> CudaModel:
    config = CompileConfig(model=str(checkpoint(family, dtype)), batch_invariant=True)
    model = compile_model(config, GPU, graphs=graphs)
    model.allocate_caches([16] * len(model.info.cache_groups))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_logits_do_not_depend_on_the_batch(family: str) -> None:
    """A prompt of 20 alone at once, in two chunks beside others, and with its last token decoded, replayed or not."""
    model = build(family, "bfloat16", GraphConfig((4,), mixed_sizes=(24,)))
    groups = len(model.info.cache_groups)

    def last_row(*steps: tuple[list[int], list[int]]) -> torch.Tensor:
        for cache in model._caches.values():
            cache.zero_()
        return [model.run(mixed_step(counts, lengths, groups)).logits[0].clone() for counts, lengths in steps][-1]

    alone = last_row(([20], [20]))
    chunked = (([13, 3, 2], [13, 3, 2]), ([7, 1], [20, 4]))
    decoded = (([19, 1], [19, 1]), ([1, 1, 1], [20, 2, 1]))
    assert torch.equal(last_row(*chunked), alone) and torch.equal(last_row(*decoded), alone)
    api = FakeGraphs()
    model.capture_graphs(api=api)
    model.graphs.wait()
    assert torch.equal(last_row(*chunked), alone) and torch.equal(last_row(*decoded), alone)
    assert api.replays and api.segment_replays


@pytest.mark.slow
def test_greedy_tokens_equal_transformers() -> None:
    from paged_driver import greedy

    prompts = make_prompts((3, 9, 20))
    for family in ("llama", "gpt_oss"):
        assert greedy(build(family, "float32"), prompts, 6) == truth(checkpoint(family, "float32"), prompts, 6)


def launches(arch: int) -> None:
    """The products of Llama 8B, few and many rows; what a step of small models launches."""
    weights = [torch.empty(n, k, dtype=torch.bfloat16) for n, k in ((6144, 4096), (28672, 4096), (128256, 4096))]
    for rows in (1, 3, 16, 64, 100):
        for weight in weights:
            matmul(torch.empty(rows, 4096, dtype=torch.bfloat16), weight)
    for tile in TILES:
        matmul(torch.empty(64, 4096, dtype=torch.bfloat16), weights[0], tile=tile)
    matmul(torch.empty(3, 4096), torch.empty(256, 4096), torch.empty(256))
    for family in ("llama", "gpt_oss") if arch == 90 else ():
        model = build(family, "bfloat16", GraphConfig((4,), mixed_sizes=(8,)))
        groups = len(model.info.cache_groups)
        model.capture_graphs(api=FakeGraphs())
        model.graphs.wait()
        for counts, lengths in (([1, 1], [9, 20]), ([3, 2], [9, 20])):
            model.run(mixed_step(counts, lengths, groups))


@pytest.mark.slow
def test_every_kernel_compiles() -> None:
    """A product is compiled once for its weight, whatever the number of rows."""
    entries = compile_launches("test_batch_invariance", 80, 90, 100)
    names = Counter(entry["kernel"] for entry in entries if entry["arch"] == 80)
    assert names == {"matmul_kernel": 3 + len(TILES) + 1}
    assert "decode_kernel" not in {entry["kernel"] for entry in entries}
    assert_fits(entries)
