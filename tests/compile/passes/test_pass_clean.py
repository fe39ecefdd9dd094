"""Passes of the first stage: one spelling for everything, and the same numbers as before."""

from __future__ import annotations

import torch
from pass_cases import DTYPES, case
from torch import nn

from fuseline.compile.passes.clean import canonicalize, merge_equal, remove_noops
from fuseline.compile.passes.find_linear import find_linear

X = torch.randn(3, 8)


@DTYPES
def test_what_does_nothing_goes(dtype: torch.dtype) -> None:
    def module(x):
        y = torch.nn.functional.dropout(x.contiguous().to(x.dtype) * 1.0, 0.5, training=False)
        return y[:, :].clone() + 1

    found = case(module, dtype, x=X)
    before = found.run()
    assert found.apply(remove_noops) >= 5
    assert found.ops() == {"aten.add.Tensor": 1} and torch.equal(found.run(), before)


@DTYPES
def test_what_does_something_stays(dtype: torch.dtype) -> None:
    def module(x):
        return (x[1:] * 1.5, x[:, ::2] + 0, x.to(torch.float16))

    found = case(module, dtype, x=X)
    before = found.run()
    found.apply(remove_noops)
    assert found.ops()["prims.convert_element_type"] == 1 and found.ops()["aten.mul.Tensor"] == 1
    assert found.ops()["aten.slice.Tensor"] >= 2
    assert all(torch.equal(a, b) for a, b in zip(found.run(), before, strict=True))


@DTYPES
def test_parts_without_features_go(dtype: torch.dtype) -> None:
    def module(x):
        return torch.cat((x.exp(), x[:, 8:]), -1), torch.cat((x.exp(), x[:, 7:]), -1), torch.cat((x, x[:0]), 0)

    found = case(module, dtype, x=X)
    before = found.run()
    found.apply(remove_noops)
    assert found.ops()["aten.cat"] == 1
    assert all(torch.equal(a, b) for a, b in zip(found.run(), before, strict=True))


class Spelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(8))
        self.weight = nn.Parameter(torch.empty(8, 6))
        self.bias = nn.Parameter(torch.empty(6))

    def forward(self, x):
        left, right = torch.addmm(self.bias, self.scale * x, self.weight).chunk(2, -1)
        return left - right


@DTYPES
def test_one_spelling(dtype: torch.dtype) -> None:
    found = case(Spelled(), dtype, x=X)
    before = found.run()
    assert found.apply(canonicalize) == 2 and found.apply(find_linear) == 1
    ops = found.ops()
    assert ops["linear"] == 1 and ops["aten.split_with_sizes"] == 1
    assert "aten.addmm" not in ops and "aten.chunk" not in ops
    product = next(n for n in found.graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert product.args[0].op == "placeholder" and product.args[1].op == "get_attr"
    torch.testing.assert_close(found.run(), before)


@DTYPES
def test_products_of_activations_and_computed_weights_stay(dtype: torch.dtype) -> None:
    def module(x, y):
        return torch.addmm(x[0], y * x, x.t() @ x)

    found = case(module, dtype, x=X, y=X + 1)
    before = found.run()
    assert found.apply(canonicalize) == 0
    assert found.ops()["aten.addmm"] == 1 and torch.equal(found.run(), before)


@DTYPES
def test_equal_computations_run_once(dtype: torch.dtype) -> None:
    def module(x):
        return torch.exp(x) + torch.exp(x) * torch.exp(x + 0.5)

    found = case(module, dtype, x=X)
    before = found.run()
    assert found.apply(merge_equal) == 1
    assert found.ops()["aten.exp"] == 2 and torch.equal(found.run(), before)


def test_writes_are_never_merged() -> None:
    cache, new = torch.zeros(2, 1, 4, 3), torch.ones(1, 1, 1, 3)

    def module(cache, new, slots):
        torch.ops.fuseline.write_cache(cache, cache.clone(), new, new, slots)
        torch.ops.fuseline.write_cache(cache, cache.clone(), new, new, slots)
        return new + 1

    found = case(module, torch.float32, cache=cache, new=new, slots=torch.tensor([2]))
    found.apply(merge_equal)
    assert found.ops()["write_cache"] == 2
