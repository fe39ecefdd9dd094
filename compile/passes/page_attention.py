"""Converts attention to attention over the paged KV cache.

    out = attention(q, k, v, sinks, layer, ...)
->
    write_cache(k_cache_L, v_cache_L, k, v, slots_G)
    out = paged_attention(q, k_cache_L, v_cache_L, block_table_G, seq_lens, query_start, sinks, ...)

    k, v = one head of keys, the first E numbers of them   # of latents (absorb_latent)
->
    write_latent(k_cache_L, k, slots_G)
    out = paged_latent_attention(q, k_cache_L, block_table_G, seq_lens, query_start, sinks, E, ...)

A layer that attends to the keys and values of an earlier one reads that layer's cache. Layers with the same window
share one group G of block tables; a chunk needs no more keys than a window of its size. Caches and batch metadata are
graph inputs. fp8 caches have scales, constants k_scale_L and v_scale_L [1] read by both ops; their values are set when
weights are loaded. int8 caches have a scale behind each token's numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fuseline.compile.graph.edit import constant, insert_call, meta_int, placeholder, take_over
from fuseline.compile.graph.graph_pass import PassContext, PassResult
from fuseline.compile.graph.spec import cache_owners
from fuseline.compile.graph_inputs import cache_name, group_placeholder
from fuseline.compile.ops.library import named_arguments
from fuseline.compile.specs import FP8_DTYPES, CacheGroup, CacheSpec, is_coded, scale_names

OPS = torch.ops.fuseline
WORD = 4
"""Numbers that the CPU's kernels store together (csrc/cpu/kernels/cache_codes.h)."""


def page_attention(graph: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Returns a CacheSpec for each layer, and the CacheGroups."""
    owners = cache_owners(graph)
    spec_of = {node: _cache_spec(node, ctx) for node in dict.fromkeys(owners.values())}
    specs = [*spec_of.values()]
    windows = sorted({spec.window for spec in specs})
    groups = [CacheGroup(w, tuple(s.layer for s in specs if s.window == w)) for w in windows]
    constants: dict[str, Tensor] = {}
    scales_of = {node: _scales(graph, spec) for node, spec in spec_of.items()}
    for scales in scales_of.values():
        constants |= {str(scale.meta["fqn"]): torch.ones(1) for scale in scales}
    for node, owner in owners.items():
        spec, scales = spec_of[owner], scales_of[owner]
        _rewrite(graph.graph, node, spec, windows.index(spec.window), ctx.config.block_size, scales)
    return PassResult(len(owners), (*specs, *groups), constants)


def _cache_spec(node: fx.Node, ctx: PassContext) -> CacheSpec:
    given = named_arguments(node)
    k, v, layer, window = given["k"], given["v"], given["layer"], given["window"] or given["chunk"]
    if given["relative"] and (given["slopes"] or given["chunk"]):
        raise ValueError(f"layer {layer}: biases by distance beside slopes or chunks have no kernel")
    if not given["causal"]:
        raise ValueError(f"layer {layer}: attention that is not causal cannot be paged")
    key, value = k.meta["val"], v.meta["val"]
    value_dim = 0 if _is_latent(k, v) else value.shape[3]
    spec = CacheSpec(layer, key.shape[1], key.shape[3], value_dim, _dtype(key.dtype, ctx), window)
    if ctx.target.kind == "cpu" and is_coded(spec.dtype) and (spec.key_dim % WORD or spec.value_dim % WORD):
        raise ValueError(f"layer {layer}: a cache of {ctx.config.kv_cache_dtype} needs heads of a multiple of {WORD} "
                         f"numbers, but they have {spec.key_dim} and {spec.value_dim}")  # fmt: skip
    return spec


def _is_latent(k: fx.Node, v: fx.Node) -> bool:
    """Whether a value is the beginning of its key, so that the cache keeps keys alone."""
    return v.target is torch.ops.aten.slice.Tensor and v.args[:3] == (k, 3, 0) and k.meta["val"].shape[1] == 1


def _dtype(of_model: torch.dtype, ctx: PassContext) -> str:
    asked = ctx.config.kv_cache_dtype
    if asked == "int8" and ctx.target.kind != "cpu":
        raise ValueError("a cache of int8 needs a CPU; take fp8")
    if asked in FP8_DTYPES:
        return FP8_DTYPES[asked]
    return str(of_model).removeprefix("torch.") if asked == "auto" else asked


def _scales(graph: fx.GraphModule, spec: CacheSpec) -> list[fx.Node]:
    names = scale_names(spec.layer)[: len(spec.dims)] if spec.has_scales else ()
    return [constant(graph, name, torch.ones(1), fqn=name) for name in names]


def _rewrite(
    graph: fx.Graph, node: fx.Node, spec: CacheSpec, group: int, block_size: int, scales: list[fx.Node]
) -> None:
    given = named_arguments(node)
    caches = [
        placeholder(graph, cache_name(kind, spec.layer), _cache(spec, block_size, dim))
        for kind, dim in spec.dims.items()
    ]
    slots = placeholder(graph, group_placeholder("slot_mapping", group), meta_int(2))
    table = placeholder(graph, group_placeholder("block_tables", group), meta_int(2, 2, dtype=torch.int32))
    seq_lens = placeholder(graph, "seq_lens", meta_int(2, dtype=torch.int32))
    query_start = placeholder(graph, "query_start", meta_int(3, dtype=torch.int32))
    batch, numbers = (table, seq_lens, query_start, given["sinks"]), (given["window"], given["scale"], given["softcap"])
    is_owner, q, k, v = spec.layer == given["layer"], given["q"], given["k"], given["v"]
    if not spec.value_dim:
        written, target = (OPS.write_latent.default, (*caches, k)), OPS.paged_latent_attention.default
        args = (q, *caches, *batch, v.meta["val"].shape[3], *numbers, *scales)
    elif given["relative"]:
        written, target = (OPS.write_cache.default, (*caches, k, v)), OPS.paged_relative_attention.default
        args = (q, *caches, *batch, *numbers, given["relative"], *scales)
    else:
        written, target = (OPS.write_cache.default, (*caches, k, v)), OPS.paged_attention.default
        bias = given["slopes"], given["chunk"]
        behind = (*(scales or (None, None)), *bias) if any(bias) else scales
        args = (q, *caches, *batch, *numbers, *behind)
    if is_owner:
        insert_call(node, written[0], (*written[1], slots, *scales), node, None)
    paged = insert_call(node, target, args, node, node.meta["val"])
    take_over([node], [paged])


def _cache(spec: CacheSpec, block_size: int, dim: int) -> Tensor:
    shape = 2, spec.num_kv_heads, block_size, spec.columns(dim)
    return torch.empty(shape, dtype=getattr(torch, spec.dtype), device="meta")
