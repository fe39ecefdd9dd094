"""One run of a card's graph that finds the scales of its fp8 caches in the keys and values it is about to write.

The scales are written in place, before what they scale: captured graphs, which know them by address, have them from
then on. Nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from fuseline.compile import ops  # noqa: F401  registers those of WRITES

OPS = torch.ops.fuseline
WRITES = (OPS.write_cache.default, OPS.rope_cache.default)


class Calibration(fx.Interpreter):
    """`writes`: by the name of each node of the program that writes a cache, the op that it is."""

    def __init__(self, program: fx.GraphModule, writes: Mapping[str, Callable]) -> None:
        super().__init__(program)
        self._writes = writes

    def run_node(self, n: fx.Node) -> object:
        op = self._writes.get(n.name)
        if op is not None:
            _set_scales(op, *self.map_nodes_to_values(n.args, n))
        return super().run_node(n)


def _set_scales(op: Callable, *args: object) -> None:
    if op is OPS.write_cache.default:
        k_cache, v_cache, k, v, _, k_scale, v_scale = args
    else:
        from fuseline.compile.kernels.triton.table import KERNELS

        k_cache, v_cache, _, k, v, cos, sin, rows, _, rotary_dim, layout, k_scale, v_scale = args
        k = KERNELS[OPS.rope.default].run(k, cos, sin, rows, rotary_dim, layout)
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        scale.copy_(scale_of(x, cache.dtype))


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[1] float32; 1 of numbers that are all 0, or not finite.

    The largest comes to lie at half of what the cache's dtype holds, so that later ones may be twice as large.
    """
    largest = x.abs().amax().float().reshape(1)
    top = torch.finfo(dtype).max / 2
    return torch.where((largest > 0) & largest.isfinite(), largest / top, 1.0)
