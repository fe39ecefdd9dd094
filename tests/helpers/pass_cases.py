"""Small modules captured as graphs, one pass run over them, and both run on numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from fuseline.compile.config import CompileConfig
from fuseline.compile.formats.panels import pack_columns, panels_shape
from fuseline.compile.graph.graph_pass import GraphPass, PassContext, PassResult
from fuseline.compile.graph.runner import clean_up, count_ops
from fuseline.compile.ops import registry  # noqa: F401  defines torch.ops.fuseline
from fuseline.compile.specs import WeightSource

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ROWS = 64
"""Rows of rope tables."""


@dataclass
class Case:
    """A graph with the numbers of its constants and of its inputs."""

    graph: fx.GraphModule
    inputs: dict[str, Tensor]
    values: dict[str, Tensor]
    ctx: PassContext
    results: list[PassResult] = field(default_factory=list)

    def apply(self, *passes: GraphPass) -> int:
        """Runs the passes as the runner does; returns the matches of the last one."""
        for graph_pass in passes:
            self.results.append(graph_pass(self.graph, self.ctx))
            clean_up(self.graph)
            self.values |= self.results[-1].constants
        return self.results[-1].matches

    def ops(self) -> dict[str, int]:
        return dict(count_ops(self.graph))

    def run(self, **more: Tensor) -> object:
        """The graph on its numbers; inputs that passes have added come in `more`."""
        graph = copy.deepcopy(self.graph)
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                setattr(graph, node.target, self._value(node))
        inputs = {name: value.clone() for name, value in self.inputs.items()} | more
        return graph(*(inputs[node.target] for node in graph.graph.nodes if node.op == "placeholder"))

    def _value(self, node: fx.Node) -> Tensor:
        source: WeightSource | None = node.meta.get("weight")
        if source is None:
            return self.values[node.meta["fqn"]]
        return materialize(source, self.values, node.meta["val"])


def materialize(source: WeightSource, values: dict[str, Tensor], like: Tensor) -> Tensor:
    """Builds the weight of a WeightSource as loading does, in plain torch."""
    parts = []
    for index, name in enumerate(source.names):
        pad = source.pads[index] if source.pads else 0
        part = torch.zeros(pad, *like.shape[1:], dtype=like.dtype) if pad else values[name]
        if source.heads:
            num_heads, begin, end = source.heads
            part = part.unflatten(0, (num_heads, -1))[:, begin:end]
        parts.append(part.mT if source.transpose else part)
    whole = torch.cat(parts)
    if source.format == "rows":
        return whole
    flat = whole if whole.ndim == 3 else whole[None]
    panels = torch.zeros(panels_shape(tuple(flat.shape)), dtype=whole.dtype)
    for expert, block in zip(panels, flat, strict=True):
        pack_columns(expert, block, 0)
    return panels.view(like.shape)


def case(module: nn.Module | Callable, dtype: torch.dtype, disabled: tuple[str, ...] = (), **inputs: Tensor) -> Case:
    """`module` captured in `dtype` on inputs by the names of its arguments; weights are random."""
    torch.manual_seed(0)
    if not isinstance(module, nn.Module):
        module = _Function(module)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.randn_like(tensor, dtype=torch.float32).to(dtype if tensor.is_floating_point() else None)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, strict=False)
    values = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    constants = {name: values[name] for name, _ in module.named_buffers() if name in values}
    ctx = PassContext(CompileConfig("", disabled_passes=disabled), None, ROWS, ROWS, constants)
    return Case(_lift(program), inputs, values, ctx)


class _Function(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        # torch.export reads the names of the inputs from here.
        self.forward = function


def _lift(program: torch.export.ExportedProgram) -> fx.GraphModule:
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    out, done = fx.Graph(), {}
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.kind != InputKind.USER_INPUT:
            done[node] = out.create_node("get_attr", spec.target.replace(".", "__"))
            done[node].meta = {"fqn": spec.target}
        elif node.op == "output":
            returned = node.args[0]
            done[node] = out.output(done[returned[0]] if len(returned) == 1 else tuple(done[n] for n in returned))
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue
        else:
            done[node] = out.node_copy(node, lambda n: done[n])
        done[node].meta = {**done[node].meta, "val": _on_meta(node.meta.get("val"))}
    attributes = {node.target: node.meta["val"] for node in out.nodes if node.op == "get_attr"}
    return fx.GraphModule(attributes, out)


def _on_meta(value: object) -> object:
    """As in a real capture: shapes and dtypes without numbers."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(_on_meta(part) for part in value) if isinstance(value, (list, tuple)) else value
