"""Device functions of the sampling kernels over one row of logits.

A row is summed up in blocks of SUB entries: the maximum of each, and the sum of exp(entry - maximum). One program owns
a row, holds the maxima of all its blocks in registers, and reads entries only of the blocks whose maximum can matter,
which `place` lists in the workspace. Thresholds are found exactly, by bisecting floats as the integers that order them.

`src` points at the row, `heat` divides each entry (the temperature, or 1), V is its length. Zeros of either sign are
read as +0, so that what is equal has one order. A row's cut keeps what is above `value`, or equal to it with an id of
at most `last_id`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fuseline.compile.kernels.triton.lines import line_sums

SUB = tl.constexpr(64)  # entries of a block
TILE = tl.constexpr(64)  # blocks read together, and held while they are bisected
NOTHING = tl.constexpr(-(1 << 31))  # below the order of any float
COARSE = tl.constexpr(1 << 13)  # a bound that need not be exact is found to 2^-10 of itself, in half as many steps


@triton.jit
def order_of(x):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def float_of(order):
    bits = order.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def log_of(x):
    """Natural logarithm of a float64, rounded once to float32."""
    return tl.log(x).to(tl.float32)


@triton.jit
def place(is_wanted, places):
    """Lists the blocks in question at `places`, lowest first -> how many there are. is_wanted[PADDED_BLOCKS]."""
    block = tl.arange(0, is_wanted.shape[0])
    at = tl.cumsum(is_wanted.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(places + at, block, mask=is_wanted)
    tl.debug_barrier()
    return tl.sum(is_wanted.to(tl.int32), 0)


@triton.jit
def over(x, heat):
    """Entries of any float dtype over the heat, float32."""
    return tl.div_rn(x.to(tl.float32), heat) + 0.0


@triton.jit
def read(src, heat, V, places, count, first):
    """Entries of listed blocks [first, first + TILE) -> (entries [TILE, SUB], -inf where are none; ids; are any)."""
    slot = first + tl.arange(0, TILE)
    block = tl.load(places + slot, mask=slot < count, other=0)
    ids = block[:, None] * SUB + tl.arange(0, SUB)[None, :]
    there = (slot < count)[:, None] & (ids < V)
    return over(tl.load(src + ids, mask=there, other=float("-inf")), heat), ids, there


@triton.jit
def read_block(src, heat, V, block):
    """(entries [SUB], ids, are any) of one block."""
    ids = block * SUB + tl.arange(0, SUB)
    there = ids < V
    return over(tl.load(src + ids, mask=there, other=float("-inf")), heat), ids, there


@triton.jit
def keeps(x, ids, value, last_id):
    return (x > value) | ((x == value) & (ids <= last_id))


@triton.jit
def count_of(src, heat, V, places, count, threshold, total, first, IS_STRICT: tl.constexpr):
    """How many entries of the listed blocks from the `first` on are greater than the threshold, or equal to it if not
    IS_STRICT, with those of `total` [TILE]."""
    for at in range(first, count, TILE):
        x, _, there = read(src, heat, V, places, count, at)
        is_counted = x > threshold if IS_STRICT else (x >= threshold) & there
        total += tl.sum(is_counted.to(tl.int32), 1)
    return tl.sum(total, 0)


@triton.jit
def mass_of(src, heat, V, top, places, count, threshold, total, first):
    """Sum of exp(x - top) over entries x >= threshold of the listed blocks from the `first` on, with those of `total`
    [TILE] float64."""
    for at in range(first, count, TILE):
        x, _, _ = read(src, heat, V, places, count, at)
        total += line_sums(tl.where(x >= threshold, tl.exp(x - top), 0.0)).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def kth_of_maxima(maxima, low, top, k):
    """A bound that at least k of the blocks' maxima reach, just below the k-th largest; `low` if there are fewer."""
    lo = order_of(low).to(tl.int64)
    hi = order_of(top).to(tl.int64)
    while hi - lo >= COARSE:
        middle = lo + (hi - lo + 1) // 2
        is_enough = tl.sum((maxima >= float_of(middle)).to(tl.int32), 0) >= k
        lo = tl.where(is_enough, middle, lo)
        hi = tl.where(is_enough, hi, middle - 1)
    return float_of(lo)


@triton.jit
def kth_largest(src, heat, V, top, maxima, places, k):
    """The k-th largest entry, 1 <= k <= V. At least k entries reach a bound that k of the maxima reach."""
    low = kth_of_maxima(maxima, tl.minimum(top, float("-inf")), top, k)
    block = tl.arange(0, maxima.shape[0])
    count = place((maxima >= low) & (block * SUB < V), places)
    held, _, there = read(src, heat, V, places, count, 0)
    lo = order_of(low).to(tl.int64)
    hi = order_of(top).to(tl.int64)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        of_held = tl.sum(((held >= float_of(middle)) & there).to(tl.int32), 1)
        is_enough = count_of(src, heat, V, places, count, float_of(middle), of_held, TILE, False) >= k
        lo = tl.where(is_enough, middle, lo)
        hi = tl.where(is_enough, hi, middle - 1)
    return float_of(lo)


@triton.jit
def nucleus_bound(maxima, sums, top, low, spare):
    """A threshold not below `low` whose lesser entries weigh no more than `spare`, as far as the blocks can tell, and
    nearly the greatest such.

    A block below it weighs its sum; of one that reaches it, all but its greatest entry may lie just below.
    """
    best = tl.exp(maxima - top)
    lo = order_of(low).to(tl.int64)
    hi = order_of(top).to(tl.int64)
    while hi - lo >= COARSE:
        middle = lo + (hi - lo + 1) // 2
        threshold = float_of(middle)
        rest = tl.minimum(sums - best, tl.exp(threshold - top) * (SUB - 1))
        below = tl.sum(tl.where(maxima < threshold, sums, rest).to(tl.float64), 0)
        lo = tl.where(below <= spare, middle, lo)
        hi = tl.where(below <= spare, hi, middle - 1)
    return float_of(lo)


@triton.jit
def nucleus(src, heat, V, top, maxima, sums, places, low, p):
    """The cut (value, last_id) after the fewest entries, by value then id, that weigh p of those not below `low`."""
    block = tl.arange(0, maxima.shape[0])
    total = tl.sum(sums.to(tl.float64), 0)
    if low > float("-inf"):
        none = tl.zeros([TILE], tl.float64)
        total = mass_of(src, heat, V, top, places, place(maxima >= low, places), low, none, 0)
    wanted = p.to(tl.float64) * total
    # The sums of the blocks are rounded apart from those that decide, more so the greater the exponents are that
    # those take the difference of: a little is kept back for that.
    spare = total - wanted - 1e-6 * (1.0 + tl.abs(top)) * total
    low = nucleus_bound(maxima, sums, top, low, spare)
    count = place((maxima >= low) & (block * SUB < V), places)
    held, _, _ = read(src, heat, V, places, count, 0)
    weights = tl.exp(held - top)
    lo = order_of(low).to(tl.int64)
    hi = order_of(top).to(tl.int64)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        of_held = _heavy(held, weights, float_of(middle))
        is_enough = mass_of(src, heat, V, top, places, count, float_of(middle), of_held, TILE) >= wanted
        lo = tl.where(is_enough, middle, lo)
        hi = tl.where(is_enough, hi, middle - 1)
    value = float_of(lo)
    next_up = float_of(order_of(value).to(tl.int64) + 1)
    above = mass_of(src, heat, V, top, places, count, next_up, _heavy(held, weights, next_up), TILE)
    each = tl.exp(value - top).to(tl.float64)
    num_equal = tl.maximum(tl.ceil(tl.minimum((wanted - above) / each, 2.0e9)), 1.0).to(tl.int32)
    return value, nth_equal(src, heat, V, places, count, value, num_equal)


@triton.jit
def _heavy(entries, weights, threshold):
    """Sum per row of the weights of entries no less than the threshold, float64."""
    return line_sums(tl.where(entries >= threshold, weights, 0.0)).to(tl.float64)


@triton.jit
def nth_equal(src, heat, V, places, count, value, n):
    """The id of the n-th entry that equals `value`, or of the last one if there are fewer."""
    before = 0
    last_id = -1
    for first in range(0, count, TILE):
        x, ids, _ = read(src, heat, V, places, count, first)
        is_equal = (x == value).to(tl.int32)
        in_block = tl.sum(is_equal, 1)
        rank = (before + tl.cumsum(in_block, 0) - in_block)[:, None] + tl.cumsum(is_equal, 1)
        last_id = tl.maximum(last_id, tl.max(tl.max(tl.where((is_equal > 0) & (rank <= n), ids, -1), 1), 0))
        before += tl.sum(in_block, 0)
    return last_id


@triton.jit
def kept_masses(src, heat, V, top, maxima, places, masses, value, last_id):
    """Writes the kept weight of each block that has any to `masses`, listing them -> masses [PADDED_BLOCKS]."""
    slot = tl.arange(0, maxima.shape[0])
    count = place((maxima >= value) & (maxima > float("-inf")), places)
    for first in range(0, count, TILE):
        x, ids, _ = read(src, heat, V, places, count, first)
        mass = line_sums(tl.where(keeps(x, ids, value, last_id), tl.exp(x - top), 0.0))
        tl.store(masses + first + tl.arange(0, TILE), mass, mask=first + tl.arange(0, TILE) < count)
    tl.debug_barrier()
    return tl.load(masses + slot, mask=slot < count, other=0.0)


@triton.jit
def draw(src, heat, V, top, places, masses, value, last_id, uniform):
    """The first kept id, by id, at which the running weight exceeds `uniform` of the whole. masses[PADDED]."""
    slot = tl.arange(0, masses.shape[0])
    wide = masses.to(tl.float64)
    running = tl.cumsum(wide, 0)
    target = uniform * tl.max(running, 0)
    last = tl.max(tl.where(masses > 0, slot, 0), 0)
    chosen = tl.minimum(tl.min(tl.where((masses > 0) & (running > target), slot, masses.shape[0]), 0), last)
    before = tl.sum(tl.where(slot == chosen, running - wide, 0.0), 0)
    x, ids, _ = read_block(src, heat, V, tl.load(places + chosen))
    e = tl.where(keeps(x, ids, value, last_id), tl.exp(x - top), 0.0)
    passed = before + tl.cumsum(e.to(tl.float64), 0) > target
    last_token = tl.max(tl.where(e > 0, ids, 0), 0)
    return tl.minimum(tl.min(tl.where((e > 0) & passed, ids, V), 0), last_token)


@triton.jit
def best_id(src, heat, V, top, maxima):
    """The lowest id of the greatest entry, `top`."""
    block = tl.arange(0, maxima.shape[0])
    x, ids, _ = read_block(src, heat, V, tl.min(tl.where(maxima == top, block, maxima.shape[0]), 0))
    return tl.min(tl.where(x == top, ids, V), 0)


@triton.jit
def value_of(x, id, top, log_mass, value, last_id, IS_LOGPROB: tl.constexpr):
    """The reported value of an entry: its log-probability or itself if the cut keeps it, -inf if not."""
    shown = x - top - log_mass if IS_LOGPROB else x
    return tl.where(keeps(x, id, value, last_id), shown, float("-inf"))


@triton.jit
def report(
    logprob, rank, top_ids, top_logprobs, top_ids_stride, top_logprobs_stride, src, heat, V, top, log_mass, maxima,
    places, value, last_id, token, num_top, IS_LOGPROB: tl.constexpr,
):  # fmt: skip
    """Writes a token's value, its rank (1 + how many entries are greater) and the `num_top` best, ties by lowest id."""
    x = over(tl.load(src + token), heat)
    tl.store(logprob, value_of(x, token, top, log_mass, value, last_id, IS_LOGPROB))
    none = tl.zeros([TILE], tl.int32)
    greater = count_of(src, heat, V, places, place(maxima > x, places), x, none, 0, True)
    tl.store(rank, 1 + greater.to(tl.int64))
    block = tl.arange(0, maxima.shape[0])
    # The best entry left of each block; NOTHING once all of it is written. What is written lies before (x, id).
    left = tl.where(block * SUB < V, order_of(maxima), NOTHING)
    id = -1
    x = tl.maximum(top, float("inf"))
    for j in range(0, num_top):
        best = tl.max(left, 0)
        where = tl.min(tl.where(left == best, block, maxima.shape[0]), 0)
        entries, ids, there = read_block(src, heat, V, where)
        next_x = float_of(best)
        id = tl.min(tl.where(there & (entries == next_x) & (ids > tl.where(next_x < x, -1, id)), ids, V), 0)
        x = next_x
        tl.store(top_ids + j * top_ids_stride, id.to(tl.int64))
        tl.store(top_logprobs + j * top_logprobs_stride,
                 value_of(x, id, top, log_mass, value, last_id, IS_LOGPROB))  # fmt: skip
        after = there & ((entries < x) | ((entries == x) & (ids > id)))
        left = tl.where(block == where, tl.max(tl.where(after, order_of(entries), NOTHING), 0), left)
