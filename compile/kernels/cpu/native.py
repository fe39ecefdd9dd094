"""Our ops on a CPU: the kernel of csrc/cpu/ops.def that has the op's name takes its arguments by their names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx

from fuseline.compile.kernels.plan_call import native
from fuseline.compile.ops.codes import CACHES
from fuseline.compile.ops.library import named_arguments, op_name
from fuseline.compile.ops.registry import registry

SAME_NAME = (
    "act_mul", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope", "route_topk", "route_groups",
    "gather_rows", "embedding_panels", "embedding_codes", "linear_codes", "linear_codes_int8", "experts_codes",
    "causal_conv_slots", "gated_delta_slots", "ssd_scan_slots", "selective_scan_slots",
)  # fmt: skip
OVER_CACHES = (
    "rope_cache", "write_cache", "paged_attention", "rope_latent", "write_latent", "paged_latent_attention",
)  # fmt: skip
RELATIVE = "paged_relative_attention"


def over_cache(op: str, is_coded: bool) -> Callable[..., bool]:
    """Takes calls of the op whose caches hold codes, or those whose caches hold floats."""
    declared = registry()[op]
    at = declared.arguments.index(declared.caches[0])
    return lambda *args: (dtype_name(args[at]) in CACHES) == is_coded


def cache_code(node: fx.Node) -> int:
    cache = named_arguments(node)[registry()[op_name(node.target)].caches[0]]
    return CACHES[dtype_name(cache.meta["val"])]


def no_chunk(node: fx.Node) -> int:
    return 0


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


IMPLEMENTATIONS = (
    *(native(op) for op in SAME_NAME),
    *(native(op, supports=over_cache(op, False)) for op in OVER_CACHES),
    *(native(op, f"{op}_codes", over_cache(op, True), code=cache_code) for op in OVER_CACHES),
    native(RELATIVE, "paged_attention", over_cache(RELATIVE, False), chunk=no_chunk),
    native(RELATIVE, "paged_attention_codes", over_cache(RELATIVE, True), code=cache_code, chunk=no_chunk),
    native("experts_panels", "experts"),
    native("head_linear_panels", "head_linear"),
    native("expert_linear_panels", "expert_linear"),
    native("linear_panels", "linear", choices=lambda node: node.meta.get("choices", 0)),
    native("aten.embedding", "embedding", ids=lambda node: node.args[1]),
)
