"""Sampling on CUDA: from logits to tokens and log-probabilities without a word from the host.

The same arguments, results and random stream as csrc/cpu/kernels/sampling.cpp. Up to four launches: rows with masks,
bias or penalties are edited into a copy; all rows are summed up in blocks; then one program a row truncates, draws and
reports. Which launches are needed follows from the arguments' shapes alone, so nothing waits for the device. A row's
bits follow from the row: sums have one order however a launch lays the entries out, and no product is fused with a sum
in one launch and not in another.

Legend: R rows, V vocabulary, L most log-probabilities of a row, NB blocks of a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fuseline.compile.kernels.triton.sampling_kernels import (
    SCAN_BLOCKS,
    edit_kernel,
    sample_kernel,
    scan_kernel,
    score_kernel,
)  # fmt: skip
from fuseline.compile.kernels.triton.sampling_rows import SUB


def sample(
    tokens: Tensor, logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor, ok: Tensor, logits: Tensor,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, repetition: Tensor, frequency: Tensor,
    presence: Tensor, seed: Tensor, counter: Tensor, num_logprobs: Tensor, history_start: Tensor, history: Tensor,
    prompt_len: Tensor, bias_start: Tensor, bias_ids: Tensor, bias_values: Tensor, banned_start: Tensor,
    banned_ids: Tensor, allowed_start: Tensor, allowed_ids: Tensor, bitmask: Tensor | None, logprobs_mode: int,
) -> None:  # fmt: skip
    """Arguments as in csrc/cpu/ops.def, all on one device; outputs are written in place.

    Logits are float32, or half precision, widened as they are read: float32 holds their numbers, so that a row's bits
    are those of the same numbers in float32. Where rows are edited, all are widened in a copy first.
    history_start may also be [2, R], where each row's part of the history begins and ends: it may lie anywhere, and the
    history be int32. An empty history is nobody's.
    num_logprobs[r]: -1 wants none, else at most L and V. An empty allowed list allows all; top_k 0, top_p 1, min_p 0
    are off. ok[r] is 1 for a row with a token, 0 for one whose logits are NaN, +inf or all -inf, 2 for one of finite
    logits whose bias, masks, penalties and temperature leave no token. Other outputs of the last two stay as they are.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    num_blocks = -(-vocab // SUB.value)
    lists = (history, bias_ids, banned_ids, allowed_ids)
    work = edited = None
    if bitmask is not None or any(items.numel() for items in lists):
        logits = logits.float()
        work, edited = torch.empty_like(logits, memory_format=torch.contiguous_format), _ints(logits, num_rows)
        counts = _ints(logits, num_rows, vocab) if history.numel() else None
        edit_kernel[(num_rows,)](
            work, counts, edited, logits, repetition, frequency, presence, history_start, history, prompt_len,
            bias_start, bias_ids, bias_values, banned_start, banned_ids, allowed_start, allowed_ids, bitmask,
            num_rows if history_start.dim() == 2 else 1, logits.stride(0),
            0 if bitmask is None else bitmask.stride(0), vocab, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    stats = _floats(logits, 4, num_rows, num_blocks)
    scan_kernel[(num_rows, triton.cdiv(num_blocks, SCAN_BLOCKS.value))](
        stats, logits, work, edited, temperature, num_logprobs, logits.stride(0), vocab, num_blocks, logprobs_mode,
        enable_fp_fusion=False,
    )  # fmt: skip
    # With 128 registers two programs share a multiprocessor, so that the rows of a full step all run at once.
    sample_kernel[(num_rows,)](
        tokens, logprobs, ranks, top_ids, top_logprobs, ok, logits, work, edited, stats,
        _ints(logits, num_rows, num_blocks), _floats(logits, num_rows, num_blocks), temperature, top_k, top_p, min_p,
        seed, counter, num_logprobs, tokens.stride(0), ok.stride(0), logprobs.stride(0), ranks.stride(0),
        *top_ids.stride(), *top_logprobs.stride(), logits.stride(0), vocab, num_blocks,
        triton.next_power_of_2(num_blocks), logprobs_mode, num_warps=8, maxnreg=128, enable_fp_fusion=False,
    )  # fmt: skip


def row_logprobs(
    logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor, logits: Tensor, targets: Tensor
) -> None:
    """Log-softmax of each row of logits[R, V] at its target, the target's rank, and the L best with their ids."""
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    num_blocks = -(-vocab // SUB.value)
    stats = _floats(logits, 2, num_rows, num_blocks)
    scan_kernel[(num_rows, triton.cdiv(num_blocks, SCAN_BLOCKS.value))](
        stats, logits, None, None, None, None, logits.stride(0), vocab, num_blocks, 0, enable_fp_fusion=False
    )
    score_kernel[(num_rows,)](
        logprobs, ranks, top_ids, top_logprobs, logits, targets, stats, _ints(logits, num_rows, num_blocks),
        top_ids.shape[1], logprobs.stride(0), ranks.stride(0), *top_ids.stride(), *top_logprobs.stride(),
        logits.stride(0), vocab, num_blocks, triton.next_power_of_2(num_blocks), num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _ints(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=like.device)
