// The tiles of decode attention by bulk copies (attention_bulk.cu): which a block computes, and how they come.
#pragma once
#include "cuda/attention.h"
#include "cuda/kernels.h"
#include "cuda/vector.h"

namespace fuseline::cuda {
namespace {

constexpr int kSharedBytes = 227 << 10;  // the most that a block of sm_90 and sm_100 has
constexpr int kMaxStages = 8;

// A token that is computed: the last key it sees, its sequence, and the runs of its splits.
struct Slot { int position; uint16_t seq, num_runs; };

struct BulkArgs : AttentionArgs {
  int num_seqs, first_slot, slots_end, num_stages;  // slots [first_slot, slots_end) are computed
};

// log2 of the groups of up to eight query heads that share a kv head: one or two.
FL_DEVICE int groups_shift(const BulkArgs& a) { return a.group > kHeads; }

template <class Cache, int kDim>
struct Sizes {
  static constexpr int kWarps = kDim <= 128 ? 8 : 4, kThreads = kWarps * kWarp;
  static constexpr int kHalf = kKeys * kDim * sizeof(Cache), kTile = 2 * kHalf;  // bytes: keys, then values
  static constexpr bool kHasRuns = kDim <= 128;  // more registers than there are would hold a run's results meanwhile
  // Results of a warp for two heads, then their maxima and denominators; such parts lie 16 bytes apart modulo 128, so
  // that lanes of different heads write to different banks.
  static constexpr int kPair = 2 * kDim + 4;

  static constexpr int parts_bytes(int num_pairs) { return kWarps * num_pairs * kPair * 4; }
  static constexpr int stage_bytes() { return kWarps * (kTile + static_cast<int>(sizeof(BulkBarrier))); }
};

template <class Cache, int kDim>
struct Shared {
  using S = Sizes<Cache, kDim>;
  char* tiles;  // [stages][warps][kTile]
  float* parts;  // [warps][pairs of heads][kPair]
  BulkBarrier* barriers;  // [stages][warps]
  Slot* slots;

  FL_DEVICE Shared(int num_stages, int num_pairs) {
    tiles = dynamic_shared();
    parts = reinterpret_cast<float*>(tiles + num_stages * S::kWarps * S::kTile);
    barriers = reinterpret_cast<BulkBarrier*>(parts + S::kWarps * num_pairs * S::kPair);
    slots = reinterpret_cast<Slot*>(barriers + num_stages * S::kWarps);
  }
  FL_DEVICE char* tile(int stage, int warp) const { return tiles + (stage * S::kWarps + warp) * S::kTile; }
  FL_DEVICE BulkBarrier& barrier(int stage, int warp) const { return barriers[stage * S::kWarps + warp]; }
};

// Fills the block's list of slots. A slot in which no token of a batch is has no runs; a token without keys has one.
FL_DEVICE void list_slots(const BulkArgs& a, Slot* slots) {
  const int count = a.slots_end - a.first_slot;
  for (int i = threadIdx.x; i < count; i += blockDim.x) slots[i] = {};
  __syncthreads();
  for (int seq = threadIdx.x; seq < a.num_seqs; seq += blockDim.x) {
    const int begin = a.query_start[seq], num_tokens = a.query_start[seq + 1] - begin, length = a.seq_lens[seq];
    if (a.is_mixed && num_tokens != 1) continue;
    for (int token = 0; token < num_tokens; ++token) {
      const int slot = (a.is_mixed ? seq : begin + token) - a.first_slot, position = length - num_tokens + token;
      if (slot < 0 || slot >= count) continue;
      const int num_splits = Cut(position, a.window, static_cast<int>(a.num_splits)).num_splits;
      const int num_runs = num_splits > 0 ? (num_splits + a.run - 1) / a.run : 1;
      slots[slot] = {position, static_cast<uint16_t>(seq), static_cast<uint16_t>(num_runs)};
    }
  }
  __syncthreads();
}

// Has L2 fetch the queries and the lines of the block table of this block's share of the slots. Keys and values do not
// evict them; without this, most units would begin with waiting for memory behind all copies under way.
template <int kDim>
FL_DEVICE void prefetch_slots(const BulkArgs& a, const Slot* slots) {
  constexpr int kLine = 128, kHeadLines = kDim * 2 / kLine;
  const int count = a.slots_end - a.first_slot, num_q = static_cast<int>(a.num_heads) * kHeadLines;
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    if (slots[i].num_runs == 0) continue;
    const int64_t seq = slots[i].seq, at = a.is_mixed ? a.query_start[seq] : a.first_slot + i;
    const char* q = static_cast<const char*>(a.q) + 2 * at * a.q_token;
    const auto* table = reinterpret_cast<const char*>(a.block_table + seq * a.table_stride);
    const int num_table = (slots[i].position >> a.block_shift) * 4 / kLine + 1;
    for (int k = threadIdx.x; k < num_q + num_table; k += blockDim.x)
      prefetch(k < num_q ? q + 2 * (k / kHeadLines * a.q_head) + k % kHeadLines * kLine : table + (k - num_q) * kLine);
  }
}

// Goes through this block's units: the splits of a run are [low, high) of the keys [cut.first, cut.end) that are seen.
struct Units {
  const BulkArgs& a;
  const Slot* slots;
  int num_parts, step_runs, step_parts;  // groups of query heads that share keys; what the next unit is ahead
  int of_all, part;  // runs of all slots before the unit; its group
  int slot = 0, before = 0;  // `before`: runs of all slots before this one
  int run = 0, low = 0, high = 0;
  Cut cut;

  FL_DEVICE Units(const BulkArgs& a, const Slot* slots, int num_parts)
      : a(a), slots(slots), num_parts(num_parts), cut(0, 1, 1) {
    const int block = static_cast<int>(blockIdx.x), step = static_cast<int>(gridDim.x);
    step_runs = step / num_parts;
    step_parts = step % num_parts;
    of_all = block / num_parts - step_runs;
    part = block % num_parts - step_parts;
  }

  // Moves to the next unit; false if there is none.
  FL_DEVICE bool next() {
    const int count = a.slots_end - a.first_slot;
    of_all += step_runs;
    part += step_parts;
    if (part >= num_parts) {
      part -= num_parts;
      ++of_all;
    }
    while (slot < count && of_all >= before + slots[slot].num_runs) before += slots[slot++].num_runs;
    if (slot == count) return false;
    run = of_all - before;
    cut = Cut(slots[slot].position, a.window, static_cast<int>(a.num_splits));
    low = cut.start + run * a.run * cut.split;
    high = low + a.run * cut.split < cut.end ? low + a.run * cut.split : cut.end;
    return true;
  }
};

// Copies the tiles of a warp, one after the other, through all of the block's units. Half of the lanes copy keys, the
// others values, each a piece: those of a tile's keys that lie in one block. The lanes look up sixteen pieces at once.
template <class Cache, int kDim>
struct Copier {
  static constexpr int kStep = Sizes<Cache, kDim>::kWarps * kKeys;
  Units units;
  int warp, lane, rows_shift, num_pieces;  // log2 of a piece's keys; pieces of a tile
  bool is_there = false;
  int base = 0;  // the tile's first key
  int entry = -1, used = 0;  // cache block of the lane's piece, -1: not seen; pieces before the tile's
  const int32_t* table = nullptr;
  const Cache* from = nullptr;
  int64_t block_stride;

  FL_DEVICE Copier(const Units& units, int warp, int lane) : units(units), warp(warp), lane(lane) {
    const BulkArgs& a = units.a;
    rows_shift = a.block_shift < 4 ? static_cast<int>(a.block_shift) : 4;
    num_pieces = kKeys >> rows_shift;
    block_stride = lane < kKeys ? a.k_block : a.v_block;
    start_unit();
  }

  // Goes on to the next unit that has a tile for this warp.
  FL_DEVICE void start_unit() {
    const BulkArgs& a = units.a;
    while ((is_there = units.next())) {
      base = units.low + warp * kKeys;
      if (base < units.high) break;
    }
    if (is_there) {
      const int64_t kv_head = units.part >> groups_shift(a);
      table = a.block_table + units.slots[units.slot].seq * a.table_stride;
      from = lane < kKeys ? static_cast<const Cache*>(a.k_cache) + kv_head * a.k_head
                          : static_cast<const Cache*>(a.v_cache) + kv_head * a.v_head;
    }
    look_up();
  }

  // Of this tile and those behind it in the unit.
  FL_DEVICE void look_up() {
    const int piece = lane % kKeys, in_tile = piece & (num_pieces - 1), tile = piece >> (4 - rows_shift);
    const int key = base + tile * kStep + (in_tile << rows_shift);
    const bool is_seen = is_there && key + (1 << rows_shift) > units.cut.first && key < units.high;
    entry = is_seen ? table[key >> units.a.block_shift] : -1;
    used = 0;
  }

  // Pieces of the tile with a key that is seen.
  FL_DEVICE int num_seen() const {
    const int left = units.high - base, end = left < kKeys ? left : kKeys;
    const int first = units.cut.first > base ? units.cut.first - base : 0;
    return ((end + (1 << rows_shift) - 1) >> rows_shift) - (first >> rows_shift);
  }

  // Starts the copies of the next tile to shared memory that no lane reads any more.
  FL_DEVICE void copy(char* to, BulkBarrier& barrier) {
    if (!is_there) return;
    const int bytes = static_cast<int>(sizeof(Cache)) * kDim << rows_shift;
    const int piece = lane % kKeys, block = shuffle(entry, used + (piece & (num_pieces - 1)));
    sync_warp();
    if (lane == 0) arrive_expecting(barrier, 2 * bytes * num_seen());
    sync_warp();
    if (block >= 0 && piece < num_pieces) {
      const int mask = (1 << units.a.block_shift) - 1;
      const Cache* row = from + block * block_stride + ((base + (piece << rows_shift)) & mask) * kDim;
      copy_bulk_once(to + lane / kKeys * Sizes<Cache, kDim>::kHalf + piece * bytes, row, bytes, barrier);
    }
    base += kStep;
    used += num_pieces;
    if (base >= units.high) start_unit();
    else if (used == kKeys) look_up();
  }
};

}  // namespace
}  // namespace fuseline::cuda
