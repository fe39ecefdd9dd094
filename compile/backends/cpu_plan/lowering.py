"""A graph lowered to native calls, views and Python regions, on meta tensors of prime sizes (sizes.py).

Views cost nothing: torch tells which storage a result lives in, with which strides. An op with a native kernel becomes
a call that writes a buffer of the arena; a run of ops without one becomes a region that torch computes. The ops
that the pass cut_regions gave one of the `marks` belong to that region although some of them have kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_iter

from fuseline.compile.backends.cpu_plan.arena import Buffer
from fuseline.compile.backends.cpu_plan.sizes import SYMBOLS, evaluate
from fuseline.compile.graph.region import Region, draw_borders, storage_key, tensors_of
from fuseline.compile.kernels.plan_call import plan_call
from fuseline.compile.kernels.registry import PlanCall

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """Where a storage lives: in the arena (`buffer`), or behind a slot (an input, a weight, a cache)."""

    slot: str = ""
    buffer: Buffer | None = None


@dataclass
class Call:
    """One native call; tensors are meta tensors whose storages have places, or None."""

    native: PlanCall
    tensors: list[Tensor | None]
    label: str


@dataclass
class Lowered:
    steps: list[Call | Region]
    values: dict[fx.Node, object]
    """Meta value of every node."""
    places: dict[int, Place]
    """By storage."""
    buffers: list[Buffer]
    output: fx.Node


class Lowering:
    """Interprets a graph once. `limits` are the largest values of the symbols, by name."""

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Mapping[str, Tensor],
        limits: Mapping[str, int],
        marks: Set[int] = frozenset(),
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._marks = marks
        self._limits = [limits[name] for name in SYMBOLS]
        self._values: dict[fx.Node, object] = {}
        self._places: dict[int, Place] = {}
        self._buffer_of: dict[int, Buffer] = {}
        self._steps: list[Call | Region] = []
        self._keep: list[Tensor] = []

    def run(self) -> Lowered:
        for node in self._graph.graph.nodes:
            self._visit(node)
        output = next(node for node in reversed(self._graph.graph.nodes) if node.op == "output").args[0]
        self._use([self.value(output)], len(self._steps))
        self._draw_borders()
        return Lowered(self._steps, self._values, self._places, list(self._buffer_of.values()), output)

    def _draw_borders(self) -> None:
        """What stays inside a region needs no buffer."""
        regions = [step for step in self._steps if isinstance(step, Region)]
        for key in draw_borders(regions, self._values):
            del self._buffer_of[key]

    def value(self, arg: object) -> object:
        return self._values[arg] if isinstance(arg, fx.Node) else arg

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            name = str(node.target)
            meta = self._inputs[name] if node.op == "placeholder" else node.meta["val"]
            tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta")
            self._values[node] = tensor
            self._places[storage_key(tensor)] = Place(slot=name)
        elif node.op == "call_function":
            self._visit_call(node)

    def _visit_call(self, node: fx.Node) -> None:
        mark = node.meta.get("region")
        mark = mark if mark in self._marks else None
        result = self._meta_result(node, mark is not None)
        self._values[node] = result
        tensors = tensors_of(result)
        if node.target is aten.cat.default and mark is None:
            return self._add_cat(node, result)
        native = plan_call(node, self.value) if mark is None else None
        is_view = all(storage_key(t) in self._places for t in tensors) and not (native or writes_in_place(node))
        if is_view:
            return
        if native is None:
            self._add_to_region(node, tensors, mark)
        else:
            self._add_call(native, tensors, node.name)

    def _add_cat(self, node: fx.Node, result: Tensor) -> None:
        """A copy of each part into its place."""
        dim = node.args[1] if len(node.args) > 1 else 0
        self._new_buffer(result, len(self._steps))
        begin = 0
        for part in node.args[0]:
            size = self.value(part).shape[dim]
            self._add_call(PlanCall("copy", (part,)), [result.narrow(dim, begin, size)], node.name)
            begin += size
        self._use([result], len(self._steps) - 1)

    def _meta_result(self, node: fx.Node, is_in_region: bool) -> object:
        """The op on meta tensors. Outside of regions a reshape that must copy becomes a copy, and a view of that."""
        args = fx.node.map_aggregate(node.args, self._meta_arg)
        kwargs = fx.node.map_aggregate(node.kwargs, self._meta_arg)
        result = node.target(*args, **kwargs)
        if is_in_region or node.target is not aten.reshape.default or storage_key(result) in self._places:
            return result
        fresh = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        self._add_call(PlanCall("copy", (node.args[0],)), [fresh], node.name)
        return fresh.view(result.shape)

    def _meta_arg(self, arg: object) -> object:
        if arg == torch.device("cpu"):
            return torch.device("meta")
        return self.value(arg)

    def _add_call(self, native: PlanCall, outputs: list[Tensor], label: str) -> None:
        inputs = [None if arg is None else self.value(arg) for arg in native.inputs]
        mutated = [self.value(arg) for arg in native.mutated]
        step = len(self._steps)
        for tensor in outputs:
            if storage_key(tensor) not in self._places:
                self._new_buffer(tensor, step)
        self._steps.append(Call(native, [*outputs, *mutated, *inputs], label))
        self._use(inputs, step)

    def _add_to_region(self, node: fx.Node, outputs: list[Tensor], mark: int | None) -> None:
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, Region) or last.mark != mark:
            self._steps.append(Region(mark))
        step = len(self._steps) - 1
        self._steps[step].nodes.append(node)
        for tensor in outputs:
            if storage_key(tensor) not in self._places:
                self._new_buffer(tensor, step)
        self._use([self.value(arg) for arg in node.all_input_nodes], step)

    def _new_buffer(self, tensor: Tensor, step: int) -> None:
        num_bytes = evaluate(tensor.numel(), self._limits) * tensor.element_size()
        buffer = Buffer(max(num_bytes, 1), step, step)
        self._places[storage_key(tensor)] = Place(buffer=buffer)
        self._buffer_of[storage_key(tensor)] = buffer
        self._keep.append(tensor)

    def _use(self, values: list[object], step: int) -> None:
        for tensor in tree_iter(values):
            place = self._places.get(storage_key(tensor)) if isinstance(tensor, Tensor) else None
            if place is not None and place.buffer is not None:
                place.buffer.last = max(place.buffer.last, step)


def writes_in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
