"""Level 1 and up: the lowered graph as a C++ list of kernel calls over one arena, replayed without Python.

Where ops have no kernel of ours, the list is cut: the calls before and after are replayed, torch computes what
is between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx

from fuseline import _C
from fuseline.compile.backends.cpu_plan.arena import place
from fuseline.compile.backends.cpu_plan.lowering import Call, Lowered
from fuseline.compile.backends.cpu_plan.sizes import PRIMES, SYMBOLS, decode, evaluate
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.region import Region, storage_key, tensors_of

DTYPES = {
    torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.bool: "u8",
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
    args: tuple[Tensor, ...]


class PlanExecutable:
    """Runs a lowered graph. `weights` by get_attr target; inputs come by placeholder name."""

    def __init__(
        self, lowered: Lowered, weights: Mapping[str, Tensor], kernels: Mapping[int, RegionKernel] | None = None
    ) -> None:
        """`kernels`: compiled regions by their mark."""
        self._lowered = lowered
        self._kernels = kernels or {}
        self.arena_bytes = place(lowered.buffers)
        # Pages of the arena are touched only as far as the largest step so far reached.
        self._arena = torch.empty(self.arena_bytes + 64, dtype=torch.uint8)
        self._base = -self._arena.data_ptr() % 64
        self._lasting = dict(weights)
        self._output: tuple[list[int], Tensor] | None = None
        self._plan = _C.Plan()
        for name in SYMBOLS:
            self._plan.add_symbol(name)
        self._slots: dict[str, int] = {}
        self._tensors: dict[tuple, int] = {}
        self._steps = [self._add(step) for step in lowered.steps]
        self._segments = merge(self._steps)
        self._plan.set_arena(self._arena.data_ptr() + self._base, self.arena_bytes)
        self.bind(self._lasting)

    @property
    def num_regions(self) -> int:
        return sum(isinstance(step, Region) for step in self._segments)

    @property
    def num_calls(self) -> int:
        return self._plan.num_calls

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors of inputs that stay for all runs to come: the caches."""
        self._lasting |= tensors
        for name, tensor in tensors.items():
            if name in self._slots:
                self._plan.set_slot(self._slots[name], tensor.data_ptr())
        self._changing = [(name, slot) for name, slot in self._slots.items() if name not in self._lasting]
        self._num_blocks = next((v.shape[0] for k, v in self._lasting.items() if k.startswith("k_cache_")), 0)

    def run(self, values: Mapping[str, Tensor]) -> Tensor:
        """The graph's output, valid until the next run. `values`: all inputs that are not bound."""
        symbols = self._symbols(values)
        for name, slot in self._changing:
            self._plan.set_slot(slot, values[name].data_ptr())
        for step in self._segments:
            if isinstance(step, Segment):
                self._plan.run(symbols, step.begin, step.end)
            else:
                self._run_region(step, values, symbols)
        if self._output is None or self._output[0] != symbols:
            self._output = symbols, self._view(self._lowered.values[self._lowered.output], values, symbols)
        return self._output[1]

    def profile(self, values: Mapping[str, Tensor], repeats: int) -> list[tuple[str, str, int]]:
        """(label, op, nanoseconds) of each call; run() must have set the inputs."""
        return self._plan.profile(self._symbols(values), repeats)

    def to_text(self) -> str:
        return self._plan.to_text()

    def _symbols(self, values: Mapping[str, Tensor]) -> list[int]:
        """Values of SYMBOLS in one step."""
        sequences = values["seq_lens"].shape[0]
        return [
            values["token_ids"].shape[1], sequences, sequences + 1, values["logits_rows"].shape[0],
            values["block_table_0"].shape[1], self._num_blocks,
        ]  # fmt: skip

    def _add(self, step: Call | Region) -> Segment | Region:
        if isinstance(step, Region):
            return step
        begin = self._plan.num_calls
        ids = [-1 if tensor is None else self._tensor(tensor) for tensor in step.tensors]
        self._plan.add_call(step.native.kernel, ids, list(step.native.ints), list(step.native.floats), step.label)
        return Segment(begin, begin + 1)

    def _tensor(self, tensor: Tensor) -> int:
        where = self._lowered.places[storage_key(tensor)]
        base, offset = -1, tensor.storage_offset() * tensor.element_size()
        if where.buffer is None:
            base = self._slots.setdefault(where.slot, -1)
            if base < 0:
                base = self._slots[where.slot] = self._plan.add_slot(where.slot)
        else:
            offset += where.buffer.offset
        sizes = [decode(n) for n in tensor.shape]
        strides = [decode(n) for n in tensor.stride()]
        key = (base, offset, tensor.dtype, tuple(sizes), tuple(strides))
        if key not in self._tensors:
            self._tensors[key] = self._plan.add_tensor(base, offset, DTYPES[tensor.dtype], sizes, strides)
        return self._tensors[key]

    def _run_region(self, region: Region, values: Mapping[str, Tensor], symbols: list[int]) -> None:
        if compiled := self._kernels.get(region.mark):
            compiled.run([self._view(meta, values, symbols) for meta in compiled.args])
            return
        computed: dict[fx.Node, object] = {}

        def real(arg: object) -> object:
            if arg in computed:
                return computed[arg]
            meta = self._lowered.values[arg] if isinstance(arg, fx.Node) else arg
            if isinstance(meta, Tensor):
                return self._view(meta, values, symbols)
            if isinstance(meta, bool) or not isinstance(meta, int):
                return meta
            return evaluate(meta, symbols)

        for node in region.nodes:
            args, kwargs = fx.node.map_aggregate(node.args, real), fx.node.map_aggregate(node.kwargs, real)
            computed[node] = node.target(*args, **kwargs)
        for node, index in region.outputs:
            meta = tensors_of(self._lowered.values[node])[index or 0]
            self._view(meta, values, symbols).copy_(tensors_of(computed[node])[index or 0])

    def _view(self, meta: Tensor, values: Mapping[str, Tensor], symbols: list[int]) -> Tensor:
        """The real tensor of a meta one."""
        where = self._lowered.places[storage_key(meta)]
        sizes = [evaluate(n, symbols) for n in meta.shape]
        strides = [evaluate(n, symbols) for n in meta.stride()]
        if where.buffer is None:
            source = self._lasting[where.slot] if where.slot in self._lasting else values[where.slot]
            return source.as_strided(sizes, strides, source.storage_offset() + meta.storage_offset())
        begin = self._base + where.buffer.offset
        flat = self._arena[begin : begin + where.buffer.num_bytes].view(meta.dtype)
        return flat.as_strided(sizes, strides, flat.storage_offset() + meta.storage_offset())


def merge(steps: list[Segment | Region]) -> list[Segment | Region]:
    """Neighbouring segments become one."""
    merged: list[Segment | Region] = []
    for step in steps:
        if isinstance(step, Segment) and merged and isinstance(merged[-1], Segment):
            merged[-1].end = step.end
        else:
            merged.append(step)
    return merged


def limits_of(config: CompileConfig) -> dict[str, int]:
    """Largest value of each symbol; caches and block tables are no part of the arena."""
    seqs = config.max_num_seqs
    return {"T": config.max_num_batched_tokens, "S": seqs, "S1": seqs + 1, "R": seqs, "M": 1, "N": 1}


def meta_inputs(
    graph: fx.GraphModule, block_size: int, primes: Mapping[str, int] = MappingProxyType(PRIMES)
) -> dict[str, Tensor]:
    """Inputs by placeholder name. `primes`: one for two sizes says that they are the same."""
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return {str(node.target): input_meta(str(node.target), node.meta["val"], block_size, primes) for node in nodes}


def input_meta(name: str, like: Tensor, block_size: int, primes: Mapping[str, int]) -> Tensor:
    """The meta tensor of an input, its unknown sizes as primes."""
    t, s, s1, r, m, n = (primes[name] for name in SYMBOLS)
    shapes = {
        "token_ids": (1, t), "positions": (1, t), "rope_rows": (t,), "seq_lens": (s,), "query_start": (s1,),
        "logits_rows": (r,),
    }  # fmt: skip
    if name.startswith("slots_"):
        shape: tuple[int, ...] = (t,)
    elif name.startswith("block_table_"):
        shape = (s, m)
    elif name.startswith(("k_cache_", "v_cache_")):
        shape = (n, like.shape[1], block_size, like.shape[3])
    else:
        shape = shapes[name]
    return torch.empty(shape, dtype=like.dtype, device="meta")
