"""A graph lowered to native calls, views and Python regions, on meta tensors of two sets of sizes (sizes.py).

Views cost nothing: torch reports the storage and strides of a result. An op with a native kernel becomes a call that
writes a buffer of the arena; consecutive ops without one become a region that torch computes. Ops that the pass
cut_regions gave one of the `marks` belong to that region even if they have kernels.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_iter

from fuseline.compile.backends.cpu_plan.arena import Buffer
from fuseline.compile.backends.cpu_plan.sizes import FIRST, SECOND, SYMBOLS, SizeError, evaluate, read
from fuseline.compile.backends.cpu_plan.symbolic import Values, agrees, symbolic
from fuseline.compile.graph.edit import call_node, is_write, results_of, tensors_of
from fuseline.compile.graph.region import Region, draw_borders, storage_key
from fuseline.compile.kernels.plan_call import plan_call
from fuseline.compile.kernels.registry import PlanCall
from fuseline.compile.ops.library import same_layout

aten = torch.ops.aten
META: Mapping[object, Callable[..., Tensor]] = {
    torch.ops.prims.convert_element_type.default: same_layout,
    aten.embedding.default: lambda weight, ids, *_: weight.new_empty(*ids.shape, weight.shape[1]),
}
"""Ops of most graphs for which torch's own meta functions import a shape environment (0.3 s of every start)."""
logger = logging.getLogger(__name__)
MakeInputs = Callable[[Mapping[str, int]], Mapping[str, Tensor]]
"""Sizes by symbol -> meta tensors by placeholder name."""


@dataclass(frozen=True)
class Place:
    """Location of a storage: a `buffer` of the arena, or a slot (an input, a weight, a cache)."""

    slot: str = ""
    buffer: Buffer | None = None


@dataclass
class Call:
    """One native call; the storages of its tensors have places, an absent tensor is None.

    Tensors are on meta and numbers known in one interpretation; joined, they are a View and a Size each.
    """

    native: PlanCall
    tensors: list[Any]
    ints: list[Any]
    label: str

    @property
    def kind(self) -> str:
        return self.native.kernel


@dataclass
class Lowered:
    graph: fx.GraphModule
    steps: list[Call | Region]
    values: Values
    """Values of all nodes."""
    places: dict[int, Place]
    """Places by storage key."""
    buffers: list[Buffer]
    output: fx.Node | tuple[fx.Node, ...]
    min_tokens: int
    """Fewest tokens for which the shapes hold: x[:, -3:] has another shape for fewer than 3."""


class Lowering:
    """Interprets a graph for two sets of sizes. `limits` are the largest values of the symbols, by name."""

    def __init__(
        self, graph: fx.GraphModule, make_inputs: MakeInputs, limits: Mapping[str, int], marks: Set[int] = frozenset()
    ) -> None:
        self._graph = graph
        self._make_inputs = make_inputs
        self._marks = marks
        self._limits = [limits[name] for name in SYMBOLS]

    def run(self) -> Lowered:
        """Lowers the graph; one whose shapes are not linear in the unknown sizes gets no steps: torch computes it."""
        first, second = (
            _Interpretation(self._graph, self._make_inputs(sizes), self._marks).run() for sizes in (FIRST, SECOND)
        )
        output = self._graph.graph.output_node().args[0]
        values = Values(first.values, second.values)
        try:
            steps, buffers = self._join(first, second, values)
            return Lowered(self._graph, steps, values, first.places, buffers, output, self._min_tokens(values))
        except SizeError as error:
            logger.warning("torch computes this model op by op, which is slow: %s", error)
            return Lowered(self._graph, [], values, {}, [], output, self._limits[0] + 1)

    def _join(
        self, first: _Interpretation, second: _Interpretation, values: Values
    ) -> tuple[list[Call | Region], list[Buffer]]:
        """Steps and buffers with symbolic sizes from both interpretations. Raises SizeError."""
        if [step.kind for step in first.steps] != [step.kind for step in second.steps]:
            raise SizeError("other numbers of tokens need other kernels")
        for buffer, other in zip(first.buffers, second.buffers, strict=True):
            buffer.num_bytes = max(evaluate(read(buffer.num_bytes, other.num_bytes), self._limits), 1)
        steps = [
            a if isinstance(a, Region) else _join_calls(a, b) for a, b in zip(first.steps, second.steps, strict=True)
        ]
        borders = list(results_of(self._graph.graph))
        for region in (step for step in steps if isinstance(step, Region)):
            borders += [*region.inputs, *(node for node, _ in region.outputs)]
        for node in borders:
            values[node]  # evaluated now, not while a request waits
        return steps, first.buffers

    def _min_tokens(self, values: Values) -> int:
        """Smallest step with the lowered shapes. Raises SizeError if even the largest step has other shapes."""
        high = 1
        while not self._agrees(values, high):
            if high >= self._limits[0]:
                raise SizeError(f"the shapes of steps of up to {high} tokens are not those of longer ones")
            high = min(2 * high, self._limits[0])
        return bisect_left(range(high), True, lo=high // 2 + 1, key=lambda number: self._agrees(values, number))

    def _agrees(self, values: Values, number: int) -> bool:
        """Whether the graph's shapes in a small step match `values`."""
        sizes = dict.fromkeys(SYMBOLS, number) | {"S1": number + 1}  # sequences of one token each, all with logits
        inputs, symbols = self._make_inputs(sizes), [sizes[name] for name in SYMBOLS]
        found: dict[fx.Node, object] = {}
        for node in self._graph.graph.nodes:
            if node.op == "call_function":
                try:
                    found[node] = call_on_meta(node, found)
                except (RuntimeError, IndexError, ValueError):  # torch's errors for an impossible shape
                    return False
                if not agrees(values, node, found[node], symbols):
                    return False
            elif node.op != "output":
                found[node] = source_on_meta(node, inputs)
        return True


def _join_calls(first: Call, second: Call) -> Call:
    tensors = [symbolic(a, b) for a, b in zip(first.tensors, second.tensors, strict=True)]
    ints = [read(int(a), int(b)) for a, b in zip(first.ints, second.ints, strict=True)]
    return Call(first.native, tensors, ints, first.label)


def source_on_meta(node: fx.Node, inputs: Mapping[str, Tensor]) -> Tensor:
    """A new meta tensor for an input or a constant."""
    like = inputs[str(node.target)] if node.op == "placeholder" else node.meta["val"]
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


def call_on_meta(node: fx.Node, values: Mapping[fx.Node, object]) -> object:
    """Calls the node's op on the meta values of its arguments."""

    def value(arg: object) -> object:
        if arg == torch.device("cpu"):
            return torch.device("meta")
        return values[arg] if isinstance(arg, fx.Node) else arg

    if node.target in META:
        return META[node.target](*(value(arg) for arg in node.args))
    return call_node(node, value)


class _Interpretation:
    """A graph interpreted for one set of sizes, which determine the bytes of its buffers."""

    def __init__(self, graph: fx.GraphModule, inputs: Mapping[str, Tensor], marks: Set[int]) -> None:
        self._graph = graph
        self._inputs = inputs
        self._marks = marks
        self.values: dict[fx.Node, object] = {}
        self.places: dict[int, Place] = {}
        self.steps: list[Call | Region] = []
        self._buffer_of: dict[int, Buffer] = {}
        self._keep: list[Tensor] = []

    @property
    def buffers(self) -> list[Buffer]:
        return list(self._buffer_of.values())

    def run(self) -> _Interpretation:
        for node in self._graph.graph.nodes:
            self._visit(node)
        self._use([self.values[node] for node in results_of(self._graph.graph)], len(self.steps))
        regions = [step for step in self.steps if isinstance(step, Region)]
        for key in draw_borders(regions, self.values):  # nothing outside the region uses the value
            del self._buffer_of[key]
        return self

    def value(self, arg: object) -> object:
        return self.values[arg] if isinstance(arg, fx.Node) else arg

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = source_on_meta(node, self._inputs)
            self.places[storage_key(self.values[node])] = Place(slot=str(node.target))
        elif node.op == "call_function":
            self._visit_call(node)

    def _visit_call(self, node: fx.Node) -> None:
        mark = node.meta.get("region")
        mark = mark if mark in self._marks else None
        result = self._meta_result(node, mark is not None)
        self.values[node] = result
        tensors = tensors_of(result)
        if node.target is aten.cat.default and mark is None:
            return self._add_cat(node, result)
        native = plan_call(node, self.value) if mark is None else None
        is_view = all(storage_key(t) in self.places for t in tensors) and not (native or is_write(node))
        if is_view:
            return
        if native is None:
            self._add_to_region(node, tensors, mark)
        else:
            self._add_call(native, tensors, node.name)

    def _add_cat(self, node: fx.Node, result: Tensor) -> None:
        """Lowers a concatenation to one copy per part."""
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        self._new_buffer(result, len(self.steps))
        begin = 0
        for part in node.args[0]:
            if self.value(part).shape == (0,):  # torch.cat accepts it with parts of any shape
                continue
            size = self.value(part).shape[dim]
            self._add_call(PlanCall("copy", (part,)), [result.narrow(dim, begin, size)], node.name)
            begin += size
        self._use([result], len(self.steps) - 1)

    def _meta_result(self, node: fx.Node, is_in_region: bool) -> object:
        """Calls the op on meta tensors. Outside regions a reshape that must copy becomes a copy and a view of it."""
        result = call_on_meta(node, self.values)
        if is_in_region or node.target is not aten.reshape.default or storage_key(result) in self.places:
            return result
        source = self.value(node.args[0])
        fresh = torch.empty(source.shape, dtype=source.dtype, device="meta")
        self._add_call(PlanCall("copy", (node.args[0],)), [fresh], node.name)
        return fresh.view(result.shape)

    def _add_call(self, native: PlanCall, outputs: list[Tensor], label: str) -> None:
        inputs = [None if arg is None else self.value(arg) for arg in native.inputs]
        mutated = [self.value(arg) for arg in native.mutated]
        step = len(self.steps)
        for tensor in outputs:
            if storage_key(tensor) not in self.places:
                self._new_buffer(tensor, step)
        self.steps.append(Call(native, [*outputs, *mutated, *inputs], [self.value(n) for n in native.ints], label))
        self._use(inputs, step)

    def _add_to_region(self, node: fx.Node, outputs: list[Tensor], mark: int | None) -> None:
        last = self.steps[-1] if self.steps else None
        if not isinstance(last, Region) or last.mark != mark:
            self.steps.append(Region(mark))
        step = len(self.steps) - 1
        self.steps[step].nodes.append(node)
        for tensor in outputs:
            if storage_key(tensor) not in self.places:
                self._new_buffer(tensor, step)
        self._use([self.value(arg) for arg in node.all_input_nodes], step)

    def _new_buffer(self, tensor: Tensor, step: int) -> None:
        buffer = Buffer(tensor.numel() * tensor.element_size(), step, step)
        self.places[storage_key(tensor)] = Place(buffer=buffer)
        self._buffer_of[storage_key(tensor)] = buffer
        self._keep.append(tensor)

    def _use(self, values: list[object], step: int) -> None:
        for tensor in tree_iter(values):
            place = self.places.get(storage_key(tensor)) if isinstance(tensor, Tensor) else None
            if place is not None and place.buffer is not None:
                place.buffer.last = max(place.buffer.last, step)
