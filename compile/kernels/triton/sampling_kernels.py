"""The kernels of sampling.py, in the order they run. Row functions are in sampling_rows.py.

Legend: R rows, V vocabulary, NB blocks of SUB entries a row. stats[4, R, NB]: maxima of the raw row and sums of
exp(entry - maximum), maxima of the edited row where it is one, sums of exp((entry - maximum) / temperature) of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.kernels.triton.lines import line_sums
from fuseline.compile.kernels.triton.sampling_rows import (
    SUB,
    best_id,
    draw,
    kept_masses,
    kth_largest,
    log_of,
    nucleus,
    place,
    report,
)  # fmt: skip

CHUNK = tl.constexpr(1024)  # entries or list items a step
SCAN_BLOCKS = tl.constexpr(32)  # blocks a program of the scan sums up
ALL_IDS = tl.constexpr((1 << 31) - 1)
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(2.0e38)  # of float32, nearly, over log2 e: times 0 it is 0
PROCESSED_LOGPROBS, RAW_LOGITS, PROCESSED_LOGITS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # codes.h


@triton.jit(do_not_specialize=["history_step"])
def edit_kernel(
    work, counts, edited, logits, repetition, frequency, presence, history_start, history, prompt_len, bias_start,
    bias_ids, bias_values, banned_start, banned_ids, allowed_start, allowed_ids, bitmask, history_step, logits_stride,
    bitmask_stride, V: tl.constexpr,
):  # fmt: skip
    """Program row: work[r] = the row after masks, bias and penalties, if it has any; edited[r] says so. A row's part of
    the history ends at history_start[r + history_step]."""
    r = tl.program_id(0)
    past, past_end = _span(history_start, r, history_step)
    bias, bias_end = _span(bias_start, r, 1)
    banned, banned_end = _span(banned_start, r, 1)
    allowed, allowed_end = _span(allowed_start, r, 1)
    alpha = tl.load(repetition + r)
    often = tl.load(frequency + r)
    once = tl.load(presence + r)
    has_penalty = ((alpha != 1.0) | (often != 0.0) | (once != 0.0)) & (past < past_end)
    is_edited = (bias < bias_end) | (banned < banned_end) | (allowed < allowed_end)
    if counts is not None:
        is_edited = is_edited | has_penalty
    if bitmask is not None:
        is_edited = is_edited | (r >= 0)
    tl.store(edited + r, is_edited.to(tl.int32))
    if not is_edited:
        return
    src = logits + r.to(tl.int64) * logits_stride
    z = work + r.to(tl.int64) * V
    words = bitmask
    if bitmask is not None:
        words = bitmask + r.to(tl.int64) * bitmask_stride
    for first in range(0, V, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        x = _admitted(src, words, ids, ids < V)
        tl.store(z + ids, tl.where(allowed < allowed_end, float("-inf"), x), mask=ids < V)
    tl.debug_barrier()
    for first in range(allowed, allowed_end, CHUNK):
        ids, there, _ = _items(allowed_ids, first, allowed_end, V)
        tl.store(z + ids, _admitted(src, words, ids, there), mask=there)
    tl.debug_barrier()
    for first in range(banned, banned_end, CHUNK):
        ids, there, _ = _items(banned_ids, first, banned_end, V)
        tl.store(z + ids, tl.full([CHUNK], float("-inf"), tl.float32), mask=there)
    tl.debug_barrier()
    for first in range(bias, bias_end, CHUNK):
        ids, there, at = _items(bias_ids, first, bias_end, V)
        tl.atomic_add(z + ids, tl.load(bias_values + at, mask=there, other=0.0), mask=there)
    tl.debug_barrier()
    # A branch that only a run decides is compiled whatever the arguments are: what is None is asked for first.
    if counts is not None:
        if has_penalty:
            first_output = past + tl.load(prompt_len + r).to(tl.int64)
            _penalize(z, counts + r.to(tl.int64) * V, history, past, past_end, first_output, alpha, often, once, V)


@triton.jit
def _penalize(z, counts, history, past, past_end, first_output, alpha, often, once, V: tl.constexpr):
    """counts: 1 for seen anywhere, plus 2 for each time in the output. Who takes an id's count penalizes it."""
    for first in range(0, V, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        tl.store(counts + ids, tl.zeros([CHUNK], tl.int32), mask=ids < V)
    tl.debug_barrier()
    for first in range(past, past_end, CHUNK):
        ids, there, at = _items(history, first, past_end, V)
        tl.atomic_or(counts + ids, tl.full([CHUNK], 1, tl.int32), mask=there)
        tl.atomic_add(counts + ids, tl.full([CHUNK], 2, tl.int32), mask=there & (at >= first_output))
    tl.debug_barrier()
    for first in range(past, past_end, CHUNK):
        ids, there, _ = _items(history, first, past_end, V)
        taken = tl.atomic_xchg(counts + ids, tl.zeros([CHUNK], tl.int32), mask=there)
        is_first = there & (taken > 0)
        count = (taken >> 1).to(tl.float32)
        x = tl.load(z + ids, mask=is_first, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, alpha), x * alpha)
        x = x - often * count
        tl.store(z + ids, x - tl.where(count > 0, once, 0.0), mask=is_first)


@triton.jit
def _span(starts, r, step):
    return tl.load(starts + r).to(tl.int64), tl.load(starts + r + step).to(tl.int64)


@triton.jit
def _items(items, first, end, V: tl.constexpr):
    """(ids, which of them are there and in the vocabulary, where they lie in the list)."""
    at = first + tl.arange(0, CHUNK)
    ids = tl.load(items + at, mask=at < end, other=-1).to(tl.int64)
    return ids, (ids >= 0) & (ids < V), at


@triton.jit
def _admitted(src, words, ids, there):
    """Raw entries, -inf where the bitmask has a zero."""
    x = tl.load(src + ids, mask=there, other=0.0)
    if words is not None:
        word = tl.load(words + ids // 32, mask=there, other=0)
        x = tl.where(((word >> (ids % 32).to(tl.int32)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def scan_kernel(
    stats, logits, work, edited, temperature, num_logprobs, logits_stride, V: tl.constexpr, NB: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Program (row, SCAN_BLOCKS blocks). Sums nobody will ask for are left out; a block with a NaN has that as its
    maximum. Nothing is divided by the temperature but differences: the greatest stays the greatest."""
    r = tl.program_id(0)
    block = tl.program_id(1) * SCAN_BLOCKS + tl.arange(0, SCAN_BLOCKS)
    step = tl.num_programs(0).to(tl.int64) * NB
    ids = block[:, None] * SUB + tl.arange(0, SUB)[None, :]
    x = tl.load(logits + r.to(tl.int64) * logits_stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    top = _greatest(x)
    is_scored = True
    if num_logprobs is not None:
        is_scored = tl.load(num_logprobs + r) >= 0
    out = stats + r.to(tl.int64) * NB + block
    tl.store(out, top + 0.0, mask=block < NB)
    if is_scored:
        tl.store(out + step, _mass(x, top, None), mask=block < NB)
    if temperature is not None:
        if work is not None:
            if tl.load(edited + r) != 0:
                x = tl.load(work + r.to(tl.int64) * V + ids, mask=ids < V, other=float("-inf"))
                top = _greatest(x)
                tl.store(out + 2 * step, top + 0.0, mask=block < NB)
        heat = tl.load(temperature + r)
        if (heat > 0) | (is_scored & (MODE == PROCESSED_LOGPROBS)):
            tl.store(out + 3 * step, _mass(x, top, tl.where(heat > 0, heat, 1.0)), mask=block < NB)


@triton.jit
def _greatest(x):
    """Maximum of each row; NaN of one with a NaN."""
    return tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), tl.max(x, 1))


@triton.jit
def _mass(x, top, heat):
    """Softmax denominator of each row: the sum of exp((x - top) / heat), or of exp(x - top)."""
    less = x - tl.where(tl.abs(top) == float("inf"), 0.0, top)[:, None]
    scale = LOG2_E
    if heat is not None:
        scale = tl.minimum(1.0 / heat, LARGEST) * LOG2_E
    return line_sums(tl.exp2(less * scale))


@triton.jit(do_not_specialize=["top_ids_stride_r", "top_logprobs_stride_r"])
def sample_kernel(
    tokens, logprobs, ranks, top_ids, top_logprobs, ok, logits, work, edited, stats, places, masses, temperature,
    top_k, top_p, min_p, seed, counter, num_logprobs, tokens_stride, ok_stride, logprobs_stride, ranks_stride,
    top_ids_stride_r, top_ids_stride_l, top_logprobs_stride_r, top_logprobs_stride_l, logits_stride, V: tl.constexpr,
    NB: tl.constexpr, PADDED_BLOCKS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Program row: its token and what is reported of it. A row without a token gets its status only: 0 or 2."""
    r = tl.program_id(0)
    wide = r.to(tl.int64)
    stats += wide * NB
    step = tl.num_programs(0).to(tl.int64) * NB
    raw_maxima, raw_top, is_ok = _maxima(stats, None, NB, PADDED_BLOCKS)
    heat = tl.load(temperature + r)
    of_row = stats
    if work is not None:
        if tl.load(edited + r) != 0:
            of_row = stats + 2 * step
    maxima, top, has_token = _maxima(of_row, tl.where(heat > 0, heat, 1.0), NB, PADDED_BLOCKS)
    status = tl.where(is_ok, tl.where(has_token, 1, 2), 0)
    tl.store(ok + r * ok_stride, status.to(ok.dtype.element_ty))
    if not (is_ok & has_token):
        return
    raw = logits + wide * logits_stride
    src = raw
    if work is not None:
        if tl.load(edited + r) != 0:
            src = work + wide * V
    places += wide * NB
    masses += wide * NB
    num_top = tl.load(num_logprobs + r).to(tl.int32)
    value, last_id = _keep_all(top)
    log_mass = top * 0.0
    if heat > 0:
        sums = _sums(stats + 3 * step, maxima, top, NB, PADDED_BLOCKS)
        value, last_id = _truncate(
            src, heat, V, top, maxima, sums, places, tl.load(top_k + r), tl.load(top_p + r), tl.load(min_p + r)
        )
        if value > float("-inf"):
            sums = kept_masses(src, heat, V, top, maxima, places, masses, value, last_id)
        else:
            place(tl.arange(0, PADDED_BLOCKS) < NB, places)
        u = _uniform(tl.load(seed + r).to(tl.uint64), tl.load(counter + r).to(tl.uint64))
        token = draw(src, heat, V, top, places, sums, value, last_id, u)
        log_mass = log_of(tl.sum(sums.to(tl.float64), 0))
    else:
        heat = tl.maximum(heat, 1.0)
        token = best_id(src, heat, V, top, maxima)
        if MODE == PROCESSED_LOGPROBS:
            if num_top >= 0:
                log_mass = _log_mass(stats + 3 * step, maxima, top, NB, PADDED_BLOCKS)
    tl.store(tokens + r * tokens_stride, token.to(tokens.dtype.element_ty))
    if num_top >= 0:
        if MODE != PROCESSED_LOGPROBS and MODE != PROCESSED_LOGITS:
            src, heat, top, maxima = raw, tl.where(heat > 0, 1.0, heat), raw_top, raw_maxima
            value, last_id = _keep_all(top)
            if MODE != RAW_LOGITS:
                log_mass = _log_mass(stats + step, maxima, top, NB, PADDED_BLOCKS)
        report(
            logprobs + r * logprobs_stride, ranks + r * ranks_stride, top_ids + wide * top_ids_stride_r,
            top_logprobs + wide * top_logprobs_stride_r, top_ids_stride_l, top_logprobs_stride_l, src, heat, V, top,
            log_mass, maxima, places, value, last_id, token, num_top, MODE != RAW_LOGITS and MODE != PROCESSED_LOGITS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["top_ids_stride_r", "top_logprobs_stride_r", "num_top"])
def score_kernel(
    logprobs, ranks, top_ids, top_logprobs, logits, targets, stats, places, num_top, logprobs_stride, ranks_stride,
    top_ids_stride_r, top_ids_stride_l, top_logprobs_stride_r, top_logprobs_stride_l, logits_stride, V: tl.constexpr,
    NB: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program row: what is reported of a given token, of the raw row."""
    r = tl.program_id(0)
    wide = r.to(tl.int64)
    stats += wide * NB
    maxima, top, _ = _maxima(stats, None, NB, PADDED_BLOCKS)
    log_mass = _log_mass(stats + tl.num_programs(0).to(tl.int64) * NB, maxima, top, NB, PADDED_BLOCKS)
    value, last_id = _keep_all(top)
    report(
        logprobs + r * logprobs_stride, ranks + r * ranks_stride, top_ids + wide * top_ids_stride_r,
        top_logprobs + wide * top_logprobs_stride_r, top_ids_stride_l, top_logprobs_stride_l,
        logits + wide * logits_stride, tl.where(top == top, 1.0, top), V, top, log_mass, maxima, places + wide * NB,
        value, last_id, tl.load(targets + r), num_top, True,
    )  # fmt: skip


@triton.jit
def _keep_all(top):
    """The cut that keeps every entry, in the types that a cut has."""
    return tl.minimum(top, float("-inf")), tl.where(top == top, ALL_IDS, 0)


@triton.jit
def _maxima(maxima, heat, NB: tl.constexpr, PADDED_BLOCKS: tl.constexpr):
    """(maxima [PADDED_BLOCKS] over `heat`, the greatest, whether the row is finite there and has no NaN)."""
    block = tl.arange(0, PADDED_BLOCKS)
    found = tl.load(maxima + block, mask=block < NB, other=float("-inf"))
    if heat is not None:
        found = tl.div_rn(found, heat) + 0.0
    has_nan = tl.max((found != found).to(tl.int32), 0) > 0
    top = tl.max(found, 0)
    return found, top, (top > float("-inf")) & (top < float("inf")) & (has_nan == 0)


@triton.jit
def _sums(sums, maxima, top, NB: tl.constexpr, PADDED_BLOCKS: tl.constexpr):
    """Sum per block of exp(entry - top), [PADDED_BLOCKS]."""
    block = tl.arange(0, PADDED_BLOCKS)
    return tl.load(sums + block, mask=block < NB, other=0.0) * tl.exp(maxima - top)


@triton.jit
def _log_mass(sums, maxima, top, NB: tl.constexpr, PADDED_BLOCKS: tl.constexpr):
    return log_of(tl.sum(_sums(sums, maxima, top, NB, PADDED_BLOCKS).to(tl.float64), 0))


@triton.jit
def _truncate(src, heat, V: tl.constexpr, top, maxima, sums, places, top_k, top_p, min_p):
    """The cut of min_p, then top_k, then top_p."""
    value, last_id = _keep_all(top)
    if min_p > 0:
        value = top + tl.where(min_p < 1, log_of(min_p.to(tl.float64)), 0.0)
    if (top_k > 0) & (top_k < V):
        value = tl.maximum(value, kth_largest(src, heat, V, top, maxima, places, top_k))
    if top_p < 1:
        value, last_id = nucleus(src, heat, V, top, maxima, sums, places, value, top_p)
    return value, last_id


@triton.jit
def _uniform(seed, counter):
    """Philox4x32-10 (Salmon et al., SC'11) with key = seed and counter = (counter, 0): [0, 1) of 53 bits, float64."""
    low = tl.full([], 0xFFFFFFFF, tl.uint64)
    c0, c1, c2, c3 = counter & low, counter >> 32, counter & 0, counter & 0
    k0, k1 = seed & low, seed >> 32
    for _ in tl.static_range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return ((c0 >> 5).to(tl.float64) * 67108864.0 + (c1 >> 6).to(tl.float64)) / 9007199254740992.0
