"""Level 1 and up: the lowered graph as a C++ list of kernel calls over one arena, replayed without Python.

Ops without a native kernel split the list: calls before and after them are replayed, torch computes the ops between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile.backends.cpu_plan.arena import place
from fuseline.compile.backends.cpu_plan.lowering import Call, Lowered, MakeInputs
from fuseline.compile.backends.cpu_plan.sizes import SYMBOLS, Linear, Size, evaluate
from fuseline.compile.backends.cpu_plan.symbolic import NonLinear, View, views_of
from fuseline.compile.backends.eager import EagerExecutable
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.edit import call_node, tensors_of
from fuseline.compile.graph.region import Region, ops_of
from fuseline.compile.graph_inputs import GraphOutput, group_placeholder, is_cache, is_state, meta_input
from fuseline.compile.ops.codes import CACHES

DTYPES = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.bool: "u8",
    **{getattr(torch, name): "u8" for name in CACHES},
}  # fmt: skip


@dataclass
class Segment:
    """Calls [begin, end) of the plan."""

    begin: int
    end: int


@dataclass(frozen=True)
class RegionKernel:
    """A compiled region, called with the real tensors of `args`: inputs, then the memory of its outputs."""

    run: Callable[[list[Tensor]], object]
    args: tuple[View, ...]


class PlanExecutable:
    """Runs a lowered graph. `weights` are keyed by get_attr target, inputs by placeholder name."""

    def __init__(
        self, lowered: Lowered, weights: Mapping[str, Tensor], kernels: Mapping[int, RegionKernel] | None = None
    ) -> None:
        """`kernels`: compiled regions by mark."""
        self._lowered = lowered
        self._kernels = kernels or {}
        self.arena_bytes = place(lowered.buffers)
        # Arena pages are touched only up to the largest step so far.
        self._arena = torch.empty(self.arena_bytes + 64, dtype=torch.uint8)
        self._base = -self._arena.data_ptr() % 64
        self._weights, self._lasting = weights, dict(weights)
        self._eager: EagerExecutable | None = None
        self._output: tuple[list[int], GraphOutput] | None = None
        self._plan = _C.Plan()
        for name in SYMBOLS:
            self._plan.add_symbol(name)
        self._slots: dict[str, int] = {}
        self._tensors: dict[tuple, int] = {}
        self._segments: list[Segment | Region] = []
        for step in lowered.steps:
            self._add(step)
        self._plan.set_arena(self._arena.data_ptr() + self._base, self.arena_bytes)
        self.bind(self._lasting)

    @property
    def num_regions(self) -> int:
        return sum(isinstance(step, Region) for step in self._segments)

    @property
    def torch_ops(self) -> set[str]:
        """Names of the ops that torch computes: those of the regions, or all of a graph that could not be lowered."""
        if not self._lowered.steps:
            return ops_of(self._lowered.graph.graph.nodes)
        return set().union(*(ops_of(step.nodes) for step in self._lowered.steps if isinstance(step, Region)))

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets inputs that persist for all later runs: caches and states."""
        self._lasting |= tensors
        for name, tensor in tensors.items():
            if name in self._slots:
                self._plan.set_slot(self._slots[name], tensor.data_ptr())
        self._changing = [(name, slot) for name, slot in self._slots.items() if name not in self._lasting]
        self._num_blocks, self._num_slots = (
            next((v.shape[0] for k, v in self._lasting.items() if is_kept(k)), 0) for is_kept in (is_cache, is_state)
        )

    def run(self, values: Mapping[str, Tensor]) -> GraphOutput:
        """Returns the graph's results, valid until the next run. `values`: all inputs that are not bound."""
        symbols = self._symbols(values)
        if symbols[0] < self._lowered.min_tokens:
            return self._run_torch(values)
        for name, slot in self._changing:
            self._plan.set_slot(slot, values[name].data_ptr())
        for step in self._segments:
            if isinstance(step, Segment):
                self._plan.run(symbols, step.begin, step.end)
            else:
                self._run_region(step, values, symbols)
        if self._output is None or self._output[0] != symbols:
            self._output = symbols, fx.node.map_arg(
                self._lowered.output, lambda node: self._view(self._lowered.values[node], values, symbols)
            )
        return self._output[1]

    def _symbols(self, values: Mapping[str, Tensor]) -> list[int]:
        """Values of SYMBOLS for one step."""
        sequences, table = values["seq_lens"].shape[0], values.get(group_placeholder("block_tables", 0))
        return [
            values["token_ids"].shape[1], sequences, sequences + 1, values["logits_rows"].shape[0],
            0 if table is None else table.shape[1], self._num_blocks,
            values["embed_rows"].shape[0] if "embed_rows" in values else 0, self._num_slots,
        ]  # fmt: skip

    def _add(self, step: Call | Region) -> None:
        """Adds a step; calls that follow each other are one segment."""
        if isinstance(step, Region):
            self._segments.append(step)
            return
        if not self._segments or isinstance(self._segments[-1], Region):
            self._segments.append(Segment(self._plan.num_calls, self._plan.num_calls))
        ids = [-1 if tensor is None else self._tensor(tensor) for tensor in step.tensors]
        self._plan.add_call(step.native.kernel, ids, step.ints, list(step.native.floats), step.label)
        self._segments[-1].end += 1

    def _tensor(self, view: View) -> int:
        where = self._lowered.places[view.storage]
        base, begin = -1, 0
        if where.buffer is None:
            base = self._slots.setdefault(where.slot, -1)
            if base < 0:
                base = self._slots[where.slot] = self._plan.add_slot(where.slot)
        else:
            begin = where.buffer.offset
        offset = _in_bytes(view.offset, view.dtype.itemsize, begin)
        key = (base, offset, view.dtype, view.sizes, view.strides)
        if key not in self._tensors:
            self._tensors[key] = self._plan.add_tensor(base, offset, DTYPES[view.dtype], view.sizes, view.strides)
        return self._tensors[key]

    def _run_torch(self, values: Mapping[str, Tensor]) -> GraphOutput:
        """Runs the whole graph with reference ops, for a step too small for the lowered shapes."""
        if self._eager is None:
            self._eager = EagerExecutable(self._lowered.graph, self._weights)
        return self._eager.run(self._lasting | values)

    def _run_region(self, region: Region, values: Mapping[str, Tensor], symbols: list[int]) -> None:
        if compiled := self._kernels.get(region.mark):
            compiled.run([self._view(meta, values, symbols) for meta in compiled.args])
            return
        computed: dict[fx.Node, object] = {}

        def real(arg: object) -> object:
            if not isinstance(arg, fx.Node):
                return arg
            if arg in computed:
                return computed[arg]
            value = self._lowered.values[arg]
            if isinstance(value, View):
                return self._view(value, values, symbols)
            return call(arg) if isinstance(value, NonLinear) else evaluate(value, symbols)

        def call(node: fx.Node) -> object:
            computed[node] = call_node(node, real)
            return computed[node]

        for node in region.nodes:
            call(node)
        for node, index in region.outputs:
            view = views_of(self._lowered.values[node])[index or 0]
            self._view(view, values, symbols).copy_(tensors_of(computed[node])[index or 0])

    def _view(self, view: View, values: Mapping[str, Tensor], symbols: list[int]) -> Tensor:
        """The real tensor of a view."""
        where = self._lowered.places[view.storage]
        sizes = [evaluate(size, symbols) for size in view.sizes]
        strides = [evaluate(stride, symbols) for stride in view.strides]
        offset = evaluate(view.offset, symbols)
        if where.buffer is None:
            source = self._lasting[where.slot] if where.slot in self._lasting else values[where.slot]
            return source.as_strided(sizes, strides, source.storage_offset() + offset)
        begin = self._base + where.buffer.offset
        flat = self._arena[begin : begin + where.buffer.num_bytes].view(view.dtype)
        return flat.as_strided(sizes, strides, flat.storage_offset() + offset)


def _in_bytes(offset: Size, item_bytes: int, begin: int) -> Size:
    """Converts an offset in elements from `begin` to bytes."""
    if isinstance(offset, Linear):
        return Linear(offset.constant * item_bytes + begin, offset.factor * item_bytes, offset.symbol)
    return offset * item_bytes + begin


def limits_of(config: CompileConfig) -> dict[str, int]:
    """Largest value of each symbol; caches and block tables are not in the arena."""
    tokens, seqs = config.max_num_batched_tokens, config.max_num_seqs
    return {"T": tokens, "S": seqs, "S1": seqs + 1, "R": seqs, "M": 1, "N": 1, "E": tokens, "L": 1}


def meta_inputs(graph: fx.GraphModule, block_size: int, same: Mapping[str, str] | None = None) -> MakeInputs:
    """Makes inputs by placeholder name from sizes. `same`: symbols whose size equals another symbol's."""
    likes = {str(node.target): node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")}

    def make(sizes: Mapping[str, int]) -> dict[str, Tensor]:
        sizes = {**sizes, **{name: sizes[other] for name, other in (same or {}).items()}}
        return {name: meta_input(name, like, block_size, sizes) for name, like in likes.items()}

    return make
