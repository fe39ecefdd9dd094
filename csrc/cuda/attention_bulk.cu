// Decode attention whose keys and values come by bulk copies (sm_90 and later); attention.cu describes the products.
//
// One block a multiprocessor takes turns at units: a `run` of neighbouring splits of one token for the query heads of
// one kv head. A tile is 16 keys and their values, as they lie in their blocks. Each warp has its own ring of tiles in
// shared memory and refills a tile as soon as it is read, with one of the next unit where the unit ends: copies go on
// while results are merged.
//
// The order of a row's sums depends on its sequence alone: the warps share the tiles of a split round-robin and are
// merged after each split; four splits are merged in ascending order, then these results. Neither `run` nor the number
// of blocks changes a bit.
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

// Fills the block's list of slots. Where no token of a batch is in a slot, it has no runs; a token without keys has one.
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

template <class V>
FL_DEVICE void swap_if(bool is_swapped, V& a, V& b) {
  const V first = a, second = b;
  a = is_swapped ? second : first;
  b = is_swapped ? first : second;
}

// Result of a warp for a split: `state` belongs to head g, its sum is this lane's share. acc[4 c + j] holds dims
// 8 piece_of(g, c) + 2 j and the next, for heads 2 t and 2 t + 1.
template <class T, class Cache, int kDim>
struct Partial {
  using Eight = typename Raw<Cache>::Type;
  static constexpr int kKeyLoads = kDim / 32, kValueLoads = kDim / 64, kRow = kDim / 8;
  SoftmaxState state{kNone, 0.0f};
  float acc[kDim / 16][4] = {};

  static FL_DEVICE int piece_of(int g, int c) { return kValueLoads == 1 ? g : 16 * (c / 2) + 2 * g + c % 2; }

  // Scores of head g and the keys 8 n + 2 t and the next, before the scale. The rows of all keys begin at the same bank:
  // lanes of odd keys load the chunks of a pair in turned order.
  static FL_DEVICE void multiply_keys(const Eight* keys, const uint4 (&q)[kKeyLoads], int lane, float (&scores)[2][4]) {
    const int g = lane / 4, t = lane % 4, odd = g & 1;
    float others[2][4] = {};  // two chains of products are shorter than one
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int c = 0; c < kKeyLoads; c += 2) {
        const Eight* row = keys + (8 * n + g) * kRow + 4 * c + t;
        Eight first = row[4 * odd], second = row[4 - 4 * odd];
        swap_if(odd, first, second);
        const uint4 k[2] = {operand<T, Cache>(first), operand<T, Cache>(second)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma(scores[n], {q[c + i].x, 0, q[c + i].y, 0}, {k[i].x, k[i].y}, T{});
          mma(others[n], {q[c + i].z, 0, q[c + i].w, 0}, {k[i].z, k[i].w}, T{});
        }
      }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) scores[n][j] += others[n][j];
  }

  // Replaces scores by exp2(score - maximum) as operands, and gives the factor that earlier sums shrink by.
  template <class IsSeen>
  FL_DEVICE float soften(const BulkArgs& a, float scale, int t, float (&scores)[2][4], const IsSeen& is_seen,
                         uint32_t (&p)[2]) {
    float top = kNone;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x = scores[n][j] * scale;
        if (a.softcap > 0.0f) x = a.softcap * tanhf(x / a.softcap);
        scores[n][j] = is_seen(8 * n + 2 * t + j) ? x : kNone;
        top = fmaxf(top, scores[n][j]);
      }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(fmaxf(top, shuffle_xor(top, 2)), state.max);
    const float finite = top == kNone ? 0.0f : top, shrink = exp2f(state.max - finite);
    state.max = top;
    state.sum *= shrink;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float x = exp2f(scores[n][0] - finite), y = exp2f(scores[n][1] - finite);
      state.sum += x + y;
      p[n] = pack<T>(x, y);
    }
    return shrink;
  }

  // Adds p times the values. Those of keys that are not seen may be anything, NaN as well.
  template <class IsSeen>
  FL_DEVICE void add_values(const Eight* values, int lane, float shrink, const uint32_t (&p)[2], bool is_whole,
                            const IsSeen& is_seen) {
    constexpr int kTogether = kValueLoads == 1 ? 1 : 2;
    const int g = lane / 4, t = lane % 4, odd = t & 1;
    const float shrinks[2] = {shuffle(shrink, 8 * t), shuffle(shrink, 8 * t + 4)};
#pragma unroll
    for (int begin = 0; begin < kValueLoads; begin += kTogether) {
      uint4 v[kTogether][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int key = 2 * t + n % 2 + n / 2 * 8;
        Eight raw[2];
#pragma unroll
        for (int c = 0; c < kTogether; ++c)
          raw[c] = values[key * kRow + piece_of(g, begin + (kTogether == 1 ? 0 : c ^ odd))];
        if (kTogether == 2) swap_if(odd, raw[0], raw[1]);
#pragma unroll
        for (int c = 0; c < kTogether; ++c) v[c][n] = operand<T, Cache>(raw[c]);
      }
      if (!is_whole) {
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int c = 0; c < kTogether; ++c)
            if (!is_seen(2 * t + n % 2 + n / 2 * 8)) v[c][n] = {0, 0, 0, 0};
      }
#pragma unroll
      for (int c = 0; c < kTogether; ++c) add_chunk(acc + 4 * (begin + c), v[c], shrinks, p);
    }
  }

  // 64 dims of the values of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
  static FL_DEVICE void add_chunk(float (*sums)[4], const uint4 (&v)[4], const float (&shrinks)[2],
                                  const uint32_t (&p)[2]) {
    const uint32_t words[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w}, {v[1].x, v[1].y, v[1].z, v[1].w},
                                  {v[2].x, v[2].y, v[2].z, v[2].w}, {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[j][r] *= shrinks[r % 2];
      mma(sums[j], {low_halves(words[0][j], words[1][j]), high_halves(words[0][j], words[1][j]),
                    low_halves(words[2][j], words[3][j]), high_halves(words[2][j], words[3][j])}, p, T{});
    }
  }

  // Adds the tile of keys [base, base + 16), of which [first, high) are seen.
  FL_DEVICE void add(const BulkArgs& a, const char* tile, const uint4 (&q)[kKeyLoads], float scale, int lane, int base,
                     int first, int high) {
    const auto is_seen = [=](int key) { return base + key >= first && base + key < high; };
    const auto* keys = reinterpret_cast<const Eight*>(tile);
    float scores[2][4] = {};
    multiply_keys(keys, q, lane, scores);
    uint32_t p[2];
    const float shrink = soften(a, scale, lane % 4, scores, is_seen, p);
    add_values(keys + kKeys * kRow, lane, shrink, p, base >= first && base + kKeys <= high, is_seen);
  }

  // Writes the warp's parts.
  FL_DEVICE void publish(float* parts, int lane, int num_pairs) {
    constexpr int kPair = Sizes<Cache, kDim>::kPair;
    const int g = lane / 4, t = lane % 4;
    float sum = state.sum + shuffle_xor(state.sum, 1);
    sum += shuffle_xor(sum, 2);
    if (t == 0 && g < 2 * num_pairs) {
      parts[g / 2 * kPair + 2 * kDim + g % 2 * 2] = state.max;
      parts[g / 2 * kPair + 2 * kDim + g % 2 * 2 + 1] = sum;
    }
    if (t >= num_pairs) return;
#pragma unroll
    for (int head = 0; head < 2; ++head)
#pragma unroll
      for (int j = 0; j < kDim / 16; j += 2) {
        float* to = parts + t * kPair + head * kDim + 8 * piece_of(g, j / 4) + 2 * (j % 4);
        store(to, {acc[j][head], acc[j][head + 2], acc[j + 1][head], acc[j + 1][head + 2]});
      }
  }
};

// Merges one dim of a head over the warps, and that into the results of the splits before.
template <class Cache, int kDim>
FL_DEVICE void merge_warps(const float* parts, int num_pairs, int head, int dim, SoftmaxState& whole, float& value) {
  using S = Sizes<Cache, kDim>;
  const float* of_head = parts + head / 2 * S::kPair;
  float tops[S::kWarps], top = kNone;
#pragma unroll
  for (int w = 0; w < S::kWarps; ++w) {
    tops[w] = of_head[w * num_pairs * S::kPair + 2 * kDim + head % 2 * 2];
    top = fmaxf(top, tops[w]);
  }
  const float finite = top == kNone ? 0.0f : top;
  SoftmaxState split{top, 0.0f};
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < S::kWarps; ++w) {
    const float weight = exp2f(tops[w] - finite);
    split.sum = fmaf(of_head[w * num_pairs * S::kPair + 2 * kDim + head % 2 * 2 + 1], weight, split.sum);
    sum = fmaf(of_head[w * num_pairs * S::kPair + head % 2 * kDim + dim], weight, sum);
  }
  fold(whole, value, split, sum);
}

// What a thread merges of a unit: dims of heads, entry by entry.
template <class T, class Cache, int kDim>
struct Results {
  using S = Sizes<Cache, kDim>;
  static constexpr int kEntries = S::kHasRuns ? kHeads * kDim / S::kThreads : 1;
  int num_pairs, num_heads;
  int64_t at, slot, first_head;
  SoftmaxState wholes[kEntries];
  float values[kEntries];

  FL_DEVICE void clear() {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      wholes[e] = {kNone, 0.0f};
      values[e] = 0.0f;
    }
  }

  // Merges a split of all warps into the results of those before.
  FL_DEVICE void add(const float* parts) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int entry = static_cast<int>(threadIdx.x) + e * S::kThreads, head = entry / kDim;
      if (head < num_heads) merge_warps<Cache, kDim>(parts, num_pairs, head, entry % kDim, wholes[e], values[e]);
    }
  }

  FL_DEVICE void write(const BulkArgs& a, int run, int num_runs) const {
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
      write_entry(a, static_cast<int>(threadIdx.x) + e * S::kThreads, run, num_runs, wholes[e], values[e]);
  }

  FL_DEVICE void write_entry(const BulkArgs& a, int entry, int run, int num_runs, SoftmaxState whole,
                             float value) const {
    const int head = entry / kDim, dim = entry % kDim;
    if (head >= num_heads) return;
    if (num_runs == 1) finish<T>(a, at, first_head + head, dim, whole, value);
    else keep_partial<kDim>(a, slot, first_head + head, run, dim, whole, value);
  }

  // Merges the only split of a unit and writes it.
  FL_DEVICE void write_split(const BulkArgs& a, const float* parts, int run, int num_runs) const {
    for (int entry = threadIdx.x; entry < num_heads * kDim; entry += S::kThreads) {
      SoftmaxState whole{kNone, 0.0f};
      float value = 0.0f;
      merge_warps<Cache, kDim>(parts, num_pairs, entry / kDim, entry % kDim, whole, value);
      write_entry(a, entry, run, num_runs, whole, value);
    }
  }
};

// Grid: one block a multiprocessor.
template <class T, class Cache, int kDim>
__global__ void __launch_bounds__(Sizes<Cache, kDim>::kThreads, 1) bulk_decode_kernel(const BulkArgs a) {
  using S = Sizes<Cache, kDim>;
  using Part = Partial<T, Cache, kDim>;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int group = static_cast<int>(a.group), shift = groups_shift(a);
  Results<T, Cache, kDim> results;
  results.num_pairs = ((group < kHeads ? group : kHeads) + 1) / 2;
  const Shared<Cache, kDim> shared(a.num_stages, results.num_pairs);
  if (thread < a.num_stages * S::kWarps) init(shared.barriers[thread], 1);
  show_barriers();
  launch_dependents();
  wait_for_prerequisites();
  list_slots(a, shared.slots);  // all threads see the barriers behind its own

  Units units(a, shared.slots, static_cast<int>(a.num_heads) / group << shift);
  Copier<Cache, kDim> copier(units, warp, lane);
  for (int stage = 0; stage < a.num_stages; ++stage) copier.copy(shared.tile(stage, warp), shared.barrier(stage, warp));
  prefetch_slots<kDim>(a, shared.slots);
  const float scale = a.k_scale ? a.scale * *a.k_scale : a.scale;
  int stage = 0, parity = 0;
  while (units.next()) {
    const Slot slot = shared.slots[units.slot];
    const int in_group = (units.part & shift) * kHeads;
    results.num_heads = group - in_group < kHeads ? group - in_group : kHeads;
    results.first_head = (units.part >> shift) * group + in_group;
    results.slot = a.first_slot + units.slot;
    results.at = a.is_mixed ? a.query_start[slot.seq] : results.slot;
    uint4 q[Part::kKeyLoads];  // missing heads repeat the first; their results are discarded
    const int64_t head = results.first_head + (lane / 4 < results.num_heads ? lane / 4 : 0);
    const T* from = static_cast<const T*>(a.q) + results.at * a.q_token + head * a.q_head + 8 * (lane % 4);
#pragma unroll
    for (int c = 0; c < Part::kKeyLoads; ++c) q[c] = *reinterpret_cast<const uint4*>(from + 32 * c);
    results.clear();
    int low = units.low;
    do {  // at least once, so that a token without keys gets its zeros
      const int high = low + units.cut.split < units.high ? low + units.cut.split : units.high;
      Part part;
      for (int base = low + warp * kKeys; base < high; base += S::kWarps * kKeys) {
        BulkBarrier& barrier = shared.barrier(stage, warp);
        wait_for(barrier, parity);
        part.add(a, shared.tile(stage, warp), q, scale, lane, base, units.cut.first, high);
        copier.copy(shared.tile(stage, warp), barrier);
        stage = stage == a.num_stages - 1 ? 0 : stage + 1;
        parity ^= stage == 0;
      }
      part.publish(shared.parts + warp * results.num_pairs * S::kPair, lane, results.num_pairs);
      __syncthreads();
      if (S::kHasRuns) results.add(shared.parts);
      else results.write_split(a, shared.parts, units.run, slot.num_runs);
      __syncthreads();  // the parts are no longer read
      low += units.cut.split;
    } while (S::kHasRuns && low < units.high);
    if (S::kHasRuns) results.write(a, units.run, slot.num_runs);
  }
}

// As many slots a launch as there is shared memory for, in launches of about the same size.
template <class T, class Cache, int kDim>
int launch_bulk(BulkArgs a, int64_t num_workers, Stream stream) {
  using S = Sizes<Cache, kDim>;
  if (!S::kHasRuns && a.run > 1) return kBadArgument;
  const int64_t num_groups = (a.group + kHeads - 1) / kHeads, of_slot = a.num_heads / a.group * num_groups;
  const int num_pairs = static_cast<int>((a.group < kHeads ? a.group : kHeads) + 1) / 2;
  const int free_bytes = kSharedBytes - S::parts_bytes(num_pairs) - 256 * static_cast<int>(sizeof(Slot));
  a.num_stages = free_bytes / S::stage_bytes() < kMaxStages ? free_bytes / S::stage_bytes() : kMaxStages;
  const int used = S::parts_bytes(num_pairs) + a.num_stages * S::stage_bytes();
  const int64_t most = (kSharedBytes - used) / static_cast<int>(sizeof(Slot));
  const int64_t num_launches = (a.num_slots + most - 1) / most;
  const int64_t num_runs = (a.num_splits + a.run - 1) / a.run;
  for (int64_t i = 0; i < num_launches; ++i) {
    a.first_slot = static_cast<int>(a.num_slots * i / num_launches);
    a.slots_end = static_cast<int>(a.num_slots * (i + 1) / num_launches);
    const int count = a.slots_end - a.first_slot;
    const int64_t num_units = count * of_slot * num_runs, num_blocks = num_units < num_workers ? num_units : num_workers;
    const int shared_bytes = used + count * static_cast<int>(sizeof(Slot));
    const int error = launch(bulk_decode_kernel<T, Cache, kDim>, dim3(static_cast<unsigned>(num_blocks)), S::kThreads,
                             stream, a, Overlap::kHeads, shared_bytes);
    if (error) return error;
  }
  return 0;
}

}  // namespace

int decode_by_bulk(const AttentionArgs& args, const DecodeAttentionCall& c, Stream stream) {
  BulkArgs a{};
  static_cast<AttentionArgs&>(a) = args;
  a.num_seqs = static_cast<int>(c.num_seqs);
  const int64_t num_workers = c.num_workers ? c.num_workers : num_processors();
  if (!num_workers) return kBadArgument;
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    return with_cache<T>(c.cache_dtype, c.dtype, [&](auto cache) {
      using Cache = decltype(cache);
      switch (c.dim) {
        case 64: return launch_bulk<T, Cache, 64>(a, num_workers, stream);
        case 128: return launch_bulk<T, Cache, 128>(a, num_workers, stream);
        case 256: return launch_bulk<T, Cache, 256>(a, num_workers, stream);
        default: return kBadArgument;
      }
    });
  });
}

}  // namespace fuseline::cuda
