// Shared by the parts of prefill.cu: arguments, shared memory, and which block computes which rows.
#pragma once
#include "cuda/hopper.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {

// Named, as compilers warn of what is unused in an unnamed one, and other GPUs use nothing of it.
namespace prefill {

inline constexpr int kTileRows = 128, kTileKeys = 128, kStages = 2, kThreads = 3 * kGroup;
inline constexpr int kLine = 128, kChunk = kTileKeys * kLine;  // bytes of a row of a chunk, of a chunk
inline constexpr int kComputingWarps = 2 * kGroup / kWarp;
inline constexpr int kReaders = kComputingWarps + 2;  // warps that are told what to do
inline constexpr float kNone = -INFINITY;
static_assert(kTileRows == kTileKeys);

struct PrefillArgs {
  TensorMap q, k, v;  // [D, H, T, 1] and [D, B, K, N] in boxes of a tile's rows, of one block's keys
  void* out;
  const int32_t *block_table, *seq_lens, *query_start;
  const void* sinks;
  int* num_taken;  // tiles of rows that blocks have taken besides their first; null where each takes one at most
  int num_seqs, kv_heads, group, tokens;  // `tokens` of a tile
  int64_t out_token, out_head, table_stride;
  int block_shift, box_shift, window;  // log2 of B, and of the keys of a box
  float scale;  // times log2(e)
};

// A tile of rows, of a sequence; of none when all is done. Keys are tiles [first_tile, first_tile + num_tiles); those outside [first, end) are not seen.
struct Work {
  int seq, kv_head, begin, num_tokens, position, first, end, first_tile, num_tiles;
};

template <int kDim>
struct alignas(1024) Shared {
  static constexpr int kChunks = kDim / 64;
  struct Tile { char at[kChunks][kChunk]; };
  Tile queries, keys[kStages], values[kStages];
  Work work;
  BulkBarrier full_work, free_work, full_queries, free_queries, cut_values;
  BulkBarrier full_keys[kStages], free_keys[kStages], full_values[kStages], free_values[kStages];
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
  const int token = (tile - before) * a.tokens, begin = a.query_start[seq];
  const int count = a.query_start[seq + 1] - begin, position = a.seq_lens[seq] - count + token;
  Work w;
  w.seq = seq;
  w.begin = begin + token;
  w.num_tokens = count - token < a.tokens ? count - token : a.tokens;
  w.position = position;
  w.first = position - a.window + 1 > 0 ? position - a.window + 1 : 0;
  w.end = position + w.num_tokens;
  w.first_tile = w.first / kTileKeys;
  w.num_tiles = w.end > w.first ? (w.end + kTileKeys - 1) / kTileKeys - w.first_tile : 0;
  return w;
}

// By one warp: tells the others of each tile of rows, one ahead of them. Blocks take the next one when they are free,
// the last first, as late ones see most keys.
template <int kDim>
FL_DEVICE void give_work(const PrefillArgs& a, Shared<kDim>& shared) {
  const int lane = threadIdx.x % kWarp, total = count_tiles(a) * a.kv_heads;
  int item = blockIdx.x;
  for (int round = 0;; ++round) {
    Work w{};
    w.seq = -1;
    if (item < total) {
      w = find_work(a, (total - 1 - item) / a.kv_heads);
      w.kv_head = item % a.kv_heads;
    }
    wait_for(shared.free_work, round % 2 ^ 1);
    if (lane == 0) {
      shared.work = w;
      arrive(shared.full_work);
    }
    if (item >= total) return;
    item = total;
    if (lane == 0 && a.num_taken) item = static_cast<int>(gridDim.x) + atomicAdd(a.num_taken, 1);
    item = shuffle(item, 0);
  }
}

// Calls f with each tile of rows of this block.
template <int kDim, class F>
FL_DEVICE void for_each_tile(Shared<kDim>& shared, const F& f) {
  for (int round = 0;; ++round) {
    wait_for(shared.full_work, round % 2);
    Work w = shared.work;
    sync_warp();
    if (threadIdx.x % kWarp == 0) arrive(shared.free_work);
    w.num_tiles = shuffle(w.num_tiles, 0);  // known to the compiler to be the warp's
    if (shuffle(w.seq, 0) < 0) return;
    f(w);
  }
}

}  // namespace prefill
}  // namespace fuseline::cuda
