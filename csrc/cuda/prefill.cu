// Attention of prompts over a paged KV cache, for sm_90a: warp-group matrix instructions, copies by tensor maps.
//
// A tile has 128 rows: the query heads of one kv head times some neighbouring tokens of one sequence. Blocks stay and
// take tiles in turns. Two warp groups compute 64 rows of a tile each, taking turns in issuing products, so that one's
// softmax runs beside the other's products; of a third, a warp copies queries and keys and another values to shared
// memory, ahead of the products, across tiles of rows.
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

// Named, as compilers warn of what is unused in an unnamed one, and other GPUs use nothing of it.
namespace prefill {

inline constexpr int kTileRows = 128, kTileKeys = 128, kStages = 2, kThreads = 3 * kGroup;
inline constexpr int kLine = 128, kChunk = kTileKeys * kLine;  // bytes of a row of a chunk, of a chunk
inline constexpr int kComputingWarps = 2 * kGroup / kWarp;
inline constexpr float kNone = -INFINITY;
static_assert(kTileRows == kTileKeys);

struct PrefillArgs {
  TensorMap q, k, v;  // [D, H, T, 1] and [D, B, K, N] in boxes of a tile's rows, of one block's keys
  void* out;
  const int32_t *block_table, *seq_lens, *query_start;
  const void* sinks;
  int num_seqs, kv_heads, group, tokens;  // `tokens` of a tile
  int64_t out_token, out_head, table_stride;
  int block_shift, box_shift, window;  // log2 of B, and of the keys of a box
  float scale;  // times log2(e)
};

template <int kDim>
struct alignas(1024) Shared {
  static constexpr int kChunks = kDim / 64;
  struct Tile { char at[kChunks][kChunk]; };
  Tile queries, keys[kStages], values[kStages];
  BulkBarrier full_queries, free_queries, cut_values;
  BulkBarrier full_keys[kStages], free_keys[kStages], full_values[kStages], free_values[kStages];
};

// A tile of rows. Keys are tiles [first_tile, first_tile + num_tiles); those outside [first, end) are not seen.
struct Work {
  int seq, kv_head, begin, num_tokens, position, first, end, first_tile, num_tiles;
};

// Tiles of tokens of a sequence; one of a single token has none.
FL_DEVICE int tiles_of(const PrefillArgs& a, int seq) {
  const int count = seq < a.num_seqs ? a.query_start[seq + 1] - a.query_start[seq] : 0;
  return count > 1 ? (count + a.tokens - 1) / a.tokens : 0;
}

FL_DEVICE int count_tiles(const PrefillArgs& a) {
  int total = 0;
#pragma unroll 1
  for (int seq = threadIdx.x % kWarp; seq < a.num_seqs; seq += kWarp) total += tiles_of(a, seq);
  return warp_sum(total);
}

// The tile of tokens of this number. Lanes look at neighbouring sequences.
FL_DEVICE Work find_work(const PrefillArgs& a, int tile) {
  const int lane = threadIdx.x % kWarp;
  int seq = 0, passed = kWarp, before = 0;
#pragma unroll 1
  for (int base = 0; passed == kWarp; base += kWarp) {
    int total = tiles_of(a, base + lane);
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = shuffle(total, lane >= step ? lane - step : lane);
      if (lane >= step) total += other;
    }
    passed = warp_sum(before + total <= tile ? 1 : 0);
    seq = base + passed;
    before += passed > 0 ? shuffle(total, passed - 1) : 0;
  }
  seq = shuffle(seq, 0);  // known to the compiler to be the warp's
  const int token = shuffle(tile - before, 0) * a.tokens, begin = a.query_start[seq];
  const int count = a.query_start[seq + 1] - begin, position = a.seq_lens[seq] - count + token;
  Work w;
  w.seq = seq;
  w.begin = begin + token;
  w.num_tokens = count - token < a.tokens ? count - token : a.tokens;
  w.position = position;
  w.first = position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  w.end = position + w.num_tokens;
  w.first_tile = w.first / kTileKeys;
  w.num_tiles = shuffle(w.end > w.first ? (w.end + kTileKeys - 1) / kTileKeys - w.first_tile : 0, 0);
  return w;
}

// Calls f with each tile of rows of this block. Tiles go by from the last one, as late ones see most keys, to the blocks
// in ascending and descending order by turns, which gives each block as many keys.
template <class F>
FL_DEVICE void for_each_tile(const PrefillArgs& a, const F& f) {
  const int num_blocks = gridDim.x, number = blockIdx.x, total = count_tiles(a) * a.kv_heads;
  for (int round = 0, base = 0; base < total; ++round, base += num_blocks) {
    const int item = base + (round % 2 ? num_blocks - 1 - number : number);
    if (item >= total) continue;
    Work w = find_work(a, (total - 1 - item) / a.kv_heads);
    w.kv_head = item % a.kv_heads;
    f(w);
  }
}

// Starts the copies of a tile of keys or values by a warp, a box by each lane; blocks that no row sees are left out.
template <int kDim>
FL_DEVICE void copy_tile(typename Shared<kDim>::Tile& to, const TensorMap& from, const PrefillArgs& a, const Work& w,
                         int tile, BulkBarrier& barrier) {
  constexpr int kChunks = Shared<kDim>::kChunks;
  const int lane = threadIdx.x % kWarp, base = tile * kTileKeys, size = 1 << a.box_shift;
  const int low = w.first > base ? (w.first - base) >> a.box_shift : 0;
  const int high = ((w.end - base < kTileKeys ? w.end - base : kTileKeys) + size - 1) >> a.box_shift;
  if (lane == 0) arrive_expecting(barrier, (high - low) * kChunks * size * kLine);
  sync_warp();
  const int32_t* table = a.block_table + w.seq * a.table_stride;
#pragma unroll 1
  for (int copy = low * kChunks + lane; copy < high * kChunks; copy += kWarp) {
    const int box = copy / kChunks, chunk = copy % kChunks, key = base + (box << a.box_shift);
    copy_box(to.at[chunk] + (box << a.box_shift) * kLine, from, 64 * chunk, key & ((1 << a.block_shift) - 1), w.kv_head,
             table[key >> a.block_shift], barrier);
  }
}

template <int kDim>
FL_DEVICE void clear_rows(typename Shared<kDim>::Tile& tile, int from, int to) {
#pragma unroll 1
  for (int at = 8 * from + threadIdx.x % kWarp; at < 8 * to; at += kWarp)
#pragma unroll
    for (int chunk = 0; chunk < Shared<kDim>::kChunks; ++chunk) reinterpret_cast<uint4*>(tile.at[chunk])[at] = uint4{};
}

template <int kDim>
FL_DEVICE void copy_keys(const PrefillArgs& a, Shared<kDim>& shared) {
  constexpr int kChunks = Shared<kDim>::kChunks;
  int turn = 0, round = 0;
  for_each_tile(a, [&](const Work& w) {
    if (w.num_tiles == 0) return;
    wait_for(shared.free_queries, round++ % 2 ^ 1);
    if (threadIdx.x % kWarp == 0) {
      arrive_expecting(shared.full_queries, kChunks * a.tokens * a.group * kLine);
#pragma unroll 1
      for (int chunk = 0; chunk < kChunks; ++chunk)
        copy_box(shared.queries.at[chunk], a.q, 64 * chunk, w.kv_head * a.group, w.begin, 0, shared.full_queries);
    }
    for (int n = 0; n < w.num_tiles; ++n, ++turn) {
      const int stage = turn % kStages;
      wait_for(shared.free_keys[stage], turn / kStages % 2 ^ 1);
      copy_tile<kDim>(shared.keys[stage], a.k, a, w, w.first_tile + n, shared.full_keys[stage]);
    }
  });
}

// Values that no row sees are multiplied by 0: they are cleared, as they may be no numbers.
template <int kDim>
FL_DEVICE void copy_values(const PrefillArgs& a, Shared<kDim>& shared) {
  int turn = 0, num_cut = 0;
  for_each_tile(a, [&](const Work& w) {
    for (int n = 0; n < w.num_tiles; ++n, ++turn) {
      const int stage = turn % kStages, base = (w.first_tile + n) * kTileKeys;
      auto& tile = shared.values[stage];
      wait_for(shared.free_values[stage], turn / kStages % 2 ^ 1);
      if (base >= w.first && base + kTileKeys <= w.end) {
        copy_tile<kDim>(tile, a.v, a, w, w.first_tile + n, shared.full_values[stage]);
        continue;
      }
      copy_tile<kDim>(tile, a.v, a, w, w.first_tile + n, shared.cut_values);
      wait_for(shared.cut_values, num_cut++ % 2);
      clear_rows<kDim>(tile, 0, w.first - base);
      clear_rows<kDim>(tile, w.end - base, kTileKeys);
      fence_shared_writes();
      sync_warp();
      if (threadIdx.x % kWarp == 0) arrive(shared.full_values[stage]);
    }
  });
}

// One warp group's rows: scores s of the present tile, weights p of it as the next product's operand, results o.
template <class T, int kDim>
struct Rows {
  float s[kTileKeys / 2], o[kDim / 2], top[2], sum[2];
  uint32_t p[kTileKeys / 16][4];

  FL_DEVICE void issue_scores(uint32_t queries, uint32_t keys) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
      product(s, operand_descriptor(queries + k / 4 * kChunk + k % 4 * 32, 8 * kLine, 16),
              operand_descriptor(keys + k / 4 * kChunk + k % 4 * 32, 8 * kLine, 16), k > 0, T{});
  }

  FL_DEVICE void issue_values(uint32_t values) {
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k)
      product(o, p[k], operand_descriptor(values + k * 16 * kLine, 8 * kLine, kChunk), true, T{});
  }

  FL_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = kNone;
      sum[r] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kDim / 2; ++j) o[j] = 0.0f;
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

// Number of the barrier of a warp group's turn to issue products.
FL_DEVICE int turn_of(int part) { return 1 + part; }

template <class T, int kDim>
FL_DEVICE void write_rows(const PrefillArgs& a, const Work& w, int row, Rows<T, kDim>& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r], factor = 1.0f;
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int token = (row + 8 * r) / a.group;
    const int64_t head = w.kv_head * a.group + (row + 8 * r) % a.group;
    if (token >= w.num_tokens) continue;
    if (a.sinks) {
      const float sink = to_float(static_cast<const T*>(a.sinks)[head]) * kLog2e, top = rows.top[r] * a.scale;
      const float most = fmaxf(top, sink);
      factor = exp2f(top - most);
      sum = fmaf(sum, factor, exp2f(sink - most));
    }
    factor /= sum == 0.0f ? 1.0f : sum;
    T* to = static_cast<T*>(a.out) + (w.begin + token) * a.out_token + head * a.out_head + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      *reinterpret_cast<uint32_t*>(to + 8 * j) =
          pack_two(rows.o[4 * j + 2 * r] * factor, rows.o[4 * j + 2 * r + 1] * factor, T{});
  }
}

// One warp group's work: its 64 rows of each tile.
template <class T, int kDim>
FL_DEVICE void attend(const PrefillArgs& a, int part, Shared<kDim>& shared) {
  const int thread = threadIdx.x % kGroup, warp = thread / kWarp, lane = thread % kWarp;
  const int row = 64 * part + 16 * warp + lane / 4;
  const uint32_t queries = shared_address(&shared.queries) + part * 64 * kLine;
  int turn = 0, round = 0;  // tiles of keys, of rows
  if (part == 1) arrive_some(turn_of(0), 2 * kGroup);
  for_each_tile(a, [&](const Work& w) {
    Rows<T, kDim> rows;
    rows.clear();
    if (w.num_tiles > 0) {
      const int position[2] = {w.position + row / a.group, w.position + (row + 8) / a.group};
      int base = w.first_tile * kTileKeys;
      const auto weigh = [&] {
        if (base + kTileKeys - 1 > w.position || base <= w.end - 1 - a.window) rows.mask(base, position, a.window);
        base += kTileKeys;
        return rows.weigh(a.scale);
      };
      wait_for(shared.full_queries, round++ % 2);
      wait_for(shared.full_keys[turn % kStages], turn / kStages % 2);
      sync_some(turn_of(part), 2 * kGroup);
      begin_products();
      rows.issue_scores(queries, shared_address(&shared.keys[turn % kStages]));
      close_products();
      arrive_some(turn_of(1 - part), 2 * kGroup);
      wait_products<0>();
      settle(rows.s);
      if (lane == 0) arrive(shared.free_keys[turn % kStages]);
      weigh();
      rows.pack_weights();
      int before = turn++;
#pragma unroll 1
      for (int n = 1; n < w.num_tiles; ++n) {
        const int stage = turn % kStages;
        wait_for(shared.full_keys[stage], turn / kStages % 2);
        sync_some(turn_of(part), 2 * kGroup);
        begin_products();
        rows.issue_scores(queries, shared_address(&shared.keys[stage]));
        close_products();
        wait_for(shared.full_values[before % kStages], before / kStages % 2);
        begin_products();
        rows.issue_values(shared_address(&shared.values[before % kStages]));
        close_products();
        arrive_some(turn_of(1 - part), 2 * kGroup);
        wait_products<1>();
        settle(rows.s);
        if (lane == 0) arrive(shared.free_keys[stage]);
        const float2 shrink = weigh();
        wait_products<0>();
        settle(rows.o);
        if (lane == 0) arrive(shared.free_values[before % kStages]);
        rows.shrink(shrink);
        rows.pack_weights();
        before = turn++;
      }
      if (lane == 0) arrive(shared.free_queries);
      wait_for(shared.full_values[before % kStages], before / kStages % 2);
      begin_products();
      rows.issue_values(shared_address(&shared.values[before % kStages]));
      close_products();
      wait_products<0>();
      settle(rows.o);
      if (lane == 0) arrive(shared.free_values[before % kStages]);
    }
    write_rows(a, w, row, rows);
  });
  if (part == 0) sync_some(turn_of(0), 2 * kGroup);  // the other's last arrival
}

template <class T, int kDim>
FL_DEVICE void run_block(const PrefillArgs& a) {
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    init(shared.full_queries, 1);
    init(shared.cut_values, 1);
    init(shared.free_queries, kComputingWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      init(shared.full_keys[stage], 1);
      init(shared.full_values[stage], 1);
      init(shared.free_keys[stage], kComputingWarps);
      init(shared.free_values[stage], kComputingWarps);
    }
    show_barriers();
  }
  __syncthreads();
  const int part = shuffle(static_cast<int>(threadIdx.x / kGroup), 0);  // known to the compiler to be the warp's
  if (part == 2) {
    fewer_registers<56>();
    const int warp = shuffle(static_cast<int>(threadIdx.x % kGroup / kWarp), 0);
    if (warp == 0) copy_keys<kDim>(a, shared);
    if (warp == 1) copy_values<kDim>(a, shared);
  } else {
    more_registers<224>();
    attend<T, kDim>(a, part, shared);
  }
}

// Grid: any number of blocks.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs a) {
  launch_dependents();
  wait_for_prerequisites();
  if constexpr (kHasWarpGroups) run_block<T, kDim>(a);
  else trap();
}

// The keys or values of a cache [N, K, B, D], in boxes of 64 numbers of some keys of a block.
inline int describe_cache(TensorMap& to, const PrefillAttentionCall& c, const void* from, const int64_t (&strides)[3],
                   int64_t box) {
  return describe_tensor(to, from, {c.dim, int64_t{1} << c.block_shift, c.num_kv_heads, c.num_blocks}, strides,
                         {64, box, 1, 1});
}

}  // namespace prefill

int prefill_attention(Stream stream, const PrefillAttentionCall& c) {
  using namespace prefill;
  PrefillArgs a{};
  a.out = c.out;
  a.block_table = static_cast<const int32_t*>(c.block_table);
  a.seq_lens = static_cast<const int32_t*>(c.seq_lens);
  a.query_start = static_cast<const int32_t*>(c.query_start);
  a.sinks = c.sinks;
  a.num_seqs = static_cast<int>(c.num_seqs);
  a.kv_heads = static_cast<int>(c.num_kv_heads);
  a.group = static_cast<int>(c.num_heads / c.num_kv_heads);
  a.tokens = kTileRows / a.group;
  a.out_token = c.out_token;
  a.out_head = c.out_head;
  a.table_stride = c.table_stride;
  a.block_shift = static_cast<int>(c.block_shift);
  a.box_shift = a.block_shift < 7 ? a.block_shift : 7;
  a.window = static_cast<int>(c.window);
  a.scale = static_cast<float>(c.scale) * kLog2e;
  const int64_t box = int64_t{1} << a.box_shift;
  if (const int error = describe_tensor(a.q, c.q, {c.dim, c.num_heads, c.num_tokens, 1},
                                        {c.q_head, c.q_token, c.q_token}, {64, a.group, a.tokens, 1}))
    return error;
  if (const int error = describe_cache(a.k, c, c.k_cache, {c.k_token, c.k_head, c.k_block}, box)) return error;
  if (const int error = describe_cache(a.v, c, c.v_cache, {c.v_token, c.v_head, c.v_block}, box)) return error;
  const int64_t most = (c.num_tokens / a.tokens + c.num_seqs) * c.num_kv_heads;
  const dim3 grid(static_cast<unsigned>(most < num_processors() ? most : num_processors()));
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
