"""Attention of installed libraries on a card: FlashAttention 3 and 2, torch's own, FlashInfer.

Each says exactly which layers it computes; all others, and all of a library that fails its trial, are left to our own
kernel. A trial comes before the first use: a small batch of the layer's shape, whose results must be those of ours.

Our caches are [N, K, B, D]. FlashInfer reads them so; the others want [N, B, K, D] with any strides, which a view is.
All align a causal mask with the end of the keys, and count a window's keys without the query's own: ours less one.

Legend: H query heads, K kv heads, T tokens, S sequences, M columns of the block table, N blocks of B keys.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fuseline.compile.kernels.attention_batch import AttentionLayer, make_batch
from fuseline.compile.kernels.choice import DECODE, PREFILL, Candidate
from fuseline.compile.kernels.flashinfer import PlannedPrefill
from fuseline.compile.target import Target

logger = logging.getLogger(__name__)
HALVES = (torch.float16, torch.bfloat16)
PAGE = 256
"""Blocks of FlashAttention 2 and of torch's are of a multiple of so many keys."""
TOLERANCE = 2.0**-7
"""How far a trial's results may be from ours, relative and absolute: some roundings of bf16."""


@dataclass(frozen=True)
class Libraries:
    """What is installed, None for what is not."""

    flash_attn_3: Callable | None = None
    """flash_attn_interface.flash_attn_with_kvcache"""
    flash_attn_2: Callable | None = None
    """flash_attn.flash_attn_varlen_func"""
    torch_varlen: Callable | None = None
    """torch.nn.attention.varlen.varlen_attn, from the version on that reads paged caches"""
    flashinfer: Callable | None = None
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper"""


def installed(target: Target) -> Libraries:
    """On a card; a library that cannot be imported, or whose functions take other arguments, is none."""
    if target.device != "cuda":
        return Libraries()
    return Libraries(
        _function("flash_attn_interface", "flash_attn_with_kvcache", "page_table cu_seqlens_q cache_seqlens softcap"),
        _function("flash_attn", "flash_attn_varlen_func", "block_table softcap window_size"),
        _function("torch.nn.attention.varlen", "varlen_attn", "block_table seqused_k enable_gqa num_splits scale"),
        _function("flashinfer", "BatchPrefillWithPagedKVCacheWrapper", "float_workspace_buffer kv_layout"),
    )


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


class ExternalAttention:
    """What libraries offer to the layers of one executable; layers that are alike share plans and trials."""

    def __init__(self, target: Target, libraries: Libraries | None = None) -> None:
        self._target = target
        self._libraries = installed(target) if libraries is None else libraries
        self._offers: dict[tuple[AttentionLayer, str], list[Candidate]] = {}
        self._plans: list[Callable[[Mapping[str, Tensor]], None]] = []

    def candidates(self, args: tuple, table: str, ours: Callable) -> list[Candidate]:
        """For a paged_attention of `args`; `table` is the name of its block table among the graph's inputs."""
        layer = AttentionLayer.of(*args)
        if (layer, table) not in self._offers:
            self._offers[layer, table] = self._offered(layer, table, ours)
        return self._offers[layer, table]

    @property
    def has_plans(self) -> bool:
        return bool(self._plans)

    def plan(self, host: Mapping[str, Tensor]) -> None:
        """Once a step, before its ops: `host` holds the step's inputs by placeholder name, on the host."""
        for plan in self._plans:
            plan(host)

    def _offered(self, layer: AttentionLayer, table: str, ours: Callable) -> list[Candidate]:
        """The fastest as far as is known first."""
        found, libraries, isa = [], self._libraries, self._target.isa
        if libraries.flash_attn_3 and supports_flash_3(layer, isa):
            run = flash_3(libraries.flash_attn_3)
            found += [Candidate("flash_attn_3", run, phases=(phase,)) for phase in (PREFILL, DECODE)]
        if libraries.flashinfer and supports_flashinfer(layer):
            planned = PlannedPrefill(libraries.flashinfer, layer, table, self._target.device, ours)
            found.append(Candidate("flashinfer", planned.run, phases=(PREFILL,), plan=planned.plan))
        if libraries.flash_attn_2 and supports_flash_2(layer):
            found.append(Candidate("flash_attn_2", flash_2(libraries.flash_attn_2), phases=(PREFILL,)))
        if libraries.torch_varlen and supports_varlen(layer):
            found.append(Candidate("torch.varlen_attn", varlen(libraries.torch_varlen), phases=(PREFILL,)))
        trusted = [candidate for candidate in found if self._passes(candidate, layer, table, ours)]
        self._plans += [candidate.plan for candidate in trusted if candidate.plan]
        return trusted

    def _passes(self, candidate: Candidate, layer: AttentionLayer, table: str, ours: Callable) -> bool:
        """A prompt, a prompt with a prefix and a step of one token, or only such steps, as ours computes them."""
        size, is_decode = layer.block_size, candidate.phases == (DECODE,)
        lengths = (size + 3, 5 * size - 1, 2 * size)
        counts = (1, 1, 1) if is_decode else (size + 3, 2 * size, 1)
        batch = make_batch(layer, lengths, counts, self._target.device, table)
        try:
            if candidate.plan:
                candidate.plan(batch.host)
            torch.testing.assert_close(candidate.run(*batch.args), ours(*batch.args), rtol=TOLERANCE, atol=TOLERANCE)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            logger.warning("%s is not used for %s: %s: %s", candidate.label, layer, type(error).__name__, first)
            return False
        return True


def supports_flash_3(layer: AttentionLayer, isa: str) -> bool:
    """Hopper; any block size. Of unequal sizes those of DeepSeek's prompts, and values wider than small keys."""
    sizes = layer.key_dim, layer.value_dim
    is_same = sizes[0] == sizes[1] <= 256
    is_wider = 128 < sizes[0] <= 192 and 96 < sizes[1] <= 128 or sizes[0] <= 64 and sizes[1] <= 512
    return isa == "sm_90" and _is_plain(layer) and (is_same or is_wider) and all(size % 8 == 0 for size in sizes)


def supports_flash_2(layer: AttentionLayer) -> bool:
    is_sized = layer.key_dim == layer.value_dim <= 256 and layer.key_dim % 8 == 0
    return _is_plain(layer) and is_sized and layer.block_size % PAGE == 0


def supports_varlen(layer: AttentionLayer) -> bool:
    """torch's build of FlashAttention 2, which has no soft-cap."""
    return supports_flash_2(layer) and layer.softcap == 0


def supports_flashinfer(layer: AttentionLayer) -> bool:
    return _is_plain(layer) and layer.key_dim == layer.value_dim and layer.key_dim in (64, 128, 256)


def _is_plain(layer: AttentionLayer) -> bool:
    """A cache of the queries' own half precision, no sinks, no scales."""
    return layer.dtype in HALVES and layer.cache_dtype == layer.dtype and not (layer.has_sinks or layer.has_scales)


def flash_3(attend: Callable) -> Callable:
    """One split of the keys for prompts, so that a row's bits depend on no other; as many as it likes for steps of one
    token a sequence."""

    def run(q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, *_):
        is_decode = q.shape[2] <= block_table.shape[0]
        return attend(
            q[0].transpose(0, 1), k_cache.transpose(1, 2), v_cache.transpose(1, 2), cache_seqlens=seq_lens,
            page_table=block_table, cu_seqlens_q=query_start, max_seqlen_q=1 if is_decode else q.shape[2],
            softmax_scale=scale, causal=True, window_size=_window(window, -1), softcap=softcap,
            num_splits=0 if is_decode else 1,
        )[None]  # fmt: skip

    return run


def flash_2(attend: Callable) -> Callable:
    def run(q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, *_):
        return attend(
            q[0].transpose(0, 1), k_cache.transpose(1, 2), v_cache.transpose(1, 2), query_start, _starts(seq_lens),
            q.shape[2], block_table.shape[1] * k_cache.shape[2], softmax_scale=scale, causal=True,
            window_size=_window(window, -1), softcap=softcap, block_table=block_table,
        )[None]  # fmt: skip

    return run


def varlen(attend: Callable) -> Callable:
    """Causal is said by a window that ends at the query; one split, so that a row's bits depend on no other."""

    def run(q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, window, scale, softcap, *_):
        return attend(
            q[0].transpose(0, 1), k_cache.transpose(1, 2), v_cache.transpose(1, 2), query_start, _starts(seq_lens),
            q.shape[2], block_table.shape[1] * k_cache.shape[2], scale=scale, window_size=_window(window, 0),
            enable_gqa=q.shape[1] != k_cache.shape[1], seqused_k=seq_lens, block_table=block_table, num_splits=1,
        )[None]  # fmt: skip

    return run


def _window(window: int, right_of_all: int) -> tuple[int, int]:
    """(keys before the query's own, behind it) that are seen; -1 for all."""
    return (window - 1, 0) if window > 0 else (-1, right_of_all)


def _starts(lengths: Tensor) -> Tensor:
    """[0, l0, l0 + l1, ...] int32 of lengths[S]."""
    starts = lengths.new_zeros(lengths.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=starts[1:])
    return starts
