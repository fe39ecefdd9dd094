"""Which native kernel computes a graph op, and with which arguments (csrc/cpu/ops.def)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fuseline.compile.ops import codes

aten = torch.ops.aten
OPS = torch.ops.fuseline
cast = torch.ops.prims.convert_element_type.default
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NativeCall:
    """Arguments after the outputs. `inputs` are nodes or None; `num_outputs` new tensors come first, caches after."""

    op: str
    inputs: tuple[fx.Node | None, ...]
    ints: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    mutated: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Kernels:
    """Finds the native call of a node; `value` gives a node's meta tensor."""

    value: Callable[[object], object]
    rules: dict = field(default_factory=lambda: RULES)

    def find(self, node: fx.Node) -> NativeCall | None:
        rule = self.rules.get(node.target)
        return rule(node, self.value) if rule else None


def _is_tensor(value: Callable, arg: object) -> bool:
    return isinstance(arg, fx.Node) and isinstance(value(arg), Tensor)


def _unary(code: str) -> Callable:
    def rule(node: fx.Node, value: Callable) -> NativeCall | None:
        if value(node.args[0]).dtype not in FLOATS:
            return None
        return NativeCall("unary", (node.args[0],), (codes.UNARY[code],), (0.0, 0.0))

    return rule


def _gelu(node: fx.Node, value: Callable) -> NativeCall:
    code = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return NativeCall("unary", (node.args[0],), (codes.UNARY[code],), (0.0, 0.0))


def _pow(node: fx.Node, value: Callable) -> NativeCall | None:
    if value(node.args[0]).dtype not in FLOATS:
        return None
    if node.args[1] == 2:
        return NativeCall("unary", (node.args[0],), (codes.UNARY["square"],), (0.0, 0.0))
    return NativeCall("binary_scalar", (node.args[0],), (codes.BINARY["pow"],), (float(node.args[1]),))


def _binary(code: str) -> Callable:
    def rule(node: fx.Node, value: Callable) -> NativeCall | None:
        left, right = node.args[:2]
        alpha = float(node.kwargs.get("alpha", 1))
        if _is_tensor(value, left) and _is_tensor(value, right):
            return NativeCall("binary", (left, right), (codes.BINARY[code],), (alpha,))
        if isinstance(right, (int, float)) and _is_tensor(value, left) and alpha == 1:
            return NativeCall("binary_scalar", (left,), (codes.BINARY[code],), (float(right),))
        if isinstance(left, (int, float)) and code in ("add", "mul") and _is_tensor(value, right) and alpha == 1:
            return NativeCall("binary_scalar", (right,), (codes.BINARY[code],), (float(left),))
        return None

    return rule


def _copy(node: fx.Node, value: Callable) -> NativeCall:
    return NativeCall("copy", (node.args[0],))


def _linear(node: fx.Node, value: Callable) -> NativeCall:
    *tensors, num_out = node.args
    return NativeCall("linear", tuple(tensors), (num_out, node.meta.get("choices", 0)))


def _embedding(node: fx.Node, value: Callable) -> NativeCall:
    weight, ids = node.args[:2]
    return NativeCall("embedding", (ids, weight))


def _embedding_panels(node: fx.Node, value: Callable) -> NativeCall:
    *tensors, num_rows = node.args
    return NativeCall("embedding_panels", tuple(tensors), (num_rows,))


def _rms_norm(node: fx.Node, value: Callable) -> NativeCall:
    x, weight, eps, mode = node.args
    return NativeCall("rms_norm", (x, weight), (mode,), (eps,))


def _add_rms_norm(node: fx.Node, value: Callable) -> NativeCall:
    x, residual, weight, eps, mode = node.args
    return NativeCall("add_rms_norm", (x, residual, weight), (mode,), (eps,))


def _layer_norm(node: fx.Node, value: Callable) -> NativeCall:
    return NativeCall("layer_norm", tuple(node.args[:-1]), (), (node.args[-1],))


def _add_layer_norm(node: fx.Node, value: Callable) -> NativeCall:
    return NativeCall("add_layer_norm", tuple(node.args[:-1]), (), (node.args[-1],))


def _act_mul(node: fx.Node, value: Callable) -> NativeCall:
    gate, up, act = node.args
    return NativeCall("act_mul", (gate, up), (act,))


def _rope(node: fx.Node, value: Callable) -> NativeCall:
    *tensors, rotary_dim, layout = node.args
    return NativeCall("rope", tuple(tensors), (rotary_dim, layout))


def _rope_cache(node: fx.Node, value: Callable) -> NativeCall | None:
    k_cache, v_cache, *tensors, rotary_dim, layout = node.args[:11]
    if _has_scales(node.args[11:]):
        return None
    return NativeCall("rope_cache", tuple(tensors), (rotary_dim, layout), mutated=(k_cache, v_cache))


def _write_cache(node: fx.Node, value: Callable) -> NativeCall | None:
    k_cache, v_cache, *tensors = node.args[:5]
    if _has_scales(node.args[5:]):
        return None
    return NativeCall("write_cache", tuple(tensors), mutated=(k_cache, v_cache))


def _paged_attention(node: fx.Node, value: Callable) -> NativeCall | None:
    *tensors, window, scale, softcap = node.args[:10]
    if _has_scales(node.args[10:]):
        return None
    return NativeCall("paged_attention", tuple(tensors), (window,), (scale, softcap))


def _has_scales(rest: tuple) -> bool:
    """Of an fp8 cache: what only a card has."""
    return any(arg is not None for arg in rest)


def _gather_rows(node: fx.Node, value: Callable) -> NativeCall:
    return NativeCall("gather_rows", tuple(node.args))


def _route_topk(node: fx.Node, value: Callable) -> NativeCall:
    logits, _, order, renormalize = node.args[:4]
    return NativeCall("route_topk", (logits,), (order, int(renormalize)))


def _experts(node: fx.Node, value: Callable) -> NativeCall:
    *tensors, act, num_hidden, alpha, limit = node.args
    return NativeCall("experts", tuple(tensors), (act, num_hidden), (alpha, limit))


RULES: dict = {
    aten.neg.default: _unary("neg"),
    aten.silu.default: _unary("silu"),
    aten.gelu.default: _gelu,
    aten.relu.default: _unary("relu"),
    aten.tanh.default: _unary("tanh"),
    aten.sigmoid.default: _unary("sigmoid"),
    aten.exp.default: _unary("exp"),
    aten.cos.default: _unary("cos"),
    aten.sin.default: _unary("sin"),
    aten.rsqrt.default: _unary("rsqrt"),
    aten.sqrt.default: _unary("sqrt"),
    aten.reciprocal.default: _unary("reciprocal"),
    aten.pow.Tensor_Scalar: _pow,
    aten.add.Tensor: _binary("add"),
    aten.sub.Tensor: _binary("sub"),
    aten.mul.Tensor: _binary("mul"),
    aten.div.Tensor: _binary("div"),
    aten.clone.default: _copy,
    aten.contiguous.default: _copy,
    cast: _copy,
    OPS.linear_panels.default: _linear,
    OPS.embedding_panels.default: _embedding_panels,
    aten.embedding.default: _embedding,
    OPS.rms_norm.default: _rms_norm,
    OPS.add_rms_norm.default: _add_rms_norm,
    OPS.layer_norm.default: _layer_norm,
    OPS.add_layer_norm.default: _add_layer_norm,
    OPS.act_mul.default: _act_mul,
    OPS.rope.default: _rope,
    OPS.rope_cache.default: _rope_cache,
    OPS.write_cache.default: _write_cache,
    OPS.paged_attention.default: _paged_attention,
    OPS.gather_rows.default: _gather_rows,
    OPS.route_topk.default: _route_topk,
    OPS.experts_panels.default: _experts,
}
