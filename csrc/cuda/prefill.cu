// Attention of prompts over a paged KV cache, for sm_90a: warp-group matrix instructions.
//
// A block takes a tile of 128 rows: the query heads of one kv head times some neighbouring tokens of one sequence. Two
// warp groups compute 64 rows each, taking turns in issuing products, so that one's softmax runs beside the other's
// products; a third copies keys (its first two warps) and values (the others) to rings of tiles in shared memory.
// A row's keys are summed from the first to the last, a tile of 128 keys at a time, and tiles that it does not see leave
// it as it is: its bits are the same in any tile and batch.
//
// Tiles of queries, keys and values lie in shared memory as chunks of 64 columns; a chunk has 128 bytes a row, swizzled
// (operand_descriptor). Queries and keys are read along their rows, values across.
//
// Legend: H query heads, G per kv head, D head dim, B keys per block; lane = (g = lane / 4, t = lane % 4).
#include "cuda/hopper.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kTileRows = 128, kTileKeys = 128, kStages = 2, kThreads = 3 * kGroup;
constexpr int kLine = 128;  // bytes of a row of a chunk
constexpr int kCopiers = 64;  // threads that copy keys; as many copy values
constexpr float kNone = -INFINITY;
constexpr uint32_t kAbsent = 0xffffffff;

struct PrefillArgs {
  void* out;
  const void *q, *k_cache, *v_cache;
  const int32_t *block_table, *seq_lens, *query_start;
  const void* sinks;
  int num_seqs, group, tokens;  // `tokens` of a tile
  int64_t out_token, out_head, q_head, q_token, k_head, v_head, table_stride;
  uint32_t k_block, k_token, v_block, v_token;  // in units of eight numbers
  int block_shift, window;
  float scale;  // times log2(e)
};

template <int kDim>
struct alignas(1024) Shared {
  static constexpr int kQueryChunk = 64 * kLine, kKeyChunk = kTileKeys * kLine, kChunks = kDim / 64;
  unsigned char queries[2][kChunks * kQueryChunk];
  unsigned char keys[kStages][kChunks * kKeyChunk];
  unsigned char values[kStages][kChunks * kKeyChunk];
  BulkBarrier full_keys[kStages], free_keys[kStages], full_values[kStages], free_values[kStages];
};

// A block's work. Keys are tiles [first_tile, end_tile); those outside [first, end) are not read.
struct Work {
  int seq, begin, token, num_tokens, position, first, end, first_tile, end_tile;
};

FL_DEVICE int warp_sum_int(int x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sequence that the block's tile of tokens belongs to; tiles are counted from the end, as late ones see most keys.
// Returns whether the tile is one of several tokens.
FL_DEVICE bool find_work(const PrefillArgs& a, int tile, Work& w) {
  const int lane = threadIdx.x % kWarp;
  int before = 0, seq = -1;
  for (int base = 0; base < a.num_seqs && seq < 0; base += kWarp) {
    const int s = base + lane;
    const int count = s < a.num_seqs ? a.query_start[s + 1] - a.query_start[s] : 0;
    int total = (count + a.tokens - 1) / a.tokens;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = shuffle(total, lane >= step ? lane - step : lane);
      if (lane >= step) total += other;
    }
    const int passed = warp_sum_int(before + total <= tile);
    const int last = shuffle(total, passed == 0 ? 0 : passed - 1), whole = shuffle(total, kWarp - 1);
    if (passed < kWarp) {
      seq = base + passed;
      w.token = (tile - before - (passed == 0 ? 0 : last)) * a.tokens;
    }
    before += whole;
  }
  if (seq < 0 || seq >= a.num_seqs) return false;
  seq = shuffle(seq, 0);
  w.token = shuffle(w.token, 0);
  w.seq = seq;
  w.begin = a.query_start[seq];
  const int count = a.query_start[seq + 1] - w.begin, length = a.seq_lens[seq];
  w.num_tokens = count - w.token < a.tokens ? count - w.token : a.tokens;
  w.position = length - count + w.token;
  w.first = w.position - a.window + 1 > 0 ? w.position - a.window + 1 : 0;
  w.end = w.position + w.num_tokens;
  w.first_tile = shuffle(w.first / kTileKeys, 0);
  w.end_tile = shuffle(w.end > 0 ? (w.end + kTileKeys - 1) / kTileKeys : w.first_tile, 0);
  return count > 1;
}

// Copies a tile of keys or values by two warps, a row by kDim / 8 neighbouring lanes. Rows that are not there are zeros.
template <class T, int kDim>
FL_DEVICE void copy_tile(unsigned char* to, const T* from, const int32_t* table, uint32_t block, uint32_t token,
                         int block_shift, const Work& w, int tile) {
  constexpr int kLanes = kDim / 8, kAtOnce = kWarp / kLanes;  // lanes of a row, rows of an instruction
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % 2, unit = lane % kLanes;
#pragma unroll 1
  for (int base = 64 * warp; base < 64 * warp + 64; base += kWarp) {
    const int key = tile * kTileKeys + base + lane;
    uint32_t place = kAbsent;
    if (key >= w.first && key < w.end)
      place = static_cast<uint32_t>(table[key >> block_shift]) * block +
              static_cast<uint32_t>(key & ((1 << block_shift) - 1)) * token;
#pragma unroll 4
    for (int n = 0; n < kWarp; n += kAtOnce) {
      const int row = base + n + lane / kLanes;
      const uint32_t at = shuffle(place, n + lane / kLanes);
      const bool is_there = at != kAbsent;
      unsigned char* line = to + unit / 8 * Shared<kDim>::kKeyChunk + row * kLine + ((unit % 8) ^ (row % 8)) * 16;
      copy_async(reinterpret_cast<uint4*>(line), from + (is_there ? int64_t{8} * at + 8 * unit : 0), is_there);
    }
  }
  close_group();
}

template <class T, int kDim>
FL_DEVICE void copy_tiles(const PrefillArgs& a, const Work& w, int64_t kv_head, Shared<kDim>& shared) {
  const bool is_key = threadIdx.x % kGroup < kCopiers;
  const T* from = is_key ? static_cast<const T*>(a.k_cache) + kv_head * a.k_head
                         : static_cast<const T*>(a.v_cache) + kv_head * a.v_head;
  const uint32_t block = is_key ? a.k_block : a.v_block, token = is_key ? a.k_token : a.v_token;
  BulkBarrier* full = is_key ? shared.full_keys : shared.full_values;
  BulkBarrier* free = is_key ? shared.free_keys : shared.free_values;
  unsigned char* ring = is_key ? shared.keys[0] : shared.values[0];
  const int32_t* table = a.block_table + w.seq * a.table_stride;
  for (int tile = w.first_tile; tile < w.end_tile; ++tile) {
    const int turn = tile - w.first_tile, stage = turn % kStages;
    wait_for(free[stage], turn / kStages % 2 ^ 1);
    copy_tile<T, kDim>(ring + stage * sizeof(shared.keys[0]), from, table, block, token, a.block_shift, w, tile);
    wait_groups<0>();
    fence_shared_writes();
    arrive(full[stage]);
  }
}

// One warp group's rows: scores s of the present tile, weights p of it as the next product's operand, results o.
template <class T, int kDim>
struct Rows {
  float s[kTileKeys / 2], o[kDim / 2], top[2], sum[2];
  uint32_t p[kTileKeys / 16][4];

  FL_DEVICE void issue_scores(uint32_t queries, uint32_t keys) {
    using S = Shared<kDim>;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
      product(s, operand_descriptor(queries + k / 4 * S::kQueryChunk + k % 4 * 32, 8 * kLine, 16),
              operand_descriptor(keys + k / 4 * S::kKeyChunk + k % 4 * 32, 8 * kLine, 16), k > 0, T{});
  }

  FL_DEVICE void issue_values(uint32_t values) {
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k)
      product(o, p[k], operand_descriptor(values + k * 16 * kLine, 8 * kLine, Shared<kDim>::kKeyChunk), true, T{});
  }

  // Hides keys from `base` on that the rows at these positions do not see.
  FL_DEVICE void mask(int base, const int (&position)[2], int window) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int key = base + 8 * j + 2 * t + r % 2, at = position[r / 2];
        if (key > at || key <= at - window) s[4 * j + r] = kNone;
      }
  }

  // Turns scores into weights; returns by which factor earlier results shrink.
  FL_DEVICE float2 weigh(float scale) {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = s[2 * r];
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) most = fmaxf(most, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(fmaxf(most, shuffle_xor(most, 2)), top[r]);
      const float finite = most == kNone ? 0.0f : most, base = finite * scale;
      shrink[r] = fast_exp2(fmaf(top[r], scale, -base));
      top[r] = most;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j)
#pragma unroll
        for (int i = 4 * j + 2 * r; i < 4 * j + 2 * r + 2; ++i) {
          s[i] = fast_exp2(fmaf(s[i], scale, -base));
          total += s[i];
        }
      sum[r] = fmaf(sum[r], shrink[r], total);
    }
    return {shrink[0], shrink[1]};
  }

  FL_DEVICE void pack_weights() {
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k)
#pragma unroll
      for (int r = 0; r < 4; ++r) p[k][r] = pack_two(s[8 * k + 2 * r], s[8 * k + 2 * r + 1], T{});
  }

  FL_DEVICE void shrink(float2 by) {
#pragma unroll
    for (int j = 0; j < kDim / 2; ++j) o[j] *= j % 4 < 2 ? by.x : by.y;
  }
};

// Numbers of barriers: a warp group's turn to issue products, and that its queries have come.
FL_DEVICE int turn_of(int part) { return 1 + part; }
FL_DEVICE int queries_of(int part) { return 3 + part; }

template <class T, int kDim>
FL_DEVICE void attend(const PrefillArgs& a, const Work& w, int64_t kv_head, int part, Shared<kDim>& shared) {
  using S = Shared<kDim>;
  const int thread = threadIdx.x % kGroup, warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
  for (int copy = thread; copy < 64 * kDim / 8; copy += kGroup) {
    const int row = copy / (kDim / 8), unit = copy % (kDim / 8), whole = 64 * part + row, token = whole / a.group;
    const bool is_row = token < w.num_tokens;
    const T* from = static_cast<const T*>(a.q);
    if (is_row)
      from += (w.begin + w.token + token) * a.q_token + (kv_head * a.group + whole % a.group) * a.q_head + 8 * unit;
    unsigned char* to = shared.queries[part] + unit / 8 * S::kQueryChunk + row * kLine + ((unit % 8) ^ (row % 8)) * 16;
    copy_async(reinterpret_cast<uint4*>(to), from, is_row);
  }
  close_group();
  wait_groups<0>();
  fence_shared_writes();
  sync_some(queries_of(part), kGroup);

  const int row = 64 * part + 16 * warp + g;
  const int position[2] = {w.position + row / a.group, w.position + (row + 8) / a.group};
  const int last = w.position + w.num_tokens - 1, num_tiles = w.end_tile - w.first_tile;
  const uint32_t queries = shared_address(shared.queries[part]);
  Rows<T, kDim> rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.top[r] = kNone;
    rows.sum[r] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < kDim / 2; ++j) rows.o[j] = 0.0f;
  const auto weigh = [&](int turn) {
    const int base = (w.first_tile + turn) * kTileKeys;
    if (base + kTileKeys - 1 > w.position || base <= last - a.window) rows.mask(base, position, a.window);
    return rows.weigh(a.scale);
  };
  if (num_tiles > 0) {
    if (part == 1) arrive_some(turn_of(0), 2 * kGroup);
    wait_for(shared.full_keys[0], 0);
    sync_some(turn_of(part), 2 * kGroup);
    begin_products();
    rows.issue_scores(queries, shared_address(shared.keys[0]));
    close_products();
    if (part == 0 || num_tiles > 1) arrive_some(turn_of(1 - part), 2 * kGroup);
    wait_products<0>();
    settle(rows.s);
    if (lane == 0) arrive(shared.free_keys[0]);
    weigh(0);
    rows.pack_weights();
#pragma unroll 1
    for (int turn = 1; turn < num_tiles; ++turn) {
      const int stage = turn % kStages, before = (turn - 1) % kStages;
      wait_for(shared.full_keys[stage], turn / kStages % 2);
      sync_some(turn_of(part), 2 * kGroup);
      begin_products();
      rows.issue_scores(queries, shared_address(shared.keys[stage]));
      close_products();
      wait_for(shared.full_values[before], (turn - 1) / kStages % 2);
      begin_products();
      rows.issue_values(shared_address(shared.values[before]));
      close_products();
      if (part == 0 || turn + 1 < num_tiles) arrive_some(turn_of(1 - part), 2 * kGroup);
      wait_products<1>();
      settle(rows.s);
      if (lane == 0) arrive(shared.free_keys[stage]);
      const float2 shrink = weigh(turn);
      wait_products<0>();
      settle(rows.o);
      if (lane == 0) arrive(shared.free_values[before]);
      rows.shrink(shrink);
      rows.pack_weights();
    }
    const int stage = (num_tiles - 1) % kStages;
    wait_for(shared.full_values[stage], (num_tiles - 1) / kStages % 2);
    begin_products();
    rows.issue_values(shared_address(shared.values[stage]));
    close_products();
    wait_products<0>();
    settle(rows.o);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int whole = row + 8 * r, token = whole / a.group;
    const int64_t head = kv_head * a.group + whole % a.group;
    float factor = 1.0f;
    if (token >= w.num_tokens) continue;
    if (a.sinks) {
      const float sink = to_float(static_cast<const T*>(a.sinks)[head]) * kLog2e, top = rows.top[r] * a.scale;
      const float most = fmaxf(top, sink);
      factor = exp2f(top - most);
      sum = fmaf(sum, factor, exp2f(sink - most));
    }
    factor /= sum == 0.0f ? 1.0f : sum;
    T* to = static_cast<T*>(a.out) + (w.begin + w.token + token) * a.out_token + head * a.out_head + 2 * t;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      *reinterpret_cast<uint32_t*>(to + 8 * j) =
          pack_two(rows.o[4 * j + 2 * r] * factor, rows.o[4 * j + 2 * r + 1] * factor, T{});
  }
}

// Grid: (kv head, tile of tokens).
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const PrefillArgs a) {
  launch_dependents();
  wait_for_prerequisites();
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(dynamic_shared());
  if (threadIdx.x == 0)
    for (int stage = 0; stage < kStages; ++stage) {
      init(shared.full_keys[stage], kCopiers);
      init(shared.full_values[stage], kCopiers);
      init(shared.free_keys[stage], 2 * kGroup / kWarp);
      init(shared.free_values[stage], 2 * kGroup / kWarp);
    }
  __syncthreads();
  // Each finds its work itself: what both roles hold would have to fit the copiers' few registers.
  const int tile = static_cast<int>(gridDim.y - 1 - blockIdx.y);
  Work work{};
  const int part = shuffle(static_cast<int>(threadIdx.x / kGroup), 0);  // known to the compiler to be one of a warp
  if (part == 2) {
    fewer_registers<40>();
    if (find_work(a, tile, work)) copy_tiles<T, kDim>(a, work, blockIdx.x, shared);
  } else {
    more_registers<232>();
    if (find_work(a, tile, work)) attend<T, kDim>(a, work, blockIdx.x, part, shared);
  }
#endif
}

}  // namespace

int prefill_attention(Stream stream, const PrefillAttentionCall& c) {
  PrefillArgs a{};
  a.out = c.out;
  a.q = c.q;
  a.k_cache = c.k_cache;
  a.v_cache = c.v_cache;
  a.block_table = static_cast<const int32_t*>(c.block_table);
  a.seq_lens = static_cast<const int32_t*>(c.seq_lens);
  a.query_start = static_cast<const int32_t*>(c.query_start);
  a.sinks = c.sinks;
  a.num_seqs = static_cast<int>(c.num_seqs);
  a.group = static_cast<int>(c.num_heads / c.num_kv_heads);
  a.tokens = kTileRows / a.group;
  a.out_token = c.out_token;
  a.out_head = c.out_head;
  a.q_head = c.q_head;
  a.q_token = c.q_token;
  a.k_head = c.k_head;
  a.v_head = c.v_head;
  a.table_stride = c.table_stride;
  a.k_block = static_cast<uint32_t>(c.k_block / 8);
  a.k_token = static_cast<uint32_t>(c.k_token / 8);
  a.v_block = static_cast<uint32_t>(c.v_block / 8);
  a.v_token = static_cast<uint32_t>(c.v_token / 8);
  a.block_shift = static_cast<int>(c.block_shift);
  a.window = static_cast<int>(c.window);
  a.scale = static_cast<float>(c.scale) * kLog2e;
  const dim3 grid(static_cast<unsigned>(c.num_kv_heads), static_cast<unsigned>(c.num_tokens / a.tokens + c.num_seqs));
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    switch (c.dim) {
      case 64: return launch(prefill_kernel<T, 64>, grid, kThreads, stream, a, Overlap::kHeads, sizeof(Shared<64>));
      case 128: return launch(prefill_kernel<T, 128>, grid, kThreads, stream, a, Overlap::kHeads, sizeof(Shared<128>));
      default: return kBadArgument;
    }
  });
}

}  // namespace fuseline::cuda
