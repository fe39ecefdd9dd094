"""Removes ops without effect, and rewrites equivalent spellings to one.

x.to(same dtype), contiguous, clone, dropout, * 1.0, slice of everything   -> x
cat([x, nothing])                                                          -> x
x.to(dtype), type_as, _to_copy                                             -> convert_element_type(x, dtype)
weight * x                                                                 -> x * weight
chunk(x, n)                                                                -> split_with_sizes
silu_(x), scatter_(x, ...), x.div_(y)                                      -> silu(x), scatter(x, ...), x / y
the same op on the same arguments twice                                    -> once
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from fuseline.compile.graph.edit import hoist_constants, is_shared_with_write, is_write, memory_of, replace, take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult, each_call
from fuseline.compile.graph.match import cast, is_constant, is_node, is_number

aten = torch.ops.aten
END = 1 << 40
NOTHING = (
    aten.contiguous.default, aten.dropout.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten.detach_.default,
)  # fmt: skip
CASTS = (
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default,
)  # fmt: skip

OUT_OF_PLACE = {
    aten.silu_.default: aten.silu.default, aten.scatter_.value: aten.scatter.value, aten.div_.Tensor: aten.div.Tensor,
}  # fmt: skip


@each_call
def remove_noops(node: fx.Node) -> bool:
    rule = RULES.get(node.target)
    return rule is not None and rule(node)


def _forward(node: fx.Node, to: fx.Node | None = None) -> bool:
    """Replaces the node by one of its arguments, the first unless given, if neither of the two is written."""
    source = to or node.args[0]
    if is_shared_with_write(node) or is_shared_with_write(source):
        return False
    take_over([node], [source])
    return True


def _cast(node: fx.Node) -> bool:
    source, dtype = node.args[0], node.meta["val"].dtype
    return _forward(node) if source.meta["val"].dtype == dtype else replace(node, cast, (source, dtype))


def _slice(node: fx.Node) -> bool:
    _, _, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    is_whole = start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end > END))
    return is_whole and _forward(node)


def _times_one(node: fx.Node) -> bool:
    return is_number(node.args[1]) and node.args[1] == 1 and _forward(node)


def _cat(node: fx.Node) -> bool:
    """Replaces a cat by its only non-empty part."""
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    sizes = [part.meta["val"].shape[dim] for part in parts]
    # A size that is not known is not compared: that would fix it.
    filled = [part for part, size in zip(parts, sizes, strict=True) if not isinstance(size, int) or size != 0]
    if len(filled) != 1 or len(parts) == 1 or filled[0].meta["val"].ndim != node.meta["val"].ndim:
        return False
    return _forward(node, filled[0])


RULES: dict[object, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(NOTHING, _forward),
    **dict.fromkeys(CASTS, _cast),
    aten.slice.Tensor: _slice,
    aten.mul.Tensor: _times_one,
    aten.cat.default: _cat,
}


def canonicalize(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    matches = 0
    for node in list(graph.graph.nodes):
        if node.target in (aten.mul.Tensor, aten.add.Tensor) and not node.kwargs:
            matches += _weights_right(node)
        elif node.target is aten.chunk.default:
            matches += _split(node)
        elif node.target in OUT_OF_PLACE:
            matches += _out_of_place(node)
    hoist_constants(graph.graph)
    return PassResult(matches)


def _weights_right(node: fx.Node) -> bool:
    left, right = node.args
    is_swapped = not is_node(left) or (is_constant(left) and is_node(right) and not is_constant(right))
    if is_swapped:
        node.args = (right, left)
    return is_swapped


def _out_of_place(node: fx.Node) -> bool:
    """Replaces silu_(x) by silu(x), or another op alike, if nothing reads the memory of x afterwards."""
    x = node.args[0]
    is_own = memory_of(x) is x or _is_only_reader(x)
    floats = {value.dtype for arg in node.all_input_nodes if (value := arg.meta["val"]).is_floating_point()}
    if not is_own or any(user > node for user in x.users) or len(floats) != 1:
        return False
    node.target = OUT_OF_PLACE[node.target]
    return True


def _is_only_reader(part: fx.Node) -> bool:
    """Whether `part` is a part of a split whose memory nothing else reads; parts do not overlap."""
    if part.target is not operator.getitem:
        return False
    split = part.args[0]
    alike = [user for user in split.users if user.target is operator.getitem and user.args[1] == part.args[1]]
    return alike == [part] and list(memory_of(part).users) == [split]


def _split(node: fx.Node) -> bool:
    dim = node.args[2] if len(node.args) > 2 else 0
    sizes = [part.shape[dim] for part in node.meta["val"]]
    is_known = all(isinstance(size, int) for size in sizes)
    return is_known and replace(node, aten.split_with_sizes.default, (node.args[0], sizes, dim))


def merge_equal(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Eliminates common subexpressions, except ops that write, the memory they write, and attention."""
    seen: dict[str, fx.Node] = {}
    matches = 0
    for node in list(graph.graph.nodes):
        has_effect = node.target is torch.ops.fuseline.attention.default or is_write(node)
        if node.op not in ("call_function", "get_attr") or has_effect:
            continue
        key = repr((node.op, str(node.target), node.args, sorted(node.kwargs.items())))
        first = seen.setdefault(key, node)
        if first is not node and not any(is_shared_with_write(value) for value in (node, *node.all_input_nodes)):
            take_over([node], [first])
            matches += 1
    return PassResult(matches)

