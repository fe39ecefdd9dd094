"""The order of all passes, and the settings of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fuseline.compile.config import CompileConfig
from fuseline.compile.graph.graph_pass import GraphPass
from fuseline.compile.graph.runner import Stages
from fuseline.compile.passes.absorb_latent import absorb_latent
from fuseline.compile.passes.bind_kernels import bind_kernels
from fuseline.compile.passes.clean import canonicalize, merge_equal, remove_noops
from fuseline.compile.passes.cut_regions import cut_regions
from fuseline.compile.passes.feed_embeds import feed_embeds
from fuseline.compile.passes.find_cat import find_cat
from fuseline.compile.passes.find_linear import find_linear
from fuseline.compile.passes.find_moe import find_moe
from fuseline.compile.passes.find_norm import find_norm
from fuseline.compile.passes.find_rope import find_rope
from fuseline.compile.passes.fuse_act_mul import fuse_act_mul
from fuseline.compile.passes.fuse_add_norm import fuse_add_norm
from fuseline.compile.passes.fuse_linear_act import fuse_linear_act
from fuseline.compile.passes.fuse_norm_quant import fuse_norm_quant
from fuseline.compile.passes.fuse_persistent import Run, fuse_persistent
from fuseline.compile.passes.fuse_rope_cache import fuse_rope_cache
from fuseline.compile.passes.join_linears import join_linears
from fuseline.compile.passes.keep_last_logits import keep_last_logits
from fuseline.compile.passes.make_batch_invariant import make_batch_invariant
from fuseline.compile.passes.pack_weights import pack_weights
from fuseline.compile.passes.page_attention import page_attention
from fuseline.compile.passes.page_state import page_state
from fuseline.compile.passes.plan_decode import plan_decode
from fuseline.compile.passes.quantize_inputs import quantize_inputs
from fuseline.compile.passes.real_pairs import real_pairs
from fuseline.compile.passes.stream_weights import stream_weights
from fuseline.compile.passes.tap_hidden import tap_hidden
from fuseline.compile.passes.widen_logits import widen_logits

SERVE = (page_attention, page_state, keep_last_logits)

REFERENCE: Stages = (("serve", (real_pairs, *SERVE)),)
"""Level 0: the passes that serving requires, on reference ops."""

SHARED: Stages = (
    # One spelling per op, so that patterns need no variants.
    ("clean", (remove_noops, real_pairs, find_cat, canonicalize, merge_equal)),
    # Raises Transformers' spellings to ops; all later passes match ops.
    ("recognize", (find_linear, find_norm, find_rope, find_moe, fuse_act_mul)),
    # join_linears needs attention and act_mul, the consumers that tell which linears to join.
    ("fuse", (absorb_latent, join_linears, fuse_add_norm)),
    ("serve", SERVE),
)

# Needs the cache write.
COMPILED: Stages = (*SHARED, ("lower", (fuse_rope_cache, pack_weights, widen_logits)))
"""Level 1 and up."""

FP8_INPUTS = (quantize_inputs, fuse_norm_quant)
"""Behind pack_weights, for a GPU."""

COMPILED_CUDA: Stages = (*SHARED, ("lower", (fuse_rope_cache, pack_weights, *FP8_INPUTS, fuse_linear_act)))
"""The same for a GPU: its kernels read plain rows, so that nothing is packed unless another format is configured, and
its sampling reads logits of any dtype."""

INVARIANT_CUDA: Stages = (*SHARED, ("lower", (fuse_rope_cache, pack_weights, *FP8_INPUTS, make_batch_invariant)))
"""Linears with one order of summation instead of the fastest ones."""

REFERENCE_CUDA: Stages = (*REFERENCE, ("lower", (find_linear,)))
"""Level 0 for a GPU: products are computed by our kernels, and their weights may stay on the host."""

REGIONS = (cut_regions,)
"""Run on the compiled graph, for a CPU from level 2 on, while the server already answers."""

DECODE = (plan_decode,)
"""Run on a copy of the compiled graph, for a CPU from level 3 on."""


def program_passes(
    runs: Mapping[str, Callable], device: torch.device, streamed: Sequence[Sequence[str]]
) -> Sequence[GraphPass]:  # fmt: skip
    """Passes over the compiled graph of a GPU. No dead code is removed after them: a release has no users."""
    bound = bind_kernels(runs, device)
    return (bound, stream_weights(streamed)) if streamed else (bound,)


def few_rows_passes(calls: Sequence[tuple[Run, Callable]]) -> Sequence[GraphPass]:
    """Passes over a copy of that graph, for steps of few rows; `calls`: what is called in the place of each run."""
    return (fuse_persistent(calls),)


def stages(config: CompileConfig, kind: str = "cpu") -> Stages:
    """Stages of a level on a kind of target, with the passes that the configuration asks for."""
    found = _of_level(config, kind)
    if config.gives_hidden:
        found = [(stage, (*passes, tap_hidden) if stage == "serve" else passes) for stage, passes in found]
    if config.takes_embeds:
        found = [("feed", (feed_embeds,)), *found]
    return found


def _of_level(config: CompileConfig, kind: str) -> Stages:
    """`batch_invariant` matters only on a GPU, from level 1 on."""
    if kind == "cuda" and config.level > 0:
        return INVARIANT_CUDA if config.batch_invariant else COMPILED_CUDA
    if kind == "cuda":
        return REFERENCE_CUDA
    return COMPILED if config.level > 0 else REFERENCE
