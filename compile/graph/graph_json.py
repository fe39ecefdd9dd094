"""Conversion of a captured graph to JSON values and back.

    {"nodes": [{"name", "op", "target", "args", "kwargs", "val", note?: ...}, ...], "vals": [...]}

Notes are those of NOTES. Nodes refer to each other by position, and to their meta value by its position in `vals`,
since many nodes share one. Sizes are numbers or arithmetic on T, the number of tokens. Nothing in the text is executed:
targets are looked up by name.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn

from fuseline.compile.cache.files import CacheError
from fuseline.compile.specs import WeightSource

NAMESPACES = ("aten", "prims", "fuseline")
FUNCTIONS: Mapping[str, Callable] = {
    name: getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
}
TORCH_TYPES = {
    "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "memory_format": torch.memory_format,
}  # fmt: skip
ARITHMETIC: Mapping[type | str, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow,
    "FloorDiv": operator.floordiv, "Mod": operator.mod,
}  # fmt: skip


def _weight_source(values: dict[str, Any]) -> WeightSource:
    return WeightSource(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


NOTES: Mapping[str, tuple[Callable, Callable]] = {
    "fqn": (str, str), "weight": (asdict, _weight_source), "region": (int, int), "is_embedded": (bool, bool),
}  # fmt: skip
"""How meta entries of nodes other than values are encoded and decoded."""


PLAIN: AbstractContextManager = nullcontext()
"""Makes plain meta tensors, whatever device the values belong to."""


class GraphFormatError(CacheError):
    """The graph cannot be represented in the format, or the text does not follow it."""


def encode(graph: fx.Graph) -> dict[str, Any]:
    """Returns JSON values. Raises GraphFormatError."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    vals: dict[str, tuple[int, Any]] = {}
    nodes = []
    for node in graph.nodes:
        val = _encode_val(node.meta.get("val"))
        entry = {
            "name": node.name,
            "op": node.op,
            "target": _encode_target(node.target),
            "args": _encode(node.args, position),
            "kwargs": _encode(node.kwargs, position),
            "val": vals.setdefault(repr(val), (len(vals), val))[0],
        }
        notes = {name: write(node.meta[name]) for name, (write, _) in NOTES.items() if name in node.meta}
        nodes.append(entry | notes)
    return {"nodes": nodes, "vals": [val for _, val in vals.values()]}


def decode(values: dict[str, Any], min_tokens: int, max_tokens: int, example: int) -> fx.Graph:
    """Returns the graph; its meta values share one new shape environment. Raises GraphFormatError."""
    return _decode_graph(values, _symbolic(min_tokens, max_tokens, example))


def decode_fixed(values: dict[str, Any], num_tokens: int) -> fx.Graph:
    """Returns the graph with meta values for `num_tokens` tokens, enough to lower it. Raises GraphFormatError.

    Avoids a shape environment, whose imports (torch._dynamo, sympy) take more than a second.
    """
    return _decode_graph(values, _Values(num_tokens, PLAIN))


def _decode_graph(values: dict[str, Any], decoder: _Values) -> fx.Graph:
    try:
        vals = [decoder.val(val) for val in values["vals"]]
        graph, nodes = fx.Graph(), []
        for entry in values["nodes"]:
            args, kwargs = _decode(entry["args"], nodes), _decode(entry["kwargs"], nodes)
            node = graph.create_node(entry["op"], _decode_target(entry), args, kwargs, entry["name"])
            notes = {name: read(entry[name]) for name, (_, read) in NOTES.items() if name in entry}
            node.meta = {"val": vals[entry["val"]]} | notes
            nodes.append(node)
        return graph
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise GraphFormatError(f"not a captured graph: {error!r}") from error


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """Wraps the graph in a module with a meta buffer for each of its parameters."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            root.register_buffer(node.target, torch.empty(node.meta["val"].shape, device="meta"))
    return fx.GraphModule(root, graph)


def _encode_target(target: object) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    name = getattr(target, "__name__", "")
    if FUNCTIONS.get(name) is target:
        return f"operator.{name}"
    raise GraphFormatError(f"call of {target}")


def _decode_target(entry: dict[str, Any]) -> str | Callable:
    if entry["op"] != "call_function":
        return entry["target"]
    space, name, *overload = entry["target"].split(".")
    if space == "operator":
        return FUNCTIONS[name]
    if space not in NAMESPACES:
        raise GraphFormatError(f"call of {entry['target']}")
    return getattr(getattr(getattr(torch.ops, space), name), overload[0])


def _encode(value: object, position: Mapping[fx.Node, int]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": position[value]}
    if isinstance(value, list):
        return [_encode(item, position) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, position) for item in value]}
    if isinstance(value, dict):
        return {"dict": {key: _encode(item, position) for key, item in value.items()}}
    for kind, torch_type in TORCH_TYPES.items():
        if isinstance(value, torch_type):
            return {kind: str(value).removeprefix("torch.")}
    raise GraphFormatError(f"argument {value!r}")


def _decode(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in content.items()}
    return _torch_value(kind, content)


def _torch_value(kind: str, content: str) -> object:
    if kind == "device":
        return torch.device(content)
    value = getattr(torch, content)
    if not isinstance(value, TORCH_TYPES[kind]):
        raise GraphFormatError(f"{kind} {content}")
    return value


def _encode_val(val: object) -> Any:
    if isinstance(val, Tensor):
        sizes = [_encode_size(size) for size in (*val.shape, *val.stride(), val.storage_offset())]
        return {"tensor": [str(val.dtype).removeprefix("torch."), str(val.device), val.ndim, *sizes]}
    if isinstance(val, (list, tuple)):
        return {type(val).__name__: [_encode_val(item) for item in val]}
    if isinstance(val, SymInt):
        return {"size": _encode_size(val)}
    if val is None or isinstance(val, (bool, int, float)):
        return val
    raise GraphFormatError(f"value of type {type(val).__name__}")


def _encode_size(size: int | SymInt) -> int | str:
    if isinstance(size, int):
        return size
    expr = size.node.expr
    if len(expr.free_symbols) != 1:
        raise GraphFormatError(f"size {expr}")
    (symbol,) = expr.free_symbols
    text = str(expr.xreplace({symbol: type(symbol)("T", integer=True)}))
    evaluate(text, 1)
    return text


def evaluate(text: str, num_tokens: int | SymInt) -> int | SymInt:
    """Evaluates arithmetic on T without running text as code. Raises GraphFormatError."""

    def walk(node: ast.expr) -> int | SymInt:
        match node:
            case ast.Constant(value=int() as value):
                return value
            case ast.Name(id="T"):
                return num_tokens
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.Call(func=ast.Name(id=name), args=[left, right]) if name in ARITHMETIC:
                return ARITHMETIC[name](walk(left), walk(right))
        raise GraphFormatError(f"size {text}")

    return walk(ast.parse(text, mode="eval").body)


def _symbolic(min_tokens: int, max_tokens: int, example: int) -> _Values:
    """Values that share one shape environment with one symbol."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental import symbolic_shapes as shapes
    from torch.utils._sympy.value_ranges import ValueRanges

    mode = FakeTensorMode(shape_env=shapes.ShapeEnv(), allow_non_fake_inputs=True)
    limits = shapes.StrictMinMaxConstraint(vr=ValueRanges(min_tokens, max_tokens), warn_only=False)
    dims = shapes.StatelessSymbolicContext([shapes.DimDynamic.DYNAMIC], constraint_sizes=[limits])
    row = mode.from_tensor(torch.empty(example, device="meta"), symbolic_context=dims)
    return _Values(row.shape[0], mode)


class _Values:
    """Makes meta values for a number of tokens, possibly a symbol of the fake `mode`."""

    def __init__(self, num_tokens: int | SymInt, mode: AbstractContextManager) -> None:
        self._mode = mode
        self._num_tokens = num_tokens

    def val(self, val: Any) -> Any:
        if not isinstance(val, dict):
            return val
        ((kind, content),) = val.items()
        if kind == "size":
            return self._size(content)
        if kind == "tensor":
            return self._tensor(*content)
        return {"list": list, "tuple": tuple}[kind](self.val(item) for item in content)

    def _size(self, size: int | str) -> int | SymInt:
        return evaluate(size, self._num_tokens) if isinstance(size, str) else size

    def _device(self, name: str) -> torch.device:
        return torch.device("meta" if self._mode is PLAIN else name)

    def _tensor(self, dtype: str, device: str, ndim: int, *numbers: int | str) -> Tensor:
        *sizes, offset = (self._size(number) for number in numbers)
        with self._mode:
            made = torch.empty_strided(
                sizes[:ndim], sizes[ndim:], dtype=_torch_value("dtype", dtype), device=self._device(device)
            )
            return made.as_strided(sizes[:ndim], sizes[ndim:], offset) if offset else made
