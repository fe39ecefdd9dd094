"""One run of a card's graph that finds the scales of its fp8 caches in the keys and values it is about to write.

The scales are written in place, before what they scale: captured graphs, which know them by address, have them from
then on. Nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fuseline.compile.ops.library import Op


class Calibration(fx.Interpreter):
    """`writes`: by the name of each node of the program that writes a cache, the op that it is."""

    def __init__(self, program: fx.GraphModule, writes: Mapping[str, Op]) -> None:
        super().__init__(program)
        self._writes = writes

    def run_node(self, n: fx.Node) -> object:
        op = self._writes.get(n.name)
        if op is not None:
            _set_scales(op, *self.map_nodes_to_values(n.args, n))
        return super().run_node(n)


def _set_scales(op: Op, *args: object) -> None:
    given = dict(zip(op.arguments, args, strict=False))
    for kind, x in zip("kv", op.written(*args), strict=True):
        given[f"{kind}_scale"].copy_(scale_of(x, given[f"{kind}_cache"].dtype))


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[1] float32; 1 of numbers that are all 0, or not finite.

    The largest comes to lie at half of what the cache's dtype holds, so that later ones may be twice as large.
    """
    largest = x.abs().amax().float().reshape(1)
    top = torch.finfo(dtype).max / 2
    return torch.where((largest > 0) & largest.isfinite(), largest / top, 1.0)
