"""Our ops on a CPU: the kernel of csrc/cpu/ops.def that has the op's name takes its arguments by their names."""

from __future__ import annotations

from collections.abc import Callable

from fuseline.compile.kernels.plan_call import native
from fuseline.compile.ops.registry import registry

SAME_NAME = (
    "act_mul", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope", "route_topk", "gather_rows",
    "embedding_panels", "embedding_codes", "linear_codes",
)  # fmt: skip
OVER_CACHES = ("rope_cache", "write_cache", "paged_attention")


def without_scales(op: str) -> Callable[..., bool]:
    """Takes calls of the op that scale no cache: fp8 is for GPUs."""
    first = registry()[op].arguments.index("k_scale")
    return lambda *args: all(arg is None for arg in args[first:])


IMPLEMENTATIONS = (
    *(native(op) for op in SAME_NAME),
    *(native(op, supports=without_scales(op)) for op in OVER_CACHES),
    native("experts_panels", "experts"),
    native("linear_panels", "linear", choices=lambda node: node.meta.get("choices", 0)),
    native("aten.embedding", "embedding", ids=lambda node: node.args[1]),
)
