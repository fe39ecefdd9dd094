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
#include "cuda/attention_bulk.h"

namespace fuseline::cuda {
namespace {

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

  // Scores of head g and the keys 8 n + 2 t and the next, before the scale. All keys' rows begin at the same bank:
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
    const float shrink = soften<T>(state, scale, a.softcap, 2 * (lane % 4), scores, is_seen, p);
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
    const int64_t num_units = count * of_slot * num_runs;
    const int64_t num_blocks = num_units < num_workers ? num_units : num_workers;
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
