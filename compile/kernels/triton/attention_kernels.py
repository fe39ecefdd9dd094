"""The kernels of attention.py, which says how they share the work.

A row is one query head of one token; a tile is ROWS rows: HEADS heads of a kv head times TOKENS tokens of a sequence.
Scores are in units of log2 e, so that powers of two stand for those of e.

A key's D numbers are multiplied in two parts where one of a power of two would be mostly padding (576 = 512 + 64).

Legend: B keys a block, D key dim, E value dim, PARTS tiles that the GROUP query heads of a kv head are cut into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.kernels.triton.tiles import owner_of_tile

LOG2_E = tl.constexpr(1.4426950408889634)
BATCH = ["table_stride", "num_slots", "max_folded", "num_seqs", "max_decode", "block_table"]
"""Arguments that change from step to step: a kernel compiled anew for a 1 or a multiple of 16 would hold up a step.
A group's table begins wherever the one before it ends."""


@triton.jit(do_not_specialize=BATCH)
def decode_kernel(
    out, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, k_scale, v_scale, slopes, workspace,
    out_stride_t, out_stride_h, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_b, v_stride_n, v_stride_h,
    v_stride_b, table_stride, window, scale, softcap, num_heads, num_slots, max_folded, GROUP: tl.constexpr,
    IS_ALL: tl.constexpr, SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_CHUNKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, IS_FOLDING: tl.constexpr, B: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr,
    REST: tl.constexpr, PADDED_E: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (kv head and part, sequence, worker). Writes rows of few splits; of the others partial sums."""
    kv_head = tl.program_id(0) // PARTS
    seq = tl.program_id(1)
    worker = tl.program_id(2)
    begin = tl.load(query_start + seq)
    num_tokens = tl.load(query_start + seq + 1) - begin
    length = tl.load(seq_lens + seq)
    if not IS_ALL:
        if num_tokens > TOKENS:
            return
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    in_tile, in_group, is_head = _rows(tl.program_id(0) % PARTS, ROWS, HEADS, GROUP)
    head = kv_head * GROUP + in_group
    slope = _slopes(slopes, head, is_head)
    value_dim = tl.arange(0, PADDED_E)
    k_head = k_cache + kv_head.to(tl.int64) * k_stride_h
    v_head = v_cache + kv_head.to(tl.int64) * v_stride_h
    for token in range(0, num_tokens, TOKENS):
        first, start, end, split, num_splits = _cut(
            length, num_tokens, token, window, IS_CHUNKED, TOKENS, KEYS, SPLIT, NUM_SPLITS
        )
        row_token = token + in_tile
        is_row = is_head & (in_tile < TOKENS) & (row_token < num_tokens)
        position = length - num_tokens + row_token
        at = (begin + row_token).to(tl.int64)
        rows, rest = _queries(q + at * q_stride_t + head.to(tl.int64) * q_stride_h, is_row, D, PADDED_D, REST)
        slot = at if IS_ALL else (seq * TOKENS + row_token).to(tl.int64)
        is_whole = num_splits <= max_folded
        m = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED_E], tl.float32)
        step = tl.where(is_whole, 1, tl.num_programs(2))
        for i in range(tl.where(is_whole & (worker > 0), num_splits, worker), num_splits, step):
            low = start + i * split
            part_m, part_l, part = _attend(
                tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS, PADDED_E], tl.float32), rows, rest, k_head, v_head, block_table + seq * table_stride,
                low, tl.minimum(low + split, end), first, end, position, window, k_stride_n, k_stride_b, v_stride_n,
                v_stride_b, scale, softcap, slope, IS_CHUNKED, HAS_SOFTCAP, HAS_SLOPES, True, KEYS, B, D, E, PADDED_D,
                REST, PADDED_E,
            )  # fmt: skip
            line = (slot * num_heads + head) * NUM_SPLITS + i
            is_kept = is_row & (num_splits > max_folded)
            stats = workspace + num_slots.to(tl.int64) * num_heads * NUM_SPLITS * E + line * 2
            tl.store(stats, part_m, mask=is_kept)
            tl.store(stats + 1, part_l, mask=is_kept)
            tl.store(workspace + (line * E)[:, None] + value_dim[None, :], part,
                     mask=is_kept[:, None] & (value_dim < E)[None, :])  # fmt: skip
            if IS_FOLDING:
                m, mass, shrink, weight = _fold(m, mass, part_m, part_l)
                acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], [ROWS, PADDED_E]), part * weight[:, None])
            else:
                m, mass, acc = part_m, part_l, part
        if sinks is not None:
            mass, shrink = _add_sink(m, mass, tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32))
            acc = acc * shrink[:, None]
        if v_scale is not None:
            acc = acc * tl.load(v_scale)
        acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(
            out + (at * out_stride_t + head * out_stride_h)[:, None] + value_dim[None, :],
            acc.to(out.dtype.element_ty),
            mask=(is_row & is_whole & (worker == 0))[:, None] & (value_dim < E)[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_slots", "max_folded"])
def merge_kernel(
    out, seq_lens, query_start, sinks, v_scale, workspace, out_stride_t, out_stride_h, window, num_slots,
    max_folded, IS_ALL: tl.constexpr, SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_CHUNKED: tl.constexpr,
    E: tl.constexpr, PADDED_E: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence, first token): merges the splits of rows that the decode kernel left in the workspace."""
    head = tl.program_id(0)
    num_heads = tl.num_programs(0)
    seq = tl.program_id(1)
    begin = tl.load(query_start + seq)
    num_tokens = tl.load(query_start + seq + 1) - begin
    length = tl.load(seq_lens + seq)
    if not IS_ALL:
        if num_tokens > TOKENS:
            return
    dim = tl.arange(0, PADDED_E)
    for token in range(tl.program_id(2), num_tokens, tl.num_programs(2)):
        _, _, _, _, num_splits = _cut(
            length, num_tokens, token // TOKENS * TOKENS, window, IS_CHUNKED, TOKENS, KEYS, SPLIT, NUM_SPLITS
        )
        at = (begin + token).to(tl.int64)
        slot = at if IS_ALL else (seq * TOKENS + token).to(tl.int64)
        line = (slot * num_heads + head) * NUM_SPLITS
        stats = workspace + num_slots.to(tl.int64) * num_heads * NUM_SPLITS * E + line * 2
        m = float("-inf")
        mass = 0.0
        acc = tl.zeros([PADDED_E], tl.float32)
        if num_splits > max_folded:
            # Eight at a time, so that their loads are under way together.
            for i in range(0, num_splits, 8):
                for j in tl.static_range(8):
                    there = i + j < num_splits
                    part_m = tl.load(stats + (i + j) * 2, mask=there, other=float("-inf"))
                    part_l = tl.load(stats + (i + j) * 2 + 1, mask=there, other=0.0)
                    part = tl.load(workspace + (line + i + j) * E + dim, mask=there & (dim < E), other=0.0)
                    m, mass, shrink, weight = _fold(m, mass, part_m, part_l)
                    acc = tl.fma(acc, tl.broadcast_to(shrink, [PADDED_E]), part * weight)
            if sinks is not None:
                mass, shrink = _add_sink(m, mass, tl.load(sinks + head).to(tl.float32))
                acc = acc * shrink
            if v_scale is not None:
                acc = acc * tl.load(v_scale)
            acc = acc / tl.where(mass == 0.0, 1.0, mass)
            tl.store(out + at * out_stride_t + head * out_stride_h + dim, acc.to(out.dtype.element_ty), mask=dim < E)


@triton.jit(do_not_specialize=BATCH)
def prefill_kernel(
    out, q, k_cache, v_cache, block_table, seq_lens, query_start, sinks, k_scale, v_scale, slopes, out_stride_t,
    out_stride_h, q_stride_h, q_stride_t, k_stride_n, k_stride_h, k_stride_b, v_stride_n, v_stride_h, v_stride_b,
    table_stride, window, scale, softcap, num_seqs, max_decode, GROUP: tl.constexpr, IS_WINDOWED: tl.constexpr,
    IS_CHUNKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SLOPES: tl.constexpr, B: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr,
    REST: tl.constexpr, PADDED_E: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, kv head and part). Last tiles first: they see the most keys."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // PARTS
    seq, first_tile = owner_of_tile(query_start, tile, num_seqs, TOKENS)
    begin = tl.load(query_start + seq)
    num_tokens = tl.load(query_start + seq + 1) - begin
    token = (tile - first_tile) * TOKENS
    if (token >= num_tokens) | (num_tokens <= max_decode):
        return
    if k_scale is not None:
        scale = scale * tl.load(k_scale)
    length = tl.load(seq_lens + seq)
    in_tile, in_group, is_head = _rows(tl.program_id(1) % PARTS, ROWS, HEADS, GROUP)
    head = kv_head * GROUP + in_group
    slope = _slopes(slopes, head, is_head)
    is_row = is_head & (in_tile < TOKENS) & (token + in_tile < num_tokens)
    value_dim = tl.arange(0, PADDED_E)
    at = (begin + token + in_tile).to(tl.int64)
    rows, rest = _queries(q + at * q_stride_t + head.to(tl.int64) * q_stride_h, is_row, D, PADDED_D, REST)
    k_head = k_cache + kv_head.to(tl.int64) * k_stride_h
    v_head = v_cache + kv_head.to(tl.int64) * v_stride_h
    table = block_table + seq * table_stride

    # Keys [start, whole_start) and [whole_end, end) hide from some rows of the tile; those between from none.
    earliest = length - num_tokens + token
    position = earliest + in_tile
    end = tl.minimum(earliest + TOKENS, length)
    first = tl.maximum(_first_key(earliest, window, IS_CHUNKED), 0)
    start = first // KEYS * KEYS
    whole_end = tl.maximum((earliest + 1) // KEYS * KEYS, start)
    whole_start = start
    m = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_E], tl.float32)
    if IS_WINDOWED:
        whole_start = tl.cdiv(tl.maximum(_first_key(end - 1, window, IS_CHUNKED), start), KEYS) * KEYS
        whole_end = tl.maximum(whole_end, tl.minimum(whole_start, end))
        m, mass, acc = _attend(
            m, mass, acc, rows, rest, k_head, v_head, table, start, tl.minimum(whole_start, end), first, end, position,
            window, k_stride_n, k_stride_b, v_stride_n, v_stride_b, scale, softcap, slope, IS_CHUNKED, HAS_SOFTCAP,
            HAS_SLOPES, True, KEYS, B, D, E, PADDED_D, REST, PADDED_E,
        )  # fmt: skip
    m, mass, acc = _attend(
        m, mass, acc, rows, rest, k_head, v_head, table, whole_start, whole_end, first, end, position, window,
        k_stride_n, k_stride_b, v_stride_n, v_stride_b, scale, softcap, slope, IS_CHUNKED, HAS_SOFTCAP, HAS_SLOPES,
        False, KEYS, B, D, E, PADDED_D, REST, PADDED_E,
    )  # fmt: skip
    m, mass, acc = _attend(
        m, mass, acc, rows, rest, k_head, v_head, table, whole_end, end, first, end, position, window, k_stride_n,
        k_stride_b, v_stride_n, v_stride_b, scale, softcap, slope, IS_CHUNKED, HAS_SOFTCAP, HAS_SLOPES, True, KEYS, B,
        D, E, PADDED_D, REST, PADDED_E,
    )  # fmt: skip
    if sinks is not None:
        mass, shrink = _add_sink(m, mass, tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32))
        acc = acc * shrink[:, None]
    if v_scale is not None:
        acc = acc * tl.load(v_scale)
    acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(
        out + (at * out_stride_t + head * out_stride_h)[:, None] + value_dim[None, :], acc.to(out.dtype.element_ty),
        mask=is_row[:, None] & (value_dim < E)[None, :],
    )  # fmt: skip


@triton.jit
def _cut(length, num_tokens, token, window, IS_CHUNKED: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
         SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr):  # fmt: skip
    """The keys of the tile at `token` of a sequence: (first, start of the first split, end, keys a split, splits)."""
    position = length - num_tokens + token
    first = tl.maximum(_first_key(position, window, IS_CHUNKED), 0)
    start = first // KEYS * KEYS
    end = tl.minimum(position + TOKENS, length)
    split = SPLIT * tl.maximum(tl.cdiv(end - start, SPLIT * NUM_SPLITS), 1)
    return first, start, end, split, tl.cdiv(tl.maximum(end - start, 0), split)


@triton.jit
def _first_key(position, window, IS_CHUNKED: tl.constexpr):
    """The first key that a token sees, below 0 where its window begins before the sequence; chunks of `window` keys."""
    if IS_CHUNKED:
        return position // window * window
    else:
        return position - window + 1


@triton.jit
def _slopes(slopes, head, is_head):
    """Slopes of the heads of rows, of scores in units of log2 e."""
    if slopes is None:
        return tl.zeros(head.shape, tl.float32)
    else:
        return tl.load(slopes + head, mask=is_head, other=0.0) * LOG2_E


@triton.jit
def _rows(part, ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """For each row of a tile: its token within the tile, its head within the group, whether there is such a head."""
    row = tl.arange(0, ROWS)
    head = part * HEADS + row % HEADS
    return row // HEADS, head, head < GROUP


@triton.jit
def _queries(line, is_row, D: tl.constexpr, PADDED_D: tl.constexpr, REST: tl.constexpr):
    """The rows at `line`: (numbers [ROWS, PADDED_D], those behind them [ROWS, REST])."""
    dim = tl.arange(0, PADDED_D)
    rows = tl.load(line[:, None] + dim[None, :], mask=is_row[:, None] & (dim < D)[None, :], other=0.0)
    if REST > 0:
        behind = PADDED_D + tl.arange(0, REST)
        rest = tl.load(line[:, None] + behind[None, :], mask=is_row[:, None] & (behind < D)[None, :], other=0.0)
        return rows, rest
    else:
        return rows, rows


@triton.jit
def _attend(
    m, mass, acc, q, q_rest, k_head, v_head, table, low, high, first, end, position, window, k_stride_n, k_stride_b,
    v_stride_n, v_stride_b, scale, softcap, slope, IS_CHUNKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr, IS_MASKED: tl.constexpr, KEYS: tl.constexpr, B: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, PADDED_D: tl.constexpr, REST: tl.constexpr, PADDED_E: tl.constexpr,
):  # fmt: skip
    """Online softmax of rows q over keys [low, high), none of which lies before `first` or behind `end`.

    State of a row: maximum m of the scores, softmax denominator `mass` = sum of 2^(score - m), weighted values acc.
    """
    dim = tl.arange(0, PADDED_D)
    value_dim = tl.arange(0, PADDED_E)
    for base in range(low, high, KEYS):
        key = base + tl.arange(0, KEYS)
        there = key >= 0
        if IS_MASKED:
            there = (key >= first) & (key < end)
        block = tl.load(table + key // B, mask=there, other=0).to(tl.int64)
        line = k_head + block * k_stride_n + key % B * k_stride_b
        k = tl.load(line[None, :] + dim[:, None], mask=there[None, :] & (dim < D)[:, None], other=0.0)
        v = tl.load(
            v_head + (block * v_stride_n + key % B * v_stride_b)[:, None] + value_dim[None, :],
            mask=there[:, None] & (value_dim < E)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, _as_number(k, q.dtype), input_precision="ieee")
        if REST > 0:
            behind = PADDED_D + tl.arange(0, REST)
            k = tl.load(line[None, :] + behind[:, None], mask=there[None, :] & (behind < D)[:, None], other=0.0)
            scores = tl.dot(q_rest, _as_number(k, q.dtype), scores, input_precision="ieee")
        scores = _product(scores, scale)
        if HAS_SOFTCAP:
            scores = _product(_tanh(scores / (softcap * LOG2_E)), softcap * LOG2_E)
        if HAS_SLOPES:
            distance = (key[None, :] - position[:, None]).to(tl.float32)
            scores = tl.fma(tl.broadcast_to(slope[:, None], [slope.shape[0], KEYS]), distance, scores)
        if IS_MASKED:
            earliest = _first_key(position, window, IS_CHUNKED)
            seen = (key[None, :] <= position[:, None]) & (key[None, :] >= earliest[:, None]) & there[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        finite = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(m - finite)
        mass = mass * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), _as_number(v, q.dtype), acc * shrink[:, None], input_precision="ieee")
        m = new_m
    return m, mass, acc


@triton.jit
def _product(x, by):
    """x[R, C] * by, rounded whatever follows: where a difference does, and no mask between the two, a compiler would
    fuse them, and a row's bits would depend on whether its tile hides a key."""
    return tl.fma(x, tl.full([x.shape[0], x.shape[1]], by, tl.float32), tl.zeros([x.shape[0], x.shape[1]], tl.float32))


@triton.jit
def _as_number(x, dtype: tl.constexpr):
    """Cache entries as `dtype`. Bytes are e4m3: their bits, moved into an fp16, are the number over 256."""
    if x.dtype == tl.uint8:
        wide = x.to(tl.uint16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * 256.0).to(dtype)
    return x.to(dtype)


@triton.jit
def _tanh(x):
    """To fp32's last bits. The polynomial is (tanh(sqrt z) / sqrt z - 1) / z on z <= 0.4, as in csrc/cpu/vec_math.h."""
    z = x * x
    p = ((-0.006062236915348035 * z + 0.02097501859837721) * z - 0.053846696878622764) * z
    small = ((p + 0.13332746453591213) * z - 0.33333328781404076) * z * x + x
    return tl.where(z < 0.390625, small, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0))


@triton.jit
def _fold(m, mass, next_m, next_l):
    """Merged maximum and softmax denominator, and factors of the two sums. FMA by hand: the same bits anywhere."""
    new_m = tl.maximum(m, next_m)
    finite = tl.where(new_m == float("-inf"), 0.0, new_m)
    shrink = tl.exp2(m - finite)
    weight = tl.exp2(next_m - finite)
    return new_m, tl.fma(mass, shrink, next_l * weight), shrink, weight


@triton.jit
def _add_sink(m, mass, sink):
    """The softmax denominator with a sink's share in it, and the factor of the weighted sum.

    The product is rounded before the difference: a compiler that fused the two would do so in some kernels only.
    """
    sink = tl.fma(sink, LOG2_E, 0.0)
    new_m = tl.maximum(m, sink)
    shrink = tl.exp2(m - new_m)
    return tl.fma(mass, shrink, tl.exp2(sink - new_m)), shrink
