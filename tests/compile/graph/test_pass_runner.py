"""The runner: names of passes, and what must hold at the edge of every stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pass_cases import Case, case
from torch import Tensor, fx

from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.runner import PassError, Stages, run_passes
from fuseline.compile.graph.spec import SpecError
from fuseline.compile.passes.clean import merge_equal, remove_noops
from fuseline.compile.passes.page_attention import page_attention

OPS = torch.ops.fuseline
aten = torch.ops.aten
Q = torch.randn(1, 2, 5, 8)
DONE = PassResult(1)


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = OPS.attention(q, k, v, None, 0, 0.5, 0, 0.0, True)
    return OPS.attention(first.transpose(1, 2) * 1.0, v, k, None, 1, 0.5, 0, 0.0, True)


def model(disabled: tuple[str, ...] = ()) -> Case:
    return case(two_layers, torch.float32, disabled, q=Q, k=Q + 1, v=Q - 1)


def find(graph: fx.GraphModule, target: Callable) -> fx.Node:
    return next(node for node in graph.graph.nodes if node.target is target)


def run(stages: Stages, disabled: tuple[str, ...] = ()):
    made = model(disabled)
    return run_passes(made.graph, stages, made.ctx)


# passes and their names


def test_reports_say_what_each_pass_did() -> None:
    result = run((("clean", (remove_noops, merge_equal)), ("serve", (page_attention,))))
    assert [(r.stage, r.name, r.matches) for r in result.reports] == [
        ("clean", "remove_noops", 1), ("clean", "merge_equal", 0), ("serve", "page_attention", 2),
    ]  # fmt: skip
    assert (result.reports[0].ops_before, result.reports[0].ops_after) == (4, 3)
    assert result.stage_ops["clean"] == {"attention": 2, "aten.transpose.int": 1}
    assert result.stage_ops["serve"] == {"paged_attention": 2, "write_cache": 2, "aten.transpose.int": 1}
    assert [spec.layer for spec in result.specs[:2]] == [0, 1] and result.specs[2].layers == (0, 1)


def test_a_disabled_pass_leaves_the_graph_alone() -> None:
    result = run((("clean", (remove_noops, merge_equal)),), disabled=("remove_noops",))
    assert [report.name for report in result.reports] == ["merge_equal"]
    assert result.stage_ops["clean"]["aten.mul.Tensor"] == 1


def test_a_pass_that_does_not_exist_cannot_be_disabled() -> None:
    with pytest.raises(ValueError, match="^there is no pass 'merge_all'; passes: merge_equal, remove_noops$"):
        run((("clean", (remove_noops, merge_equal)),), disabled=("merge_all",))


def refuses(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    raise ValueError("windows of layer 3 differ")


def fails(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    raise KeyError("val")


def leaves_a_value_without_maker(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    made = find(graph, OPS.attention.default)
    user = next(iter(made.users))
    made.append(user)
    made.prepend(user)
    return DONE


def test_a_pass_that_raises_is_named() -> None:
    with pytest.raises(PassError, match="^refuses: windows of layer 3 differ$"):
        run((("fuse", (refuses,)),))
    with pytest.raises(PassError, match="^fails: KeyError: 'val'$") as caught:
        run((("fuse", (fails,)),))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_graph_out_of_order_is_the_fault_of_its_pass() -> None:
    with pytest.raises(PassError, match="^leaves_a_value_without_maker: RuntimeError: Argument 'attention"):
        run((("fuse", (leaves_a_value_without_maker,)),))


# edges of stages


def loses_a_layer(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    node = find(graph, OPS.attention.default)
    node.replace_all_uses_with(node.args[0].graph.find_nodes(op="placeholder", target="q")[0])
    return DONE


def doubles_a_layer(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    node = graph.graph.find_nodes(op="call_function", target=OPS.attention.default)[1]
    node.update_arg(4, 0)
    return DONE


def forgets_a_meta_value(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    del find(graph, OPS.attention.default).meta["val"]
    return DONE


def adds_a_constant_from_nowhere(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    node = find(graph, OPS.attention.default)
    graph.register_buffer("new", torch.empty(1, device="meta"))
    with graph.graph.inserting_before(node):
        constant = graph.graph.create_node("get_attr", "new")
    constant.meta["val"] = graph.new
    node.update_arg(3, constant)
    return DONE


def pages_nothing(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    return PassResult(0)


def writes_after_reading(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    find(graph, OPS.paged_attention.default).append(find(graph, OPS.write_cache.default))
    return DONE


def reads_the_cache_of_another_layer(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    first, second = graph.graph.find_nodes(op="call_function", target=OPS.paged_attention.default)
    second.args = (second.args[0], *first.args[1:3], *second.args[3:])
    return DONE


def brings_an_op_without_kernel(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    node = find(graph, aten.transpose.int)
    with graph.graph.inserting_after(node):
        wide = graph.graph.call_function(OPS.experts.default, (node,) * 5 + (None, None, 0, False, 1.0, 7.0))
    return rewire(node, wide)


def brings_a_call_of_python(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    node = find(graph, aten.transpose.int)
    with graph.graph.inserting_after(node):
        wide = graph.graph.call_function(torch.square, (node,))
    return rewire(node, wide)


def rewire(node: fx.Node, new: fx.Node) -> PassResult:
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    return DONE


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (loses_a_layer, r"attention of layers \[1\] instead of \[0, 1\]"),
        (doubles_a_layer, r"attention of layers \[0, 0\] instead of \[0, 1\]"),
        (forgets_a_meta_value, "attention has no meta value"),
        (adds_a_constant_from_nowhere, "nothing says where constant new comes from"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("stage", ["clean", "recognize", "fuse"])
def test_what_an_early_stage_may_not_do(broken: Callable, message: str, stage: str) -> None:
    with pytest.raises(SpecError, match=f"^after stage {stage}: {message}"):
        run(((stage, (remove_noops, broken)),))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((pages_nothing,), r"attention of layers \[0, 1\] is not paged \(and [13] more\)"),
        ((loses_a_layer, page_attention), r"caches that are read: \['k_cache_1 and v_cache_1'\] instead of"),
        (
            (page_attention, writes_after_reading),
            "paged_attention_default reads k_cache_0 and v_cache_0 before it is written",
        ),
        ((page_attention, reads_the_cache_of_another_layer), "caches that are read: .*k_cache_0.*k_cache_0.*instead"),
    ],
    ids=["not paged", "layer lost", "write after read", "other cache"],
)
@pytest.mark.parametrize("stage", ["serve", "lower"])
def test_what_serving_needs(passes: tuple, message: str, stage: str) -> None:
    with pytest.raises(SpecError, match=f"^after stage {stage}: {message}"):
        run(((stage, passes),))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (brings_an_op_without_kernel, "experts_default has no kernel$"),
        (brings_a_call_of_python, "square calls <built-in method square.*, which nothing runs"),
    ],
    ids=["no kernel", "python"],
)
def test_what_a_plan_can_run(broken: Callable, message: str) -> None:
    with pytest.raises(SpecError, match=f"^after stage lower: {message}"):
        run((("serve", (page_attention,)), ("lower", (broken,))))


def test_attention_that_is_not_paged_is_never_served() -> None:
    with pytest.raises(SpecError, match="^after stage serve: attention of layers .0, 1. is not paged"):
        run((("serve", (page_attention,)),), disabled=("page_attention",))
