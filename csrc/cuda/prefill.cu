// Attention of prompts over a paged KV cache, for sm_90a: warp-group matrix instructions, copies by tensor maps.
//
// A tile has 128 rows: the query heads of one kv head times some neighbouring tokens of one sequence. Blocks stay and
// take the next tile when they are free. Two warp groups compute 64 rows of a tile each, taking turns in issuing
// products, so that one's softmax runs beside the other's products; of a third, one warp takes the tiles, one copies
// queries and keys and one values to shared memory, ahead of the products, across tiles of rows.
// A row's keys are summed from the first to the last, a tile of 128 keys at a time, and tiles that it does not see
// leave it as it is: its bits are the same in any tile and batch.
//
// Tiles of queries, keys and values lie in shared memory as chunks of 64 columns; a chunk has 128 bytes a row, swizzled
// (operand_descriptor). Queries and keys are read along their rows, values across.
//
// Legend: H query heads, G per kv head, D head dim, B keys per block; lane = (g = lane / 4, t = lane % 4).
#include "cuda/prefill.h"
#include "cuda/vector.h"

namespace fuseline::cuda {
namespace prefill {

// The boxes of a tile of keys that hold any of [first, end), and the cache block of this lane's box: a warp copies the
// tile, a box of 64 columns by each lane.
template <int kDim>
struct Boxes {
  static constexpr int kChunks = Shared<kDim>::kChunks;
  int base, low, high, block;

  FL_DEVICE int box() const { return threadIdx.x % kWarp / kChunks; }

  FL_DEVICE static Boxes of(const PrefillArgs& a, const Work& w, int tile) {
    Boxes b{tile * kTileKeys, 0, 0, 0};
    const int most = w.end - b.base < kTileKeys ? w.end - b.base : kTileKeys;
    b.low = w.first > b.base ? (w.first - b.base) >> a.box_shift : 0;
    b.high = (most + (1 << a.box_shift) - 1) >> a.box_shift;
    if (b.box() >= b.low && b.box() < b.high)
      b.block = a.block_table[w.seq * a.table_stride + ((b.base + (b.box() << a.box_shift)) >> a.block_shift)];
    return b;
  }

  FL_DEVICE void copy(typename Shared<kDim>::Tile& to, const TensorMap& from, const PrefillArgs& a, const Work& w,
                      BulkBarrier& barrier) const {
    const int lane = threadIdx.x % kWarp, chunk = lane % kChunks, row = box() << a.box_shift;
    if (lane == 0) arrive_expecting(barrier, ((high - low) << a.box_shift) * kChunks * kLine);
    sync_warp();
    if (box() >= low && box() < high)
      copy_box(to.at[chunk] + row * kLine, from, 64 * chunk, (base + row) & ((1 << a.block_shift) - 1), w.kv_head,
               block, barrier);
  }
};

template <int kDim>
FL_DEVICE void clear_rows(typename Shared<kDim>::Tile& tile, int from, int to) {
#pragma unroll 1
  for (int at = 8 * from + threadIdx.x % kWarp; at < 8 * to; at += kWarp)
#pragma unroll
    for (int chunk = 0; chunk < Shared<kDim>::kChunks; ++chunk) reinterpret_cast<uint4*>(tile.at[chunk])[at] = uint4{};
}

template <int kDim>
FL_DEVICE void copy_queries(const PrefillArgs& a, const Work& w, Shared<kDim>& shared) {
  constexpr int kChunks = Shared<kDim>::kChunks;
  if (threadIdx.x % kWarp != 0) return;
  arrive_expecting(shared.full_queries, kChunks * a.tokens * a.group * kLine);
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk)
    copy_box(shared.queries.at[chunk], a.q, 64 * chunk, w.kv_head * a.group, w.begin, 0, shared.full_queries);
}

template <int kDim>
FL_DEVICE void copy_keys(const PrefillArgs& a, Shared<kDim>& shared) {
  int turn = 0, round = 0;
  for_each_tile(shared, [&](const Work& w) {
    auto boxes = Boxes<kDim>::of(a, w, w.first_tile);
#pragma unroll 1
    for (int n = 0; n < w.num_tiles; ++n, ++turn) {
      const int stage = turn % kStages;
      wait_for(shared.free_keys[stage], turn / kStages % 2 ^ 1);
      boxes.copy(shared.keys[stage], a.k, a, w, shared.full_keys[stage]);
      if (n + 1 < w.num_tiles) boxes = Boxes<kDim>::of(a, w, w.first_tile + n + 1);
      if (n > 0) continue;
      wait_for(shared.free_queries, round++ % 2 ^ 1);  // behind the first keys, which have room sooner
      copy_queries<kDim>(a, w, shared);
    }
  });
}

// Values that no row sees are multiplied by 0: they are cleared, as they may be no numbers.
template <int kDim>
FL_DEVICE void copy_values(const PrefillArgs& a, Shared<kDim>& shared) {
  int turn = 0, num_cut = 0;
  for_each_tile(shared, [&](const Work& w) {
    auto boxes = Boxes<kDim>::of(a, w, w.first_tile);
#pragma unroll 1
    for (int n = 0; n < w.num_tiles; ++n, ++turn) {
      const int stage = turn % kStages, base = (w.first_tile + n) * kTileKeys;
      const bool is_cut = base < w.first || base + kTileKeys > w.end;
      auto& tile = shared.values[stage];
      wait_for(shared.free_values[stage], turn / kStages % 2 ^ 1);
      boxes.copy(tile, a.v, a, w, is_cut ? shared.cut_values : shared.full_values[stage]);
      if (n + 1 < w.num_tiles) boxes = Boxes<kDim>::of(a, w, w.first_tile + n + 1);
      if (!is_cut) continue;
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

// The lanes of a quad hold word t of four units of 16 bytes; returns the whole unit t.
FL_DEVICE uint4 join_unit(const uint32_t (&words)[4]) {
  const bool is_odd = threadIdx.x % 2, is_high = threadIdx.x % 4 / 2;
  const uint32_t first = shuffle_xor(is_odd ? words[0] : words[1], 1);
  const uint32_t second = shuffle_xor(is_odd ? words[2] : words[3], 1);
  const uint2 low = is_odd ? uint2{first, words[1]} : uint2{words[0], first};
  const uint2 high = is_odd ? uint2{second, words[3]} : uint2{words[2], second};
  const uint2 mine = is_high ? high : low, other = is_high ? low : high;
  const uint2 theirs{shuffle_xor(other.x, 2), shuffle_xor(other.y, 2)};
  return is_high ? uint4{theirs.x, theirs.y, mine.x, mine.y} : uint4{mine.x, mine.y, theirs.x, theirs.y};
}

template <class T, int kDim>
FL_DEVICE void write_rows(const PrefillArgs& a, const Work& w, int row, Rows<T, kDim>& rows) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = rows.sum[r], factor = 1.0f;
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int token = (row + 8 * r) / a.group;
    const int64_t head = w.kv_head * a.group + (row + 8 * r) % a.group;
    if (a.sinks) {
      const float sink = to_float(static_cast<const T*>(a.sinks)[head]) * kLog2e, top = rows.top[r] * a.scale;
      const float most = fmaxf(top, sink);
      factor = exp2f(top - most);
      sum = fmaf(sum, factor, exp2f(sink - most));
    }
    factor /= sum == 0.0f ? 1.0f : sum;
    T* to = static_cast<T*>(a.out) + (w.begin + token) * a.out_token + head * a.out_head + 8 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
        words[k] = pack_two(rows.o[4 * (j + k) + 2 * r] * factor, rows.o[4 * (j + k) + 2 * r + 1] * factor, T{});
      const uint4 unit = join_unit(words);
      if (token < w.num_tokens) *reinterpret_cast<uint4*>(to + 8 * j) = unit;
    }
  }
}

// One warp group's work: its 64 rows of each tile of rows. `turn` and `round` count the tiles of keys and of rows that
// are behind it, by which it knows stages and phases of the rings.
template <class T, int kDim>
struct Computing {
  const PrefillArgs& a;
  Shared<kDim>& shared;
  int part, row, turn, round;
  Rows<T, kDim> rows;

  FL_DEVICE void release(BulkBarrier& barrier) {
    if (threadIdx.x % kWarp == 0) arrive(barrier);
  }

  FL_DEVICE void take_turn() { sync_some(turn_of(part), 2 * kGroup); }
  FL_DEVICE void pass_turn() { arrive_some(turn_of(1 - part), 2 * kGroup); }

  FL_DEVICE void begin_scores() {
    wait_for(shared.full_keys[turn % kStages], turn / kStages % 2);
    take_turn();
    begin_products();
    rows.issue_scores(shared_address(&shared.queries) + part * 64 * kLine,
                      shared_address(&shared.keys[turn % kStages]));
    close_products();
  }

  // Of the tile of keys ahead of the present one.
  FL_DEVICE void begin_values() {
    const int before = turn - 1;
    wait_for(shared.full_values[before % kStages], before / kStages % 2);
    begin_products();
    rows.issue_values(shared_address(&shared.values[before % kStages]));
    close_products();
  }
  FL_DEVICE void end_values() {
    wait_products<0>();
    settle(rows.o);
    release(shared.free_values[(turn - 1) % kStages]);
  }

  // The n-th tile of keys: its scores have come; returns by which factor earlier results shrink.
  FL_DEVICE float2 weigh(const Work& w, int n) {
    settle(rows.s);
    release(shared.free_keys[turn % kStages]);
    if (n + 1 == w.num_tiles) release(shared.free_queries);
    const int base = (w.first_tile + n) * kTileKeys;
    if (base + kTileKeys - 1 > w.position || base <= w.end - 1 - a.window)
      rows.mask(base, {w.position + row / a.group, w.position + (row + 8) / a.group}, a.window);
    return rows.weigh(a.scale);
  }

  FL_DEVICE void attend(const Work& w) {
    wait_for(shared.full_queries, round++ % 2);
    begin_scores();
    pass_turn();
    wait_products<0>();
    weigh(w, 0);
    rows.pack_weights();
    ++turn;
#pragma unroll 1
    for (int n = 1; n < w.num_tiles; ++n, ++turn) {
      begin_scores();
      begin_values();
      pass_turn();
      wait_products<1>();
      const float2 shrink = weigh(w, n);
      end_values();
      rows.shrink(shrink);
      rows.pack_weights();
    }
    begin_values();
    end_values();
  }
};

template <class T, int kDim>
FL_DEVICE void compute(const PrefillArgs& a, int part, Shared<kDim>& shared) {
  const int row = 64 * part + threadIdx.x % kGroup / kWarp * 16 + threadIdx.x % kWarp / 4;
  Computing<T, kDim> c{a, shared, part, row, 0, 0, {}};
  if (part == 1) c.pass_turn();
  for_each_tile(shared, [&](const Work& w) {
    c.rows.clear();
    if (w.num_tiles > 0) c.attend(w);
    write_rows(a, w, row, c.rows);
  });
  if (part == 0) c.take_turn();  // the other's last
}

template <class T, int kDim>
FL_DEVICE void run_block(const PrefillArgs& a) {
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    init(shared.full_work, 1);
    init(shared.free_work, kReaders);
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
    if (warp == 2) give_work(a, shared);
  } else {
    more_registers<224>();
    compute<T, kDim>(a, part, shared);
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
  a.num_taken = static_cast<int*>(c.num_taken);
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
  if (most <= grid.x) a.num_taken = nullptr;
  if (!is_aligned(16, 2, {c.out}, c.out_token, c.out_head) || (most > grid.x && !a.num_taken)) return kBadArgument;
  if (const int error = a.num_taken ? clear(stream, a.num_taken, sizeof(int)) : 0) return error;
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
