"""Checks at the end of every stage. A graph that fails one would run, but give wrong answers or run slowly.

    always                    every value has a meta value, every constant a source
    until attention is paged  each captured attention layer occurs once
    after serve               each attention layer reads the cache of its keys and values, written before; each
                              recurrence has a state
    after lower               every op of ours has a kernel, every other op is torch's
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable

from torch import Tensor, fx

from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.kernels.plan_call import meta_value, plan_call
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.library import Op, named_arguments
from fuseline.compile.ops.registry import op_of

TORCH = ("aten", "prims")


class SpecError(Exception):
    """A stage left the graph in an invalid state: a bug of its passes."""


def attention_layers(graph: fx.GraphModule) -> list[int]:
    """Layer numbers of unpaged attention, ascending."""
    calls = ((node, op_of(node.target)) for node in graph.graph.nodes if node.op == "call_function")
    return sorted(node.args[op.arguments.index("layer")] for node, op in calls if op and "layer" in op.arguments)


def cache_owners(graph: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """By each unpaged attention the first that keeps the same keys and values, and as long: itself, as a rule."""
    first: dict[tuple, fx.Node] = {}
    owners = {}
    for node in graph.graph.nodes:
        if (op := op_of(node.target)) and "layer" in op.arguments:
            given = named_arguments(node)
            owners[node] = first.setdefault((given["k"], given["v"], given["window"] or given["chunk"]), node)
    return owners


def cache_layers(graph: fx.GraphModule) -> list[int]:
    """Of each unpaged attention the layer whose cache it reads."""
    return [named_arguments(owner)["layer"] for owner in cache_owners(graph).values()]


def check_edge(
    graph: fx.GraphModule, stage: str, layers: list[int], owners: Collection[int], ctx: PassContext
) -> None:
    """Checks the graph after `stage`; `layers` are those of the captured graph, `owners` those of their caches, as they
    were before. Raises SpecError."""
    problems = [*_incomplete(graph)]
    if stage in ("serve", "lower"):
        problems += _unpaged(graph, owners)
    elif (found := attention_layers(graph)) != layers:
        problems.append(f"attention of layers {found} instead of {layers}")
    # Without pack_weights torch computes experts by their reference implementation.
    if stage == "lower" and "pack_weights" not in ctx.config.disabled_passes:
        problems += _without_kernel(graph, _finder(ctx))
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise SpecError(f"after stage {stage}: {problems[0]}{more}")


def _incomplete(graph: fx.GraphModule) -> Iterable[str]:
    for node in graph.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"{node.name} has no meta value"
        if node.op == "get_attr" and not node.meta.keys() & {"fqn", "weight"}:
            yield f"nothing says where constant {node.name} comes from"


def _unpaged(graph: fx.GraphModule, owners: Collection[int]) -> Iterable[str]:
    if unpaged := attention_layers(graph):
        yield f"attention of layers {unpaged} is not paged"
    for node, op in ((node, op_of(node.target)) for node in graph.graph.nodes):
        if op and op.state:
            yield f"{node.name} has no state"
    written: set[str] = set()
    read: list[str] = []
    for node, op in ((node, op_of(node.target)) for node in graph.graph.nodes):
        if op and op.written:
            written.add(_caches(node, op))
        elif op and op.reads_cache:
            read.append(_caches(node, op))
            if read[-1] not in written:
                yield f"{node.name} reads {read[-1]} before it is written"
    # The keys of latents hold the values too.
    expected = [{f"k_cache_{layer}", f"k_cache_{layer} and v_cache_{layer}"} for layer in sorted(owners)]
    found = sorted(read, key=lambda names: int(names.rpartition("_")[2]))
    if len(found) != len(expected) or any(names not in own for names, own in zip(found, expected, strict=True)):
        yield f"caches that are read: {read} instead of those of layers {sorted(owners)}"


def _caches(node: fx.Node, op: Op) -> str:
    return " and ".join(str(node.args[op.arguments.index(name)].target) for name in op.caches)


def _finder(ctx: PassContext) -> Callable[[fx.Node], object]:
    """A function that finds the kernel of a node, or None."""
    if ctx.target.kind == "cuda":
        return Kernels(ctx.target, {}).find

    def find(node: fx.Node) -> object:
        op = op_of(node.target)
        return op if op and op.by_reference else plan_call(node, meta_value)

    return find


def _without_kernel(graph: fx.GraphModule, find: Callable[[fx.Node], object]) -> Iterable[str]:
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        space = getattr(node.target, "namespace", "")
        computes_sizes = node.target is operator.getitem or not isinstance(node.meta["val"], Tensor)  # done by the plan
        if space == "fuseline" and find(node) is None:
            yield f"{node.name} has no kernel"
        elif space not in ("fuseline", *TORCH) and not computes_sizes:
            yield f"{node.name} calls {node.target}, which nothing runs"


