"""Raises a new tensor that copies fill to a concatenation.

    k = new_empty(...); k[..., :n].copy_(x); k[..., n:].copy_(y)   ->   k = cat([x, y], -1)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from fuseline.compile.graph.edit import insert_call, is_shared_with_write
from fuseline.compile.graph.graph_pass import each_call
from fuseline.compile.graph.match import is_alike

aten = torch.ops.aten


class Filled(NamedTuple):
    """Features [begin, end) of the tensor, filled by `copy` of `source`."""

    begin: int
    end: int
    copy: fx.Node
    source: fx.Node


@each_call
def find_cat(node: fx.Node) -> bool:
    parts = _parts(node) if node.target is aten.new_empty.default else None
    if not parts:
        return False
    last = max(part.copy for part in parts)
    readers = [user for user in node.users if all(user is not part.copy.args[0] for part in parts)]
    if any(reader < last for reader in readers) or any(is_shared_with_write(part.source) for part in parts):
        return False
    whole = insert_call(last.next, aten.cat.default, ([part.source for part in parts], -1), node, node.meta["val"])
    for reader in readers:
        reader.replace_input_with(node, whole)
    for part in parts:
        view = part.copy.args[0]
        node.graph.erase_node(part.copy)
        node.graph.erase_node(view)
    node.graph.erase_node(node)
    return True


def _parts(node: fx.Node) -> list[Filled] | None:
    """The copies that fill the tensor, in the order of their features; None if they leave some, or fill others."""
    slices = [user for user in node.users if user.target is aten.slice.Tensor and _is_filled(user)]
    found = sorted(part for part in map(_filled, slices) if part)
    ends = [0, *(part.end for part in found)]
    is_whole = [part.begin for part in found] == ends[:-1] and ends[-1] == node.meta["val"].shape[-1]
    return found if is_whole and len(found) == len(slices) else None


def _is_filled(view: fx.Node) -> bool:
    return any(user.target is aten.copy_.default and user.args[0] is view for user in view.users)


def _filled(view: fx.Node) -> Filled | None:
    """The copy that is the only use of a slice of the last dim."""
    whole, copy = view.args[0].meta["val"], next(iter(view.users))
    _, dim, begin, end, step = (*view.args, *(None, 0, None, None, 1)[len(view.args) :])
    if len(view.users) != 1 or copy.target is not aten.copy_.default or copy.args[0] is not view or copy.users:
        return None
    if dim not in (-1, whole.ndim - 1) or step != 1 or not is_alike(view, copy.args[1]):
        return None
    return Filled(begin or 0, min(end or whole.shape[-1], whole.shape[-1]), copy, copy.args[1])
