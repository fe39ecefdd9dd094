"""Attention of installed libraries on a GPU: FlashAttention 3 and 2, torch's own, FlashInfer.

Each says exactly which layers it computes; all others, and all of a library that fails its trial, are left to our own
kernel. Libraries come first for prompts, ours for steps of one token a sequence: there a row's bits depend on no other.

Our caches are [N, K, B, D]. FlashInfer reads them so; the others want [N, B, K, D] with any strides, which a view is.
All align a causal mask with the end of the keys, and count a window's keys without the query's own: ours less one.

Legend: H query heads, K kv heads, T tokens, S sequences, M columns of the block table, N blocks of B keys.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fuseline.compile.kernels.external.flashinfer import PlannedPrefill
from fuseline.compile.kernels.registry import FIRST, LAST, Implementation, OpCall
from fuseline.compile.ops.attention_batch import AttentionLayer, make_batch
from fuseline.compile.ops.library import DECODE, PREFILL
from fuseline.compile.target import Target

logger = logging.getLogger(__name__)
HALVES = (torch.float16, torch.bfloat16)
PAGE = 256
"""Blocks of FlashAttention 2 and of torch's are of a multiple of so many keys."""


def _finder(module: str, name: str, arguments: str) -> Callable[[Target], Callable | None]:
    """Finds a library's function on a GPU; one that cannot be imported, or takes other arguments, is none."""
    return lambda target: _function(module, name, arguments) if target.device == "cuda" else None


def _function(module: str, name: str, arguments: str) -> Callable | None:
    try:
        found = getattr(importlib.import_module(module), name)
        missing = set(arguments.split()) - set(inspect.signature(found).parameters)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # built for another torch, another CUDA
        logger.warning("%s is installed and not used: %s: %s", module, type(error).__name__, error)
        return None
    if missing:
        logger.warning("%s.%s is not used: it does not take %s", module, name, ", ".join(sorted(missing)))
    return None if missing else found


def supports_flash_3(layer: AttentionLayer) -> bool:
    """Any block size. Of unequal sizes those of DeepSeek's prompts, and values wider than small keys."""
    sizes = layer.key_dim, layer.value_dim
    is_same = sizes[0] == sizes[1] <= 256
    is_wider = 128 < sizes[0] <= 192 and 96 < sizes[1] <= 128 or sizes[0] <= 64 and sizes[1] <= 512
    return _is_plain(layer) and (is_same or is_wider) and all(size % 8 == 0 for size in sizes)


def supports_flash_2(layer: AttentionLayer) -> bool:
    is_sized = layer.key_dim == layer.value_dim <= 256 and layer.key_dim % 8 == 0
    return _is_plain(layer) and is_sized and layer.block_size % PAGE == 0


def supports_varlen(layer: AttentionLayer) -> bool:
    """torch's build of FlashAttention 2, which has no soft-cap."""
    return supports_flash_2(layer) and layer.softcap == 0


def supports_flashinfer(layer: AttentionLayer) -> bool:
    return _is_plain(layer) and layer.key_dim == layer.value_dim and layer.key_dim in (64, 128, 256)


def _is_plain(layer: AttentionLayer) -> bool:
    """A cache of the queries' own half precision, no sinks, no scales, no slopes, no chunks."""
    has_more = layer.has_sinks or layer.has_scales or layer.has_slopes or layer.chunk > 0
    return layer.dtype in HALVES and layer.cache_dtype == layer.dtype and not has_more


def flash_3(attend, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, *_):
    """One split of the keys for prompts, so that a row's bits depend on no other; as many as it likes for steps of one
    token a sequence."""
    is_decode = q.shape[2] <= block_table.shape[0]
    return attend(
        q[0].transpose(0, 1), k_cache.transpose(1, 2), v_cache.transpose(1, 2), cache_seqlens=seq_lens,
        page_table=block_table, cu_seqlens_q=query_start, max_seqlen_q=1 if is_decode else q.shape[2],
        softmax_scale=scale, causal=True, window_size=_window(window, -1), softcap=softcap,
        num_splits=0 if is_decode else 1,
    )[None]  # fmt: skip


def flash_2(attend, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, *_):
    return attend(
        q[0].transpose(0, 1), k_cache.transpose(1, 2), v_cache.transpose(1, 2), query_start, _starts(seq_lens),
        q.shape[2], block_table.shape[1] * k_cache.shape[2], softmax_scale=scale, causal=True,
        window_size=_window(window, -1), softcap=softcap, block_table=block_table,
    )[None]  # fmt: skip


def varlen(attend, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, *_):
    """Causal is said by a window that ends at the query; one split, so that a row's bits depend on no other."""
    return attend(
        q[0].transpose(0, 1), k_cache.transpose(1, 2), v_cache.transpose(1, 2), query_start, _starts(seq_lens),
        q.shape[2], block_table.shape[1] * k_cache.shape[2], scale=scale, window_size=_window(window, 0),
        enable_gqa=q.shape[1] != k_cache.shape[1], seqused_k=seq_lens, block_table=block_table, num_splits=1,
    )[None]  # fmt: skip


def plan_prefill(implementation: Implementation, wrapper: Callable, call: OpCall, ours: Callable) -> Implementation:
    """FlashInfer is prepared on the host once a step and kind of layer; ours computes steps that were not prepared."""
    layer = AttentionLayer.of(*call.args)
    planned = PlannedPrefill(wrapper, layer, call.inputs["block_table"], call.target.device, ours)
    return replace(implementation, run=planned.run, prepare=planned.plan)


def small_batch(call: OpCall, phases: tuple[str, ...]) -> tuple[tuple, Mapping[str, Tensor]]:
    """A prompt, a prompt with a prefix and a step of one token, or only such steps."""
    layer = AttentionLayer.of(*call.args)
    size, is_decode = layer.block_size, phases == (DECODE,)
    lengths = (size + 3, 5 * size - 1, 2 * size)
    counts = (1, 1, 1) if is_decode else (size + 3, 2 * size, 1)
    batch = make_batch(layer, lengths, counts, call.target.device, call.inputs["block_table"])
    return batch.args, batch.host


def _window(window: int, right_of_all: int) -> tuple[int, int]:
    """(keys before the query's own, behind it) that are seen; -1 for all."""
    return (window - 1, 0) if window > 0 else (-1, right_of_all)


def _starts(lengths: Tensor) -> Tensor:
    """[0, l0, l0 + l1, ...] int32 of lengths[S]."""
    starts = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=starts[1:])
    return starts


def _attention(
    label: str, run: Callable | None, supports: Callable[[AttentionLayer], bool], library: Callable, order: int = FIRST,
    phase: str = PREFILL, **more: object,
) -> Implementation:  # fmt: skip
    return Implementation(
        "paged_attention", label, "cuda", run, supports=lambda *args: supports(AttentionLayer.of(*args)), order=order,
        phases=(phase,), library=library, trial=small_batch, **more,
    )  # fmt: skip


FLASH_3 = _finder(
    "flash_attn_interface", "flash_attn_with_kvcache", "page_table cu_seqlens_q cache_seqlens softcap"
)  # fmt: skip
IMPLEMENTATIONS = (
    _attention("flash_attn_3", flash_3, supports_flash_3, FLASH_3, isas=("sm_90",)),
    _attention("flash_attn_3", flash_3, supports_flash_3, FLASH_3, LAST, DECODE, isas=("sm_90",)),
    _attention(
        "flashinfer", None, supports_flashinfer,
        _finder("flashinfer", "BatchPrefillWithPagedKVCacheWrapper", "float_workspace_buffer kv_layout"),
        bind=plan_prefill,
    ),
    _attention(
        "flash_attn_2", flash_2, supports_flash_2,
        _finder("flash_attn", "flash_attn_varlen_func", "block_table softcap window_size"),
    ),
    _attention(
        "torch.varlen_attn", varlen, supports_varlen,
        _finder("torch.nn.attention.varlen", "varlen_attn", "block_table seqused_k enable_gqa num_splits scale"),
    ),
)  # fmt: skip
"""The fastest as far as is known first."""
