"""A graph on a GPU: launches the kernel of each op on the current stream without waiting.

Results are allocated by torch's caching allocator and freed after their last use; under graph capture they come from
the graph's pool. A launch costs the host some microseconds per op, so steps of few tokens are replayed as CUDA graphs
instead (graphs.py).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx

from fuseline.compile.backends.cuda.calibrate import Calibration
from fuseline.compile.backends.cuda.few_rows import few_rows_program
from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import PassContext
from fuseline.compile.graph_inputs import BY_FIELD, GraphOutput
from fuseline.compile.kernels.registry import Implementation
from fuseline.compile.kernels.select import Kernels
from fuseline.compile.ops.registry import op_of
from fuseline.compile.passes.pipeline import program_passes
from fuseline.compile.passes.stream_weights import PREFETCH
from fuseline.compile.residency.offload import Offload
from fuseline.compile.target import Target

TOKENS = BY_FIELD["token_ids"].placeholder


class CudaExecutable:
    """`weights` by get_attr target and inputs by placeholder name, both on the target's device.

    `program` is the graph with ops replaced by kernels; `kernels` are keyed by node of the source graph, whose node
    names the program keeps.
    """

    num_regions = 0

    def __init__(
        self, graph: fx.GraphModule, weights: Mapping[str, Tensor], target: Target, offload: Offload | None = None
    ) -> None:  # fmt: skip
        self.offload = offload
        self._finder = Kernels(target)
        self.kernels = chosen_kernels(graph, self._finder, _constants(graph, offload))
        program = fx.GraphModule(dict(weights), copy.deepcopy(graph.graph))
        ops = {node.name: op_of(node.target) for node in program.graph.nodes}
        self._writes = {name: op for name, op in ops.items() if op and op.written}
        runs = {node.name: kernel.run for node, kernel in self.kernels.items()}
        layers = offload.layers if offload is not None else ()
        for graph_pass in program_passes(runs, torch.device(target.device), [list(layer) for layer in layers]):
            graph_pass(program, PassContext(CompileConfig(""), None, 0, 0, target=target))
        program.graph.lint()
        program.recompile()
        self.program = program
        self.few_rows = None if offload is not None else few_rows_program(program, graph, runs, target)
        self._inputs = [node.target for node in program.graph.nodes if node.op == "placeholder"]

    @property
    def has_prepared(self) -> bool:
        """Whether `prepare` must be called before a step runs."""
        return self._finder.has_prepared

    def prepare(self, host: Mapping[str, Tensor]) -> None:
        """Prepares the next step of this thread from its host inputs, by placeholder name."""
        self._finder.prepare(host)

    @property
    def host_weight_bytes(self) -> int:
        return self.offload.num_bytes if self.offload else 0

    def run(self, values: Mapping[str, Tensor], is_trial: bool = False) -> GraphOutput:
        """Returns the graph's results in newly allocated memory, logits as float32.

        A trial run, whose results are discarded, may overlap other calls: it does not fetch offloaded weights.
        """
        if self.offload is not None:
            values = {**values, PREFETCH: self.offload.start(is_trial)}
        program = self.program
        if self.few_rows is not None and values[TOKENS].shape[-1] <= self.few_rows.max_rows:
            program = self.few_rows.program
        return program(*(values[name] for name in self._inputs))

    def calibrate(self, values: Mapping[str, Tensor]) -> GraphOutput:
        """Like `run`, but first sets the scales of fp8 caches from the values that the step writes."""
        if self.offload is not None:
            values = {**values, PREFETCH: self.offload.start(is_trial=False)}
        return Calibration(self.program, self._writes).run(*(values[name] for name in self._inputs))


def chosen_kernels(
    graph: fx.GraphModule, kernels: Kernels, constants: Collection[str] = ()
) -> dict[fx.Node, Implementation]:
    """The kernel of every call. Needs no GPU. Raises ValueError for an op without a kernel."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    found = {node: kernels.find(node, constants) for node in calls}
    for node, kernel in found.items():
        if kernel is None:
            raise ValueError(f"no kernel for {node.format_node()} on {kernels.target.isa}")
    return found


def _constants(graph: fx.GraphModule, offload: Offload | None) -> set[str]:
    """Targets of weights that are constant while the graph runs; excludes weights passed through slots."""
    away = frozenset() if offload is None else offload.keys
    return {str(node.target) for node in graph.graph.find_nodes(op="get_attr")} - away
