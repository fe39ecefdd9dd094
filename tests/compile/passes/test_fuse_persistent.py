"""Runs of ops that the persistent kernel computes: which ops form one, and one call in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from fake_gpu import GPU
from torch import Tensor, fx

from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.passes.fuse_persistent import find_runs, fuse_persistent

OPS, aten = torch.ops.fuseline, torch.ops.aten
HIDDEN = 64


class Steps:
    """A graph of calls, each traced on meta tensors."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.graph, self.held, self._dtype = fx.Graph(), {}, dtype

    def input(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype or self._dtype, device="meta")
        return node

    def weight(self, name: str, *shape: int) -> fx.Node:
        self.held[name] = (torch.randn(shape) * shape[-1] ** -0.5).to(self._dtype)
        node = self.graph.get_attr(name)
        node.meta["val"] = self.held[name].to("meta")
        return node

    def call(self, target: object, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
        return node

    def linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        return self.call(OPS.linear.default, x, weight, None)

    def add_norm(self, x: fx.Node, residual: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
        both = self.call(OPS.add_rms_norm.default, x, residual, weight, 1e-6, 0)
        return self.call(operator.getitem, both, 0), self.call(operator.getitem, both, 1)

    def module(self, *results: fx.Node) -> fx.GraphModule:
        self.graph.output(results)
        return fx.GraphModule(dict(self.held), self.graph)


def steps(dtype: torch.dtype = torch.bfloat16, between: str = "", is_computed: bool = False) -> fx.GraphModule:
    """attention's result -> product -> sum and norm -> `between` -> product -> attention."""
    s = Steps(dtype)
    x, residual = s.input("x", 1, 3, HIDDEN), s.input("residual", 1, 3, HIDDEN)
    norm, first, second = s.weight("norm", HIDDEN), s.weight("first", HIDDEN, HIDDEN), s.weight("second", 96, HIDDEN)
    attended = s.call(aten.view.default, x, [1, 3, HIDDEN])
    if is_computed:
        second = s.call(aten.neg.default, second)
    y, total = s.add_norm(s.linear(attended, first), residual, norm)
    if between == "relu":
        y = s.call(aten.relu.default, y)
    if between == "view":
        y = s.call(aten.view.default, y, [1, 3, HIDDEN])
    heads = s.call(aten.view.default, s.linear(y, second), [1, 3, 6, 16])
    return s.module(s.call(aten.tanh.default, heads), total)


def found(graph: fx.GraphModule, constants: set[str] | None = None) -> list[list[str]]:
    held = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return [[*run.steps] for run in find_runs(graph, GPU, held if constants is None else constants)]


WHOLE = ["linear_default", "add_rms_norm_default", "linear_default_1"]


@pytest.mark.parametrize("between", ("", "view"))
def test_products_and_norms_with_views_between_them_are_a_run(between: str) -> None:
    graph = steps(between=between)
    assert found(graph) == [WHOLE]
    (run,) = find_runs(graph, GPU, {"norm", "first", "second"})
    assert [node.name for node in run.inputs] == ["view_default", "residual"]
    assert [node.name for node in run.outputs] == ["getitem_1", "linear_default_1"], "views at its ends stay outside"
    assert run.first_weight == "first" and run.max_rows == 0, "nothing is fused that has not been measured"


@pytest.mark.parametrize(("graph", "constants", "runs"), [
    (steps(between="relu"), None, [WHOLE[:2]]), (steps(torch.float32), None, []),
    (steps(is_computed=True), None, [WHOLE[:2]]), (steps(), {"norm"}, []), (steps(), {"norm", "second"}, [WHOLE[1:]]),
], ids=("op between", "float32", "computed weight", "offloaded weights", "one offloaded weight"))  # fmt: skip
def test_what_is_no_step_ends_a_run(graph: fx.GraphModule, constants: set[str] | None, runs: list[list[str]]) -> None:
    assert found(graph, constants) == runs


def test_one_op_and_norms_alone_are_no_run() -> None:
    s = Steps()
    x, norm = s.input("x", 1, 3, HIDDEN), s.weight("norm", HIDDEN)
    y, total = s.add_norm(*s.add_norm(x, x, norm), norm)
    product = s.linear(s.call(aten.relu.default, y), s.weight("weight", 32, HIDDEN))
    assert found(s.module(product, total)) == []


def test_a_write_to_the_cache_begins_no_run() -> None:
    """A run's first op tells the rows of a call by its first argument."""
    s = Steps()
    caches = [s.input(name, 4, 2, 16, 32) for name in ("k_cache_0", "v_cache_0")]
    heads = [s.input(name, 1, 2, 3, 32) for name in "qkv"]
    tables = [s.input(name, 40, 32) for name in ("cos", "sin")]
    numbers = [s.input(name, 3, dtype=torch.int64) for name in ("rows", "slots")]
    weight, norm, x = s.weight("weight", HIDDEN, HIDDEN), s.weight("norm", HIDDEN), s.input("x", 1, 3, HIDDEN)
    turned = s.call(OPS.rope_cache.default, *caches, *heads, *tables, *numbers, 32, 0)
    y, total = s.add_norm(s.linear(x, weight), x, norm)
    assert found(s.module(turned, y, total)) == [["linear_default", "add_rms_norm_default"]]


def layers(count: int) -> fx.GraphModule:
    """Runs with an op of torch between them, each of which reads what the one before gives."""
    s = Steps()
    x, total = s.input("x", 1, 3, HIDDEN), s.input("residual", 1, 3, HIDDEN)
    norm = s.weight("norm", HIDDEN)
    for k in range(count):
        y, total = s.add_norm(s.linear(x, s.weight(f"weight_{k}", HIDDEN, HIDDEN)), total, norm)
        x = s.call(aten.tanh.default, y)
    return s.module(x, total)


def test_one_call_computes_a_run_in_its_place() -> None:
    graph = layers(3)
    runs = find_runs(graph, GPU, {"norm", *(f"weight_{k}" for k in range(3))})
    x, residual = (torch.randn(1, 3, HIDDEN).bfloat16() for _ in "xr")
    want, seen = graph(x, residual), []

    def note(name: str, body: Callable) -> Callable:
        def call(*args: Tensor) -> tuple:
            seen.append((name, len(args)))
            return body(*args)

        return call

    calls = [(run, note(run.first_weight, run.body(graph, {}))) for run in runs]
    fuse_persistent(calls)(graph, PassContext(CompileConfig(""), None, 0, 0))
    graph.graph.lint()
    graph.recompile()
    assert all(torch.equal(*pair) for pair in zip(graph(x, residual), want, strict=True))
    assert seen == [(f"weight_{k}", 2) for k in range(3)]
    assert OPS.linear.default not in {node.target for node in graph.graph.nodes}
