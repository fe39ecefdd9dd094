"""What kernels are measured with: calls of an op at some number of rows, with weights of the nodes that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fuseline.compile import ops  # noqa: F401  registers the ops named below
from fuseline.compile.kernels.attention_batch import AttentionLayer, make_batch
from fuseline.compile.kernels.choice import PREFILL
from fuseline.compile.kernels.cuda import OPS, aten
from fuseline.compile.tuning.timer import Arguments

MAX_TENSORS = 8
"""Weights of one shape that are read in turns."""
CONTEXT = 1024
"""Keys of a sequence in steps of one token each."""
CONSTANTS = {
    aten.linear.default: slice(1, None), OPS.linear_act_mul.default: slice(1, None),
    OPS.experts.default: slice(3, None), OPS.rms_norm.default: slice(1, None), OPS.layer_norm.default: slice(1, None),
    OPS.add_rms_norm.default: slice(2, None), OPS.add_layer_norm.default: slice(2, None),
    OPS.rope.default: slice(1, 3), OPS.rope_cache.default: slice(5, 7),
}  # fmt: skip
"""Arguments that have to be constants, where there are any: only with those can a call be made up."""
OF_HEADS = (OPS.rope.default, OPS.rope_cache.default, OPS.write_cache.default)
NORMS = (
    OPS.rms_norm.default, OPS.add_rms_norm.default, OPS.layer_norm.default, OPS.add_layer_norm.default,
)  # fmt: skip


class CallMaker:
    """`weights` by get_attr target, on the device or, if they are fetched in every pass, on the host."""

    def __init__(self, weights: Mapping[str, Tensor], device: str) -> None:
        self._weights = weights
        self._device = torch.device(device)

    def arguments(self, nodes: Sequence[fx.Node], phase: str, rows: int) -> Arguments:
        """Calls of nodes that differ in nothing but their weights."""
        op = nodes[0].target
        if op is OPS.paged_attention.default:
            return self._attention(nodes[0], phase, rows)
        make = self._experts if op is OPS.experts.default else self._heads if op in OF_HEADS else self._lines
        # What is not there may not fit beside what is: then one weight will do.
        chosen = [node for node in nodes if not self._is_away(node)][:MAX_TENSORS] or nodes[:1]
        return Arguments([make(node, rows) for node in chosen])

    def _is_away(self, node: fx.Node) -> bool:
        constants = (arg for arg in node.all_input_nodes if arg.op == "get_attr")
        return any(self._weights[str(arg.target)].device.type != self._device.type for arg in constants)

    def _lines(self, node: fx.Node, rows: int) -> tuple:
        """Products, norms, activations: what changes from step to step has lines [1, rows, ...]."""
        return tuple(
            self._randn(arg, 1, rows, arg.meta["val"].shape[-1]) if _is_input(arg) else self._value(arg)
            for arg in node.args
        )

    def _heads(self, node: fx.Node, rows: int) -> tuple:
        """Rope and the cache's writes: heads of a token side by side, blocks one after the other."""
        return tuple(self._of_heads(name, arg, node, rows) for name, arg in _named(node))

    def _of_heads(self, name: str, arg: object, node: fx.Node, rows: int) -> object:
        if not _is_input(arg):
            return self._value(arg)
        shape, dtype = arg.meta["val"].shape, arg.meta["val"].dtype
        if name == "slots":
            return torch.arange(rows, device=self._device)
        if name == "rows":
            return torch.arange(rows, device=self._device) % self._value(dict(_named(node))["cos"]).shape[0]
        if name.endswith("_cache"):
            return torch.zeros((-(-rows // shape[2]), *shape[1:]), dtype=dtype, device=self._device)
        return self._randn(arg, 1, rows, shape[1], shape[3]).transpose(1, 2)

    def _experts(self, node: fx.Node, rows: int) -> tuple:
        x, ids, scores, gate_up, *rest = node.args
        num_experts, top_k = gate_up.meta["val"].shape[0], ids.meta["val"].shape[1]
        chosen = torch.rand(rows, num_experts).topk(top_k).indices.to(self._device)
        values = self._randn(x, rows, x.meta["val"].shape[1]), chosen, self._randn(scores, rows, top_k)
        return *values, *map(self._value, (gate_up, *rest))

    def _attention(self, node: fx.Node, phase: str, rows: int) -> Arguments:
        """A prompt, or sequences of one token; their keys are as many as are not found in a cache."""
        layer, table = AttentionLayer.of(*_shapes(node.args)), str(node.args[3].target)
        lengths, counts = ([rows], [rows]) if phase == PREFILL else ([CONTEXT] * rows, [1] * rows)
        batch = make_batch(layer, lengths, counts, str(self._device), table)
        return Arguments([batch.args], batch.host)

    def _value(self, arg: object) -> object:
        return self._weights[str(arg.target)].to(self._device) if isinstance(arg, fx.Node) else arg

    def _randn(self, like: fx.Node, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device).to(like.meta["val"].dtype)


def has_constants(node: fx.Node) -> bool:
    """Whether a call of the node can be made up."""
    args = node.args[CONSTANTS[node.target]] if node.target in CONSTANTS else ()
    return not any(map(_is_input, args))


def described(node: fx.Node) -> str:
    """Everything that does not change from step to step."""
    if node.target is OPS.paged_attention.default:
        return str(AttentionLayer.of(*_shapes(node.args)))
    return ", ".join(_text(name, arg) for name, arg in _named(node))


def _text(name: str, arg: object) -> str:
    """A weight by its shape, heads [1, H, T, D] by their number and size, other inputs by their last size."""
    if not isinstance(arg, fx.Node):
        return str(arg)
    shape, dtype = arg.meta["val"].shape, str(arg.meta["val"].dtype).removeprefix("torch.")
    if name.endswith("_cache"):
        shape = shape[1:]
    elif arg.op != "get_attr":
        shape = (shape[1], shape[3]) if len(shape) == 4 else shape[-1:]
    return f"{'x'.join(str(int(size)) for size in shape)} {dtype}"


def _named(node: fx.Node) -> list[tuple[str, object]]:
    """The arguments that the node has, by their names in the op's schema."""
    return [(of.name, arg) for of, arg in zip(node.target._schema.arguments, node.args, strict=False)]


def _is_input(arg: object) -> bool:
    return isinstance(arg, fx.Node) and arg.op != "get_attr"


def _shapes(args: tuple) -> tuple:
    return fx.node.map_aggregate(args, lambda arg: arg.meta["val"] if isinstance(arg, fx.Node) else arg)
