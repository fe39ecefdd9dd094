"""Makes one call of each run of ops that the persistent kernel can compute, which ends at attention.

    x = linear(attended, wo); y, sum = add_rms_norm(..); .. split(linear(..)); q = rope_cache(..)
->
    q, sum = run(attended, residual, k_cache, v_cache, ..)

A run begins with a product or a norm, and has a product. Views between its ops are part of it; constants are not among
its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fuseline.compile.graph.edit import insert_call, insert_parts, is_write, take_over
from fuseline.compile.graph.graph_pass import GraphPass, PassContext, PassResult
from fuseline.compile.kernels.cuda.linear import FEW_ROWS
from fuseline.compile.kernels.cuda.persistent import LABEL, step_of
from fuseline.compile.kernels.registry import Implementation, OpCall
from fuseline.compile.ops.library import ROWS
from fuseline.compile.ops.registry import op_of
from fuseline.compile.passes.cut_regions import is_free
from fuseline.compile.target import Target

RUN_CHOICES = "run_choices"
"""Key of the choices of a run in its first node's meta."""
BY_OPS = "ops"
"""Label of a run whose ops are called one by one."""


@dataclass(frozen=True)
class Run:
    """Consecutive nodes of a graph; `steps` are what computes those that are no views, by name."""

    nodes: tuple[fx.Node, ...]
    steps: Mapping[str, Implementation]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Values from outside, without constants; the first has a row for each token."""
        inside = set(self.nodes)
        read = (arg for node in self.nodes for arg in node.all_input_nodes)
        return tuple(dict.fromkeys(arg for arg in read if arg not in inside and arg.op != "get_attr"))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """Values that others read."""
        inside = set(self.nodes)
        return tuple(node for node in self.nodes if any(user not in inside for user in node.users))

    @property
    def first_weight(self) -> str:
        """Target of the weight that is read first."""
        product = next(node for node in self.nodes if _is_product(node))
        return str(product.args[1].target)

    @property
    def choices(self) -> dict[str, list] | None:
        """What -O3 has found to be the fastest for which rows; None: nothing has been measured."""
        return self.nodes[0].meta.get(RUN_CHOICES)

    @property
    def max_rows(self) -> int:
        """The most rows that the persistent kernel was found to be faster for; 0 without choices."""
        ranges = (self.choices or {}).get(ROWS, ())
        return max((most for most, label in ranges if label == LABEL), default=0)

    def body(self, root: object, targets: Mapping[str, Callable]) -> fx.GraphModule:
        """The run as a function of its inputs, with what is called in the place of each node; results in a tuple.

        `root` holds the constants: a module, or a mapping by get_attr target.
        """
        return self._module(root, targets, ())

    def body_of_steps(self, root: object) -> fx.GraphModule:
        """The same by its steps: what stands for the library comes before the inputs."""
        return self._module(root, {name: step.run for name, step in self.steps.items()}, ("library",))

    def _module(self, root: object, targets: Mapping[str, Callable], first: Sequence[str]) -> fx.GraphModule:
        graph = fx.Graph()
        library = tuple(graph.placeholder(name) for name in first)
        copies = {node: graph.placeholder(node.name) for node in self.inputs}
        for node in self.nodes:
            for constant in node.all_input_nodes:
                if constant not in copies:
                    copies[constant] = graph.node_copy(constant)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.name in targets:
                copies[node].target = targets[node.name]
                copies[node].args = (*library, *copies[node].args)
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(dict(root) if isinstance(root, Mapping) else root, graph)


def run_candidates(ops: Callable, persistent: Callable) -> list[Implementation]:
    """Both ways to compute a run, the default first."""
    one = Implementation("run", BY_OPS, "cuda", ops)
    return [one, replace(one, label=LABEL, run=persistent, max_rows=FEW_ROWS)]


def find_runs(graph: fx.GraphModule, target: Target, constants: Collection[str]) -> list[Run]:
    """In the graph's order. `constants` are targets of get_attr nodes whose memory nothing on the device writes."""
    runs: list[list[fx.Node]] = [[]]
    steps: dict[fx.Node, Implementation] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        step = step_of(OpCall.of(node, target, constants)) if op_of(node.target) else None
        if step is not None:
            steps[node] = step
        if step is not None or (is_free(node) and not is_write(node)):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    trimmed = (_trimmed(run, steps) for run in runs)
    return [Run(run, {node.name: steps[node] for node in run if node in steps}) for run in trimmed if run]


def _trimmed(run: Sequence[fx.Node], steps: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """From the first op that reads rows to the last; empty if that is no run."""
    at = [k for k, node in enumerate(run) if node in steps]
    while at and is_write(run[at[0]]):
        del at[0]
    found = tuple(run[at[0] : at[-1] + 1]) if at else ()
    return found if len(at) > 1 and any(_is_product(node) for node in found) else ()


def _is_product(node: fx.Node) -> bool:
    op = op_of(node.target)
    return op is not None and op.is_product


def fuse_persistent(calls: Sequence[tuple[Run, Callable]]) -> GraphPass:
    """What is called in the place of each run; the graph is a copy of that of the runs, with the same names."""

    def fuse_persistent(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
        of_name = {node.name: node for node in graph.graph.nodes}
        for run, call in reversed(calls):  # a run's inputs may be what an earlier run's call will give
            nodes, inputs, outputs = ([of_name[n.name] for n in part] for part in (run.nodes, run.inputs, run.outputs))
            whole = insert_call(nodes[0], call, tuple(inputs), nodes[0], None)
            take_over(outputs, insert_parts(nodes[0], whole, outputs))
            for node in reversed([node for node in nodes if node not in outputs]):
                graph.graph.erase_node(node)
        return PassResult(len(calls))

    return fuse_persistent
