"""Prints a graph as readable text."""

from __future__ import annotations

from torch import Tensor, fx

from fuseline.compile.graph.runner import op_name

DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32", "bool": "bool"}


def show(graph: fx.GraphModule) -> str:
    """Formats one line per node: name: type[shape] = op(arguments)."""
    return "\n".join(_line(node) for node in graph.graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    kind = _value(node.meta.get("val"))
    if node.op == "placeholder":
        return f"{node.name}: {kind} = input"
    if node.op == "get_attr":
        source = node.meta.get("weight") or node.meta.get("fqn")
        return f"{node.name}: {kind} = constant {source}"
    args = [_argument(arg) for arg in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{node.name}: {kind} = {op_name(node)}({', '.join(args)})"


def _argument(arg: object) -> str:
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in arg) + "]"
    return str(arg)


def _value(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{DTYPES.get(dtype, dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_value(item) for item in value) + ")"
    return "()" if value is None else str(value)
