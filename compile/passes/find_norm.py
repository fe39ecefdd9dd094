"""Raises RMSNorm, in its three orders of casts, and LayerNorm to one op each.

h = cast(x, f32); n = h * rsqrt(mean(h^2) + eps)
cast(n, dtype) * weight                 -> rms_norm(x, weight, eps, CAST_THEN_SCALE)
cast(n * cast(weight, f32), dtype)      -> rms_norm(x, weight, eps, SCALE_THEN_CAST)
cast(n * (cast(weight, f32) + 1), dtype)-> rms_norm(x, weight, eps, ONE_PLUS)
layer_norm(x, [D], weight, bias, eps)   -> layer_norm(x, weight, bias, eps)
cast(n * cast(weight, f32), dtype), h = cast(x, f32) - mean(cast(x, f32))  -> layer_norm(x, weight, None, eps)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fuseline.compile.graph.edit import replace
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.graph.match import Call, Either, Var, cast, is_constant, is_node, is_number, match, maybe_cast
from fuseline.compile.ops import codes

aten = torch.ops.aten
OPS = torch.ops.fuseline

WIDE = Var("wide", is_node)
MEAN = Call(aten.mean.dim, Call(aten.pow.Tensor_Scalar, WIDE, 2), [-1], True)
NORMED = Call(
    aten.mul.Tensor, WIDE, Call(aten.rsqrt.default, Call(aten.add.Tensor, MEAN, Var("eps", is_number))), commutes=True
)
CENTERED = Call(aten.sub.Tensor, Var("uncentered", is_node), Call(aten.mean.dim, Var("uncentered"), [-1], True))
WEIGHT = Var("weight", is_constant)
ONE_PLUS = Call(aten.add.Tensor, maybe_cast(WEIGHT), Var("one", lambda v: is_number(v) and v == 1))
SCALED_LATE = Call(aten.mul.Tensor, Call(cast, NORMED, name="down"), WEIGHT, commutes=True)
SCALED_WIDE = Call(aten.mul.Tensor, NORMED, Either(ONE_PLUS, Call(cast, WEIGHT), WEIGHT), name="product", commutes=True)


@each_call
def find_norm(node: fx.Node) -> bool:
    return _layer_norm(node) if node.target is aten.layer_norm.default else _rms_norm(node)


def _rms_norm(node: fx.Node) -> bool:
    found = match(SCALED_LATE, node)
    if found is not None:
        return _replace(node, found, codes.NORM_CAST_THEN_SCALE)
    found = match(maybe_cast(SCALED_WIDE), node)
    if found is not None:
        return _replace(node, found, codes.NORM_ONE_PLUS if "one" in found else codes.NORM_SCALE_THEN_CAST)
    found = match(maybe_cast(NORMED), node)
    is_scaled_later = any(user.target in (aten.mul.Tensor, cast) for user in node.users)
    return found is not None and not is_scaled_later and _replace(node, found, codes.NORM_CAST_THEN_SCALE)


def _replace(node: fx.Node, found: dict[str, Any], mode: int) -> bool:
    """Returns False if the result's dtype differs from the input's (a later cast is the norm's) or the weight's."""
    centered = match(CENTERED, found["wide"]) if mode == codes.NORM_SCALE_THEN_CAST else None
    wide = centered["uncentered"] if centered else found["wide"]
    x = wide.args[0] if wide.target is cast else wide
    if x.meta["val"].dtype != node.meta["val"].dtype:
        return False
    weight = found.get("weight")
    value = x.meta["val"]
    if weight is not None and (weight.meta["val"].shape != value.shape[-1:] or weight.meta["val"].dtype != value.dtype):
        return False
    if centered:
        return replace(node, OPS.layer_norm.default, (x, weight, None, float(found["eps"])))
    return replace(node, OPS.rms_norm.default, (x, weight, float(found["eps"]), mode))


def _layer_norm(node: fx.Node) -> bool:
    x, shape, weight, bias, eps = (*node.args, *(None, None, None, None, 1e-5)[len(node.args) :])[:5]
    return len(shape) == 1 and replace(node, OPS.layer_norm.default, (x, weight, bias, float(eps)))
