"""The sampling ops in plain torch, row by row, straight from SPEC 6: what tests compare the kernels with.

The random stream is this file's own, so drawn tokens agree with the kernels in distribution, greedy ones exactly.
"""

from __future__ import annotations

import hashlib

import torch

from fuseline.engine.config import EngineConfig
from fuseline.engine.run.device import HostDevice, SampleOps

RAW_LOGPROBS, PROCESSED_LOGPROBS, RAW_LOGITS = 0, 1, 2
NOTHING_LEFT = 2


def reference_device(config: EngineConfig | None = None) -> HostDevice:
    return HostDevice(SampleOps(sample, row_logprobs))


def sample(
    tokens, logprobs, ranks, top_ids, top_logprobs, ok, logits, temperature, top_k, top_p, min_p, repetition,
    frequency, presence, seed, counter, num_logprobs, history_start, history, prompt_len, bias_start, bias_ids,
    bias_values, banned_start, banned_ids, allowed_start, allowed_ids, bitmask, logprobs_mode,
) -> None:  # fmt: skip
    """Arguments as in csrc/cpu/ops.def, or a history as kernels/triton/sampling.py has it; outputs are written in
    place."""
    for row in range(logits.shape[0]):
        raw = logits[row].clone()
        ok[row] = int(bool(torch.isfinite(raw).all()))
        if not ok[row]:
            continue
        z = raw.clone()
        allowed = allowed_ids[allowed_start[row] : allowed_start[row + 1]]
        if len(allowed):
            z = torch.full_like(z, -torch.inf).index_copy(0, allowed, z[allowed])
        if bitmask is not None:
            bits = bitmask[row].view(torch.uint8)[:, None] >> torch.arange(8) & 1
            z[bits.reshape(-1)[: len(z)] == 0] = -torch.inf
        z[banned_ids[banned_start[row] : banned_start[row + 1]]] = -torch.inf
        biased = slice(bias_start[row], bias_start[row + 1])
        z[bias_ids[biased]] += bias_values[biased]
        begin, end = history_start[:, row] if history_start.dim() == 2 else history_start[row : row + 2]
        past = history[begin:end].long()
        z = _penalize(
            z, past, int(prompt_len[row]), float(repetition[row]), float(frequency[row]), float(presence[row])
        )
        heated = z / temperature[row] if temperature[row] > 0 else z
        if heated.isnan().any() or heated.max().isinf():
            ok[row] = NOTHING_LEFT
            continue
        if temperature[row] == 0:
            token = int(torch.argmax(z))
        else:
            z = _truncate(heated, int(top_k[row]), float(top_p[row]), float(min_p[row]))
            token = _draw(torch.softmax(z.double(), 0), int(seed[row]), int(counter[row]))
        tokens[row] = token
        if num_logprobs[row] >= 0:
            kept = raw if logprobs_mode in (RAW_LOGPROBS, RAW_LOGITS) else z
            values = torch.log_softmax(kept, 0) if logprobs_mode in (RAW_LOGPROBS, PROCESSED_LOGPROBS) else kept
            _score(values, token, row, (logprobs, ranks, top_ids, top_logprobs))


def row_logprobs(logprobs, ranks, top_ids, top_logprobs, logits, targets) -> None:
    for row in range(logits.shape[0]):
        _score(torch.log_softmax(logits[row], 0), int(targets[row]), row, (logprobs, ranks, top_ids, top_logprobs))


def _penalize(z, past, prompt_len, repetition, frequency, presence) -> torch.Tensor:
    if not len(past):
        return z
    z = z.clone()
    seen = torch.unique(past)
    z[seen] = torch.where(z[seen] > 0, z[seen] / repetition, z[seen] * repetition)
    generated, counts = torch.unique(past[prompt_len:], return_counts=True)
    z[generated] -= frequency * counts + presence
    return z


def _truncate(z, top_k, top_p, min_p) -> torch.Tensor:
    if min_p > 0:
        probs = torch.softmax(z, 0)
        z = z.masked_fill(probs < min_p * probs.max(), -torch.inf)
    if 0 < top_k < len(z):
        z = z.masked_fill(z < torch.topk(z, top_k).values[-1], -torch.inf)
    if top_p < 1:
        order = torch.argsort(z, descending=True, stable=True)
        probs = torch.softmax(z[order], 0)
        drop = torch.cumsum(probs, 0) - probs >= top_p
        drop[0] = False
        z = z.index_fill(0, order[drop], -torch.inf)
    return z


def _draw(probs: torch.Tensor, seed: int, counter: int) -> int:
    digest = hashlib.sha256(f"{seed}/{counter}".encode()).digest()
    threshold = int.from_bytes(digest[:6], "little") / 2**48 * float(probs.sum())
    token = int(torch.searchsorted(torch.cumsum(probs, 0), threshold, right=True))
    return min(token, int(torch.nonzero(probs)[-1]))


def _score(values: torch.Tensor, token: int, row: int, outputs: tuple[torch.Tensor, ...]) -> None:
    logprobs, ranks, top_ids, top_logprobs = outputs
    logprobs[row] = values[token]
    ranks[row] = int((values > values[token]).sum()) + 1
    order = torch.argsort(values, descending=True, stable=True)[: top_ids.shape[1]]
    top_ids[row] = order
    top_logprobs[row] = values[order]
