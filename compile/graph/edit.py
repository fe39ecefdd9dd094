"""Graph edits shared by passes. Passes insert nodes only through this module, which keeps definitions before uses.

A call that replaces others reads its operands at one place, where they were read at several before. `find_place`
finds a place where this gives the same values, moving operands up if needed. If there is none, the graph is unchanged
and the pass has no match.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_iter

from fuseline.compile.ops.library import named_arguments
from fuseline.compile.specs import WeightSource


def placeholder(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """Returns the input called `name`; a new one is added after the others."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if node.target == name:
            return node
    with graph.inserting_after(inputs[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def constant(graph: fx.GraphModule, name: str, value: Tensor, **meta: object) -> fx.Node:
    """Adds a get_attr node at the top; `meta` gives the source of its value (weight= or fqn=)."""
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        node = graph.graph.create_node("get_attr", name.replace(".", "__"))
    like = torch.empty(value.shape, dtype=value.dtype, device="meta")
    graph.register_buffer(node.target, like)
    node.meta = {"val": like, **meta}
    return node


def source_of(node: fx.Node) -> WeightSource:
    """The checkpoint tensors that a get_attr node's value is made of."""
    return node.meta.get("weight") or WeightSource((node.meta["fqn"],))


def results_of(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Returns the graph's results: the logits, then the hidden states if it gives them."""
    (found,) = graph.output_node().args
    return found if isinstance(found, tuple) else (found,)


def insert_call(before: fx.Node, target: object, args: tuple, like: fx.Node, value: object) -> fx.Node:
    """Inserts a call before a node, with `like`'s trace. Raises ValueError if an operand is defined only later."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    copy_meta(like, node, value)
    if late := next((arg for arg in node.all_input_nodes if not arg < node), None):
        raise ValueError(f"{node.name} would read {late.name} before it is defined")
    return node


def insert_op(before: fx.Node, target: Callable, *args: object) -> fx.Node:
    """insert_call with the node's own trace; the value is what the target gives for those of its operands."""
    values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
    return insert_call(before, target, args, before, target(*values))


def replace(old: fx.Node, target: object, args: tuple) -> bool:
    """Replaces `old` by a call that takes its value and users. Returns False, unchanged, if no place is valid."""
    place = find_place(args, [old])
    if place is not None:
        take_over([old], [insert_call(place, target, args, old, old.meta["val"])])
    return place is not None


def replace_all(olds: Sequence[fx.Node], target: object, args: tuple) -> bool:
    """Replaces `olds` by the results of one call. Returns False, unchanged, if no place is valid."""
    place = find_place(args, olds)
    if place is not None:
        values = tuple(old.meta["val"] for old in olds)
        take_over(olds, insert_parts(place, insert_call(place, target, args, olds[0], values), olds))
    return place is not None


def insert_parts(before: fx.Node, whole: fx.Node, olds: Sequence[fx.Node]) -> list[fx.Node]:
    """Inserts a getitem for each result of `whole`; result k takes the trace and value of olds[k]."""
    return [insert_call(before, operator.getitem, (whole, k), old, old.meta["val"]) for k, old in enumerate(olds)]


def take_over(olds: Sequence[fx.Node], news: Sequence[fx.Node]) -> None:
    """Gives the users of each old node to its new node and erases the old one."""
    for old, new in zip(olds, news, strict=True):
        old.replace_all_uses_with(new)
    # In reverse, since olds may read each other.
    for old in sorted(olds, reverse=True):
        old.graph.erase_node(old)


def find_place(args: object, olds: Sequence[fx.Node]) -> fx.Node | None:
    """Returns the node before which a call with `args` can replace `olds`; None if no place is valid.

    This is the first of `olds` if all operands are defined before it, else the place after the last operand. Operands
    defined after the first user of `olds` are moved up before it. Writes and reads of the same memory keep their order.
    """
    operands, ordered = nodes_in(args), _sharing_memory(olds)
    users = [user for old in olds for user in old.users if user not in olds]
    limit = min([*users, *(node for old, node in ordered if node > old)], default=None)
    earlier = [node for old, node in ordered if node < old]
    place, last = min(olds), max([*operands, *earlier], default=None)
    moved: list[fx.Node] = []
    if last is not None and not last < place:
        if limit is None or last < limit:
            place = last.next
        else:
            place, moved = limit, _defined_late(operands, limit)
    if any(node in olds or not set(node.all_input_nodes).isdisjoint(olds) for node in moved):
        return None
    if any(not node < place for node in earlier) or _crosses_write(operands, olds, place):
        return None
    if not all(_can_move_up(node, place) for node in moved):
        return None
    for node in moved:
        place.prepend(node)
    return place


def call_node(node: fx.Node, value: Callable[[object], object]) -> object:
    """Calls the node's op on `value` of each of its arguments, nested ones included."""
    return node.target(*fx.node.map_aggregate(node.args, value), **fx.node.map_aggregate(node.kwargs, value))


def map_arguments(node: fx.Node, change: Callable[[object], object]) -> None:
    """Replaces each argument of a node, nested ones included, by `change` of it."""
    node.args, node.kwargs = (fx.node.map_aggregate(part, change) for part in (node.args, node.kwargs))


def nodes_in(args: object) -> list[fx.Node]:
    """The nodes among arguments, nested ones included."""
    found: dict[fx.Node, None] = {}
    fx.node.map_arg(args, lambda node: found.setdefault(node))
    return list(found)


def reached(start: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> dict[fx.Node, None]:
    """The nodes of `start`, those that follow them, those that follow these, and so on; each once."""
    found: dict[fx.Node, None] = {}
    pending = list(start)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending += following(node)
    return found


def tensors_of(value: object) -> list[Tensor]:
    """The tensors in a value, nested ones included."""
    return [item for item in tree_iter(value) if isinstance(item, Tensor)]


def is_write(node: fx.Node) -> bool:
    """Whether the op writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and schema.is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """The memory that a write mutates, as the nodes that allocated it."""
    args = named_arguments(node) | node.kwargs
    names = [of.name for of in node.target._schema.arguments if of.alias_info and of.alias_info.is_write]
    return [memory_of(args[name]) for name in names if isinstance(args.get(name), fx.Node)]


def memory_of(node: fx.Node) -> fx.Node:
    """The node that allocated the memory of which `node` is a view or an in-place update."""
    while node.op == "call_function" and (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the result may share."""
    if node.target is operator.getitem:
        return node.args[0]
    schema = getattr(node.target, "_schema", None)
    is_view = schema is not None and any(result.alias_info for result in schema.returns)
    # reshape, contiguous and to() return a view or a copy; their schemas declare a view of the first argument.
    return next((arg for arg in node.args if isinstance(arg, fx.Node)), None) if is_view else None


def is_shared_with_write(node: fx.Node) -> bool:
    """Whether some op writes the memory that holds the node's value."""
    return any(is_write(user) and memory_of(node) in written(user) for user in _readers(memory_of(node)))


def _readers(memory: fx.Node) -> list[fx.Node]:
    """Nodes that read or write the memory, also through views."""
    return list(reached(memory.users, lambda user: user.users if memory_of(user) is memory else ()))


def _sharing_memory(olds: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs of a write among `olds` and another node that reads or writes the same memory."""
    return [
        (old, node)
        for old in olds
        if is_write(old)
        for memory in written(old)
        for node in _readers(memory)
        if node not in olds
    ]


def _defined_late(operands: Iterable[fx.Node], limit: fx.Node) -> list[fx.Node]:
    """The operands, and nodes they depend on, that are defined at `limit` or later; in order."""

    def late(nodes: Iterable[fx.Node]) -> list[fx.Node]:
        return [node for node in nodes if not node < limit]

    return sorted(reached(late(operands), lambda node: late(node.all_input_nodes)))


def _crosses_write(operands: Iterable[fx.Node], olds: Sequence[fx.Node], place: fx.Node) -> bool:
    """Whether an operand is written between the place and where `olds`, or nodes they depend on, read it."""
    known = set(operands)
    inner = reached(olds, lambda node: set(node.all_input_nodes) - known)
    for operand in known:
        reads = [user for user in operand.users if user in inner]
        span = [*reads, place]
        memory = memory_of(operand)
        if reads and any(node not in inner and memory in written(node) for node in _writes(min(span), max(span))):
            return True
    return False


def _can_move_up(node: fx.Node, place: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or is_write(node):
        return False
    memories = {memory_of(arg) for arg in node.all_input_nodes}
    return not any(memories.intersection(written(write)) for write in _writes(place, node))


def _writes(begin: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """Writes from `begin` to before `end`."""
    while begin is not end:
        if is_write(begin):
            yield begin
        begin = begin.next


def copy_meta(source: fx.Node, target: fx.Node, value: object) -> None:
    """Copies `source`'s trace to `target`, with its own value."""
    target.meta = {key: item for key, item in source.meta.items() if key == "nn_module_stack"}
    target.meta["val"] = value


def hoist_constants(graph: fx.Graph) -> None:
    """Moves get_attr nodes to the top, so that they never prevent moving a call."""
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "get_attr" and n is not first]:
        first.prepend(node)


def meta_int(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
