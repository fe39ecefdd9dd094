"""Passes that choose kernels for codes: caches of a byte a number, and experts of few bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pass_cases import case
from pass_serve_cases import DIM, KV_HEADS, OPS, TOKENS, K, Q, V
from torch import nn

from fuseline.compile.ops.coded import MIXED
from fuseline.compile.passes.pack_weights import pack_weights
from fuseline.compile.passes.page_attention import page_attention
from fuseline.compile.target import Target


@pytest.mark.parametrize(("flag", "dtype", "columns", "num_bytes"), [
    ("int8", torch.int8, DIM + 4, 2 * KV_HEADS * (DIM + 4)), ("fp8", torch.float8_e4m3fn, DIM, 2 * KV_HEADS * DIM),
    ("fp8_e5m2", torch.float8_e5m2, DIM, 2 * KV_HEADS * DIM), ("auto", torch.bfloat16, DIM, 4 * KV_HEADS * DIM),
])  # fmt: skip
def test_caches_of_codes(flag: str, dtype: torch.dtype, columns: int, num_bytes: int) -> None:
    found = case(lambda q, k, v: OPS.attention(q, k, v, None, 0, 1.0, 0, 0.0, True), torch.bfloat16, q=Q, k=K, v=V)
    found.ctx = replace(found.ctx, config=replace(found.ctx.config, kv_cache_dtype=flag))
    assert found.apply(page_attention) == 1
    spec = found.results[-1].specs[0]
    cache = next(node.meta["val"] for node in found.graph.graph.nodes if node.target == "v_cache_0")
    assert (cache.dtype, cache.shape[-1], spec.bytes_per_token()) == (dtype, columns, num_bytes)
    assert len(found.results[-1].constants) == (2 if spec.has_scales else 0)


@pytest.mark.parametrize(("flag", "kind", "dim", "message"), [
    ("int8", "cuda", DIM, "a cache of int8 needs a CPU"),
    ("int8", "cpu", 6, "layer 0: a cache of int8 needs heads of a multiple of 4"),
    ("fp8", "cpu", 6, "layer 0: a cache of fp8 needs heads of a multiple of 4 numbers, but they have 6 and 6"),
])  # fmt: skip
def test_caches_that_no_kernel_takes(flag: str, kind: str, dim: int, message: str) -> None:
    found = case(lambda q, k, v: OPS.attention(q, k, v, None, 0, 1.0, 0, 0.0, True), torch.bfloat16,
                 **{name: x[..., :dim].contiguous() for name, x in {"q": Q, "k": K, "v": V}.items()})  # fmt: skip
    found.ctx = replace(found.ctx, config=replace(found.ctx.config, kv_cache_dtype=flag), target=Target(kind, "", 1))
    with pytest.raises(ValueError, match=message):
        found.apply(page_attention)


class Routed(nn.Module):
    """Four experts of 16 -> 2 x 8 -> 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 16, 16)), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x, ids, weights):
        return OPS.experts.default(x, ids, weights, self.first, self.second, None, None, 0, False, 1.0, 1.0)


@pytest.mark.parametrize(("second", "expected"), [
    ("int4/8/float32/zeros", "experts_codes"),  # of another layout
    (MIXED, "experts_panels"), ("int4/24/float32", "experts_panels"), ("", "experts_panels"),
], ids=str)  # fmt: skip
def test_experts_are_codes_if_both_weights_are(second: str, expected: str) -> None:
    x, ids, weights = torch.randn(TOKENS, 16), torch.tensor([[0, 3]] * TOKENS), torch.ones(TOKENS, 2)
    found = case(Routed(), torch.float32, x=x, ids=ids, weights=weights)
    layouts = {"first": "int8/row/float32", "second": second} if second else {"first": "int8/row/float32"}
    found.ctx = replace(found.ctx, layouts=layouts)
    assert found.apply(pack_weights) == 1 and found.ops()[expected] == 1
    if expected == "experts_codes":
        shapes = {n.meta["weight"].part + n.meta["weight"].names[0]: tuple(n.meta["val"].shape)
                  for n in found.graph.graph.nodes if n.op == "get_attr"}  # fmt: skip
        assert shapes == {
            "codesfirst": (4, 1, 4, 16), "scalesfirst": (4, 1, 1, 16), "codessecond": (4, 1, 1, 16),
            "scalessecond": (4, 1, 1, 16), "zerossecond": (4, 1, 1, 16),
        }  # fmt: skip
