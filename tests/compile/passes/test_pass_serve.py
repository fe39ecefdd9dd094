"""Passes that join, serve and lower: the same numbers, paged or not, and nothing joined that only looks alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pass_cases import DTYPES, case
from pass_serve_cases import (
    DIM,
    HEADS,
    KV_HEADS,
    OPS,
    TOKENS,
    K,
    Q,
    V,
    attend,
    rope_case,
    turned_alike,
)
from torch import Tensor, nn

from fuseline.compile.graph.graph_pass import GraphPass
from fuseline.compile.passes.find_linear import find_linear
from fuseline.compile.passes.fuse_add_norm import fuse_add_norm
from fuseline.compile.passes.fuse_rope_cache import fuse_rope_cache
from fuseline.compile.passes.join_linears import join_linears
from fuseline.compile.passes.keep_last_logits import keep_last_logits
from fuseline.compile.passes.pack_weights import pack_weights
from fuseline.compile.passes.page_attention import page_attention
from fuseline.compile.passes.tap_hidden import tap_hidden
from fuseline.compile.passes.widen_logits import widen_logits
from fuseline.compile.specs import CacheGroup, CacheSpec, TapSpec

X = torch.randn(1, TOKENS, 16)


def heads(x: Tensor, num: int) -> Tensor:
    return x.view(1, -1, num, DIM).transpose(1, 2)


# join_linears


class Attention(nn.Module):
    """Only q has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, HEADS * DIM)
        self.k = nn.Linear(16, KV_HEADS * DIM, bias=False)
        self.v = nn.Linear(16, KV_HEADS * DIM, bias=False)

    def forward(self, x):
        return attend(heads(self.q(x), HEADS), heads(self.k(x), KV_HEADS), heads(self.v(x), KV_HEADS))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)

    def forward(self, x):
        return OPS.act_mul(self.gate(x), self.up(x), 1)


class TwoInputs(Gated):
    def forward(self, x):
        return OPS.act_mul(self.gate(x), self.up(x + 1), 1)


class UsedTwice(Gated):
    def forward(self, x):
        gate = self.gate(x)
        return OPS.act_mul(gate, self.up(x), 1) + gate


class TwoConsumers(Gated):
    """As a router beside a branch: one input, but the results never meet in a gated product."""

    def forward(self, x):
        return self.gate(x) * self.up(x)


@DTYPES
@pytest.mark.parametrize("module, sizes", [(Attention, [32, 16, 16]), (Gated, [24, 24])])
def test_linears_of_one_consumer_are_one(module: type[nn.Module], sizes: list[int], dtype: torch.dtype) -> None:
    found = case(module(), dtype, x=X)
    before = found.run()
    found.apply(find_linear)
    assert found.apply(join_linears) == 1
    assert found.ops()["linear"] == 1
    split = next(n for n in found.graph.graph.nodes if n.target is torch.ops.aten.split_with_sizes.default)
    assert split.args[1] == sizes
    torch.testing.assert_close(found.run(), before)


@DTYPES
@pytest.mark.parametrize("module", [TwoInputs, UsedTwice, TwoConsumers])
def test_other_linears_stay_apart(module: type[nn.Module], dtype: torch.dtype) -> None:
    found = case(module(), dtype, x=X)
    before = found.run()
    found.apply(find_linear)
    assert found.apply(join_linears) == 0 and found.ops()["linear"] == 2
    assert torch.equal(found.run(), before)


# fuse_add_norm


class AddNorm(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16))
        self.function = function

    def forward(self, x, y):
        total = self.function(x, y)
        return OPS.rms_norm(total, self.weight, 1e-6, 0), F.layer_norm(total * 2, (16,)), total


@DTYPES
def test_a_sum_and_its_norm_are_one(dtype: torch.dtype) -> None:
    found = case(AddNorm(lambda x, y: x + y), dtype, x=X, y=X.exp())
    before = found.run()
    assert found.apply(fuse_add_norm) == 1
    assert found.ops()["add_rms_norm"] == 1 and "aten.add.Tensor" not in found.ops()
    assert all(torch.equal(a, b) for a, b in zip(found.run(), before, strict=True))


@DTYPES
@pytest.mark.parametrize(
    "function",
    [lambda x, y: torch.add(x, y, alpha=2), lambda x, y: x + y[:, :1], lambda x, y: x + 1.0, lambda x, y: x * y],
    ids=["scaled", "broadcast", "number", "product"],
)
def test_other_sums_stay(function: Callable, dtype: torch.dtype) -> None:
    found = case(AddNorm(function), dtype, x=X, y=X.exp())
    before = found.run()
    assert found.apply(fuse_add_norm) == 0
    assert all(torch.equal(a, b) for a, b in zip(found.run(), before, strict=True))


# page_attention, fuse_rope_cache

SLOPES = 2.0 ** -torch.arange(HEADS)
SLOTS = torch.tensor([16 + 3, 16 + 4, 16 + 5, 16 + 6, 16 + 7, 16 + 8]) - 3


def metadata(dtype: torch.dtype, num_layers: int, num_groups: int) -> dict[str, Tensor]:
    """One sequence of TOKENS tokens in block 1."""
    caches = {f"{n}_cache_{i}": torch.zeros(3, KV_HEADS, 16, DIM, dtype=dtype) for n in "kv" for i in range(num_layers)}
    groups = {f"slots_{g}": SLOTS for g in range(num_groups)}
    tables = {f"block_table_{g}": torch.tensor([[1]], dtype=torch.int32) for g in range(num_groups)}
    lengths = torch.tensor([TOKENS], dtype=torch.int32)
    return caches | groups | tables | {"seq_lens": lengths, "query_start": torch.tensor([0, TOKENS]).int()}


@DTYPES
def test_attention_is_paged_by_window(dtype: torch.dtype) -> None:
    def module(q, k, v):
        return attend(q, k, v, 0), attend(q, k, v, 1, window=3), attend(q.exp(), v, k, 2)

    found = case(module, dtype, q=Q, k=K, v=V)
    before = found.run()
    assert found.apply(page_attention) == 3
    assert found.ops()["paged_attention"] == 3 == found.ops()["write_cache"] and "attention" not in found.ops()
    name = str(dtype).removeprefix("torch.")
    assert found.results[-1].specs == (
        CacheSpec(0, KV_HEADS, DIM, DIM, name, 0), CacheSpec(1, KV_HEADS, DIM, DIM, name, 3),
        CacheSpec(2, KV_HEADS, DIM, DIM, name, 0), CacheGroup(0, (0, 2)), CacheGroup(3, (1,)),
    )  # fmt: skip
    after = found.run(**metadata(dtype, 3, 2))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@DTYPES
def test_layers_of_the_same_keys_and_values_share_a_cache(dtype: torch.dtype) -> None:
    def module(q, k, v):
        return attend(q, k, v, 0), attend(q, k, v, 1, window=3), attend(q.exp(), k, v, 2)

    found = case(module, dtype, q=Q, k=K, v=V)
    before = found.run()
    assert found.apply(page_attention) == 3
    assert found.ops()["paged_attention"] == 3 and found.ops()["write_cache"] == 2
    assert [spec.layer for spec in found.results[-1].specs[:2]] == [0, 1]
    assert found.results[-1].specs[2:] == (CacheGroup(0, (0,)), CacheGroup(3, (1,)))
    after = found.run(**metadata(dtype, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@DTYPES
def test_chunks_keep_as_many_keys_as_windows(dtype: torch.dtype) -> None:
    def module(q, k, v, slopes):
        return OPS.attention(q, k, v, None, 0, 0.5, 0, 0.0, True, slopes, 4), attend(q, v, k, 1, window=4)

    found = case(module, dtype, q=Q, k=K, v=V, slopes=SLOPES)
    before = found.run()
    assert found.apply(page_attention) == 2
    assert [spec.window for spec in found.results[-1].specs] == [4, 4, 4]
    after = found.run(**metadata(dtype, 2, 1))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_attention_to_later_tokens_cannot_be_paged() -> None:
    found = case(lambda q, k, v: attend(q, k, v, 4, causal=False), torch.float32, q=Q, k=K, v=V)
    with pytest.raises(ValueError, match="layer 4: attention that is not causal"):
        found.apply(page_attention)


def turned_by_other_tables(q, k, v, rows, cos, sin, other):
    return attend(OPS.rope(q, cos, sin, rows, DIM, 0), OPS.rope(k, cos, other, rows, DIM, 0), v)


def turned_in_part(q, k, v, rows, cos, sin, other):
    return attend(OPS.rope(q, cos, sin, rows, DIM, 0), k, v) + other[0, 0]


def turned_and_used_again(q, k, v, rows, cos, sin, other):
    turned = OPS.rope(q, cos, sin, rows, DIM, 0)
    return attend(turned, OPS.rope(k, cos, sin, rows, DIM, 0), v) + turned.transpose(1, 2) + other[0, 0]


@DTYPES
def test_rotation_and_write_are_one(dtype: torch.dtype) -> None:
    found = rope_case(turned_alike, dtype)
    before = found.run()
    assert found.apply(page_attention, fuse_rope_cache) == 1
    assert found.ops()["rope_cache"] == 1 and not {"rope", "write_cache"} & set(found.ops())
    assert torch.equal(found.run(**metadata(dtype, 1, 1)), before)


@DTYPES
@pytest.mark.parametrize("function", [turned_by_other_tables, turned_in_part, turned_and_used_again])
def test_other_rotations_stay(function: Callable, dtype: torch.dtype) -> None:
    found = rope_case(function, dtype)
    before = found.run()
    assert found.apply(page_attention, fuse_rope_cache) == 0
    assert torch.equal(found.run(**metadata(dtype, 1, 1)), before)


# keep_last_logits


class Head(nn.Module):
    def __init__(self, before: Callable, after: Callable = lambda y: y) -> None:
        super().__init__()
        self.head, self.weight = nn.Linear(16, 40), nn.Parameter(torch.empty(16))
        self.before, self.after = before, after

    def forward(self, x, y):
        return self.after(self.head(self.before(x, y, self.weight)))


def norm(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return OPS.rms_norm(x * y, weight, 1e-6, 0)


def sum_and_norm(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return OPS.add_rms_norm(x, y, weight, 1e-6, 0)[0]


def over_all_tokens(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) * y


@DTYPES
@pytest.mark.parametrize("before", [norm, sum_and_norm, over_all_tokens])
@pytest.mark.parametrize("after", [lambda y: y, lambda y: torch.tanh(y / 30.0) * 30.0], ids=["plain", "capped"])
def test_only_sampled_rows_reach_the_head(before: Callable, after: Callable, dtype: torch.dtype) -> None:
    found = case(Head(before, after), dtype, x=X, y=X.exp())
    whole, rows = found.run(), torch.tensor([1, 5])
    found.apply(keep_last_logits)
    order = [str(n.target) for n in found.graph.graph.nodes if n.op == "call_function"]
    gather = order.index("fuseline.gather_rows.default")
    normed = [at for at, name in enumerate(order) if "norm" in name]
    assert all(at > gather for at in normed)
    torch.testing.assert_close(found.run(logits_rows=rows), whole[:, rows])


@DTYPES
def test_a_norm_that_others_read_keeps_all_rows(dtype: torch.dtype) -> None:
    class Shared(Head):
        def forward(self, x, y):
            hidden = norm(x, y, self.weight)
            return self.head(hidden - hidden.mean(1, keepdim=True))

    found = case(Shared(norm), dtype, x=X, y=X.exp())
    whole, rows = found.run(), torch.tensor([0, 3])
    found.apply(keep_last_logits)
    torch.testing.assert_close(found.run(logits_rows=rows), whole[:, rows])


@pytest.mark.parametrize("graph_pass", [keep_last_logits, tap_hidden])
def test_logits_of_two_heads_are_refused(graph_pass: GraphPass) -> None:
    class Two(Head):
        def forward(self, x, y):
            return self.head(x) + self.head(y)

    with pytest.raises(ValueError, match="do not come from one linear"):
        case(Two(norm), torch.float32, x=X, y=X).apply(graph_pass)


# tap_hidden


@DTYPES
@pytest.mark.parametrize("after", [lambda y: y, lambda y: torch.tanh(y / 30.0) * 30.0], ids=["plain", "capped"])
def test_hidden_states_are_what_the_head_reads(after: Callable, dtype: torch.dtype) -> None:
    """Of the rows that have logits, and in the model's dtype while logits become fp32."""
    found, rows = case(Head(norm, after), dtype, x=X, y=X.exp()), torch.tensor([1, 5])
    whole = found.run()
    found.apply(find_linear, keep_last_logits)
    assert found.apply(tap_hidden) == 1 and found.results[-1].specs == (TapSpec(16),)
    found.apply(widen_logits)
    logits, hidden = found.run(logits_rows=rows)
    assert logits.dtype == torch.float32 and hidden.dtype == dtype
    torch.testing.assert_close(logits, whole[:, rows].float())
    torch.testing.assert_close(hidden, norm(*found.inputs.values(), found.values["weight"])[:, rows])


# pack_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)

    def forward(self, ids):
        return F.linear(self.embed(ids), self.embed.weight)


@DTYPES
def test_weights_are_packed_once(dtype: torch.dtype) -> None:
    found = case(Tied(), dtype, ids=torch.tensor([[3, 39, 0]]))
    before = found.run()
    assert found.apply(find_linear) == 1 and found.apply(pack_weights) == 2
    found.apply(widen_logits)
    assert found.ops()["linear_panels"] == 1 == found.ops()["embedding_panels"]
    constants = [n for n in found.graph.graph.nodes if n.op == "get_attr"]
    assert len(constants) == 1 and constants[0].meta["val"].shape == (3, 16, 16)
    after = found.run()
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before.float())


@DTYPES
def test_computed_weights_are_not_packed(dtype: torch.dtype) -> None:
    found = case(lambda x, y: F.linear(x, y[0]), dtype, x=X, y=X.exp())
    before = found.run()
    assert found.apply(find_linear) == 1 and found.apply(pack_weights) == 0 and found.ops()["aten.linear"] == 1
    found.apply(widen_logits)
    torch.testing.assert_close(found.run(), before.float())
