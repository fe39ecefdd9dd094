"""Embeddings in place of those of the tokens, where capture has found them."""

from __future__ import annotations

import pytest
import torch
from pass_cases import DTYPES, Case, case
from torch import Tensor, nn
from zoo import checkpoint

from fuseline.compile.capture.export import capture_model
from fuseline.compile.config import CompileConfig
from fuseline.compile.passes.feed_embeds import feed_embeds
from fuseline.compile.specs import FeedSpec

IDS = torch.tensor([[3, 1, 4, 1, 5]])
ROWS = torch.tensor([1, 4])


class Embedded(nn.Module):
    """Embeddings of tokens, scaled, with those of positions added; read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(8, 16), nn.Embedding(8, 16)

    def forward(self, token_ids: Tensor) -> Tensor:
        found = self.tokens(token_ids) * 4.0
        return found + self.positions(torch.arange(5)[None]) + found.abs()


def marked(dtype: torch.dtype, target: object) -> Case:
    found = case(Embedded(), dtype, token_ids=IDS)
    for node in found.graph.graph.find_nodes(op="call_function", target=target):
        node.meta["is_embedded"] = True
    return found


@DTYPES
def test_given_embeddings_take_the_place_of_the_tokens(dtype: torch.dtype) -> None:
    found = marked(dtype, torch.ops.aten.mul.Tensor)
    tokens, positions = found.values["tokens.weight"], found.values["positions.weight"]
    embeds = torch.randn(2, 16)
    without = found.run()
    assert found.apply(feed_embeds) == 1 and found.results[-1].specs == (FeedSpec(16),)
    expected = (tokens[IDS] * 4.0).index_copy(1, ROWS, embeds.to(dtype)[None])
    expected = expected + positions[:5] + expected.abs()
    assert torch.equal(found.run(embed_rows=ROWS, embeds=embeds), expected)
    assert torch.equal(found.run(embed_rows=ROWS[:0], embeds=embeds[:0]), without)


def test_embeddings_that_were_not_found_are_refused() -> None:
    found = case(Embedded(), torch.float32, token_ids=IDS)
    with pytest.raises(ValueError, match="the embeddings of the tokens are not found"):
        found.apply(feed_embeds)


@pytest.mark.parametrize(("family", "op"), [
    ("llama", "aten.embedding.default"), ("gemma2", "aten.mul.Tensor"), ("gpt2", "aten.embedding.default"),
])  # fmt: skip
def test_capture_finds_what_transformers_calls_inputs_embeds(family: str, op: str) -> None:
    """The scale is part of gemma2's; gpt2 adds its positions afterwards."""
    captured = capture_model(CompileConfig(model=str(checkpoint(family))))
    (node,) = (node for node in captured.graph.graph.nodes if node.meta.get("is_embedded"))
    source = node if op == "aten.embedding.default" else node.args[0]
    while source.op != "placeholder":
        source = source.args[1 if source.target is torch.ops.aten.embedding.default else 0]
    assert str(node.target) == op and source.target == "token_ids"
