"""Torch's pointwise ops and copies on a CPU: computed in float32, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fuseline.compile.kernels.registry import Implementation, PlanCall
from fuseline.compile.ops import codes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COPIES = ("aten.clone", "aten.contiguous", "prims.convert_element_type")
UNARY = ("neg", "silu", "relu", "tanh", "sigmoid", "exp", "cos", "sin", "rsqrt", "sqrt", "reciprocal",
         "square")  # fmt: skip
BINARY = ("add", "sub", "mul", "div")
COMMUTATIVE = ("add", "mul")


def is_float(x: Tensor, *_: object, **__: object) -> bool:
    return x.dtype in FLOATS


def unary(op: str, code: str, supports: Callable[..., bool] = is_float) -> Implementation:
    number = codes.UNARY[code]

    def call(node: fx.Node) -> PlanCall:
        return PlanCall("unary", (node.args[0],), (number,), (0.0, 0.0))

    return Implementation(op, "unary", "cpu", call=call, supports=supports)


def gelu(code: str, spelling: str) -> Implementation:
    return unary("aten.gelu", code, lambda x, *, approximate="none": approximate == spelling)


def binary(name: str) -> tuple[Implementation, Implementation]:
    """Implementations for two tensors, and for a tensor and a number."""
    code, op = codes.BINARY[name], f"aten.{name}.Tensor"

    def takes_tensors(left: object, right: object, **_: object) -> bool:
        return isinstance(left, Tensor) and isinstance(right, Tensor)

    def takes_number(left: object, right: object, alpha: float = 1, **_: object) -> bool:
        is_right, is_left = (isinstance(x, (int, float)) for x in (right, left))
        other = left if is_right else right
        return alpha == 1 and isinstance(other, Tensor) and (is_right or is_left and name in COMMUTATIVE)

    def call_tensors(node: fx.Node) -> PlanCall:
        return PlanCall("binary", node.args[:2], (code,), (float(node.kwargs.get("alpha", 1)),))

    def call_number(node: fx.Node) -> PlanCall:
        tensor, number = node.args[:2] if isinstance(node.args[0], fx.Node) else node.args[1::-1]
        return PlanCall("binary_scalar", (tensor,), (code,), (float(number),))

    return (
        Implementation(op, "binary", "cpu", call=call_tensors, supports=takes_tensors),
        Implementation(op, "binary_scalar", "cpu", call=call_number, supports=takes_number),
    )


def power(node: fx.Node) -> PlanCall:
    return PlanCall("binary_scalar", (node.args[0],), (codes.BINARY["pow"],), (float(node.args[1]),))


def softplus(node: fx.Node) -> PlanCall:
    beta, threshold = (*node.args[1:], *(1.0, 20.0)[len(node.args) - 1 :])
    return PlanCall("unary", (node.args[0],), (codes.UNARY["softplus"],), (float(beta), float(threshold)))


def is_bounded(x: Tensor, low: object = None, high: object = None) -> bool:
    return is_float(x) and all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))


def clamp(node: fx.Node) -> PlanCall:
    low, high = (*node.args[1:], None, None)[:2]
    bounds = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return PlanCall("unary", (node.args[0],), (codes.UNARY["clamp"],), bounds)


def copy(node: fx.Node) -> PlanCall:
    return PlanCall("copy", (node.args[0],))


IMPLEMENTATIONS = (
    *(unary(f"aten.{code}", code) for code in UNARY),
    gelu("gelu_tanh", "tanh"),
    gelu("gelu", "none"),
    unary("aten.pow.Tensor_Scalar", "square", lambda x, exponent: is_float(x) and exponent == 2),
    Implementation("aten.pow.Tensor_Scalar", "binary_scalar", "cpu", call=power, supports=is_float),
    Implementation("aten.softplus", "unary", "cpu", call=softplus, supports=is_float),
    Implementation("aten.clamp", "unary", "cpu", call=clamp, supports=is_bounded),
    *(implementation for name in BINARY for implementation in binary(name)),
    *(Implementation(op, "copy", "cpu", call=copy) for op in COPIES),
)
