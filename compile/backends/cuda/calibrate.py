"""Calibrates the scales of fp8 caches from the keys and values of one step.

The scales are updated in place before the cache writes that use them. Captured graphs read them by address and so see
the new values. The host never waits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fuseline.compile.ops.library import Op


class Calibration(fx.Interpreter):
    """`writes`: the ops that write a cache, by the name of their node in the program."""

    def __init__(self, program: fx.GraphModule, writes: Mapping[str, Op]) -> None:
        super().__init__(program)
        self._writes = writes

    def run_node(self, n: fx.Node) -> object:
        op = self._writes.get(n.name)
        if op is not None:
            args = self.map_nodes_to_values(n.args, n)
            given = dict(zip(op.arguments, args, strict=False))
            for cache, x in zip(op.caches, op.written(*args), strict=True):
                given[cache.replace("_cache", "_scale")].copy_(scale_of(x, given[cache].dtype))
        return super().run_node(n)


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of a tensor, [1] float32; 1 if its values are all 0 or not finite.

    The largest magnitude maps to half the maximum of the cache's dtype, so later values may be twice as large.
    """
    largest = x.abs().amax().float().reshape(1)
    top = torch.finfo(dtype).max / 2
    return torch.where((largest > 0) & largest.isfinite(), largest / top, 1.0)
