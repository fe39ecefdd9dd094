// Decode attention over a paged KV cache. Keys are cut into splits; the query heads of a kv head share a block, so that
// each key and value is read once for all of them.
//
// Scores are q[heads, D] k[keys, D]^T, results v[keys, E]^T p[heads, keys]^T, both as matrix instructions of up to
// eight heads and sixteen keys. The order of D, of keys and of E within an instruction is free as long as its operands
// agree: a lane loads eight neighbours of a row, and the registers of the scores are the next product's operand.
// Keys and values pass through a ring buffer in shared memory in which each thread reads only what it copied itself
// (see linear.cu).
//
// The order of a row's sums depends on its sequence alone: the number of keys fixes the splits, the warps of a block
// share the tiles of a split round-robin, and partial results are merged in ascending order. Which block computes which
// split changes no bit.
//
// Legend: H query heads, G per kv head, D key and value dim, B keys per block; lane = (g = lane / 4, t = lane % 4).
#include "cuda/attention.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kStages = 3;

// Grid: (kv head x group of its query heads, sequence, worker).
template <class T, class Cache, int kDim>
__global__ void __launch_bounds__(256 / kDim * kWarp) decode_kernel(const AttentionArgs a) {
  constexpr int kWarps = 256 / kDim, kThreads = kWarps * kWarp;
  constexpr int kKeyLoads = kDim / 32, kValueLoads = kDim / 64, kLoads = 2 * kKeyLoads + 4 * kValueLoads;
  using Eight = typename Raw<Cache>::Type;
  union Shared {
    Eight ring[kStages][kLoads][kThreads];
    struct { float values[kWarps][kHeads][kDim]; SoftmaxState states[kWarps][kHeads]; } parts;
    __device__ Shared() {}
  };
  __shared__ Shared shared;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, g = lane / 4, t = lane % 4;
  const int num_parts = static_cast<int>((a.group + kHeads - 1) / kHeads);
  const int64_t kv_head = blockIdx.x / num_parts, in_group = blockIdx.x % num_parts * kHeads;
  const int num_heads = static_cast<int>(a.group - in_group < kHeads ? a.group - in_group : kHeads);
  const int64_t first_head = kv_head * a.group + in_group;
  const int64_t seq = blockIdx.y;
  launch_dependents();
  wait_for_prerequisites();
  const int begin = a.query_start[seq], num_tokens = a.query_start[seq + 1] - begin, length = a.seq_lens[seq];
  if (a.is_mixed && num_tokens != 1) return;
  const int32_t* table = a.block_table + seq * a.table_stride;
  const Cache* keys = static_cast<const Cache*>(a.k_cache) + kv_head * a.k_head + 8 * t;
  const Cache* values = static_cast<const Cache*>(a.v_cache) + kv_head * a.v_head + 8 * g;
  const float scale = a.k_scale ? a.scale * *a.k_scale : a.scale;

  for (int token = 0; token < num_tokens; ++token) {
    const Cut cut(length - num_tokens + token, a.window, static_cast<int>(a.num_splits));
    const int64_t at = begin + token;
    uint4 q[kKeyLoads];  // missing heads repeat the first; their results are discarded
    const int64_t head_of_lane = first_head + (g < num_heads ? g : 0);
    const T* from = static_cast<const T*>(a.q) + at * a.q_token + head_of_lane * a.q_head + 8 * t;
#pragma unroll
    for (int c = 0; c < kKeyLoads; ++c) q[c] = *reinterpret_cast<const uint4*>(from + 32 * c);
    // A token without keys has no splits; the first worker writes its zeros.
    const int num_splits = cut.num_splits > 0 ? cut.num_splits : 1;
    for (int i = blockIdx.z; i < num_splits; i += gridDim.z) {
      const int low = cut.start + i * cut.split, high = low + cut.split < cut.end ? low + cut.split : cut.end;
      const auto is_seen = [&](int key) { return key >= cut.first && key < high; };
      // Cache block of this lane's key of the tile; -1 outside the split.
      const auto look_up = [&](int base) {
        const int key = base + lane % kKeys;
        return is_seen(key) ? table[key >> a.block_shift] : -1;
      };
      int fetched = low + warp * kKeys, blocks = look_up(fetched);
      const auto fetch = [&](int stage) {
        const int mask = (1 << a.block_shift) - 1;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int key = 8 * n + g, block = shuffle(blocks, key);
          const Cache* row = keys + (block < 0 ? 0 : block * a.k_block + ((fetched + key) & mask) * a.k_token);
#pragma unroll
          for (int c = 0; c < kKeyLoads; ++c)
            copy_async(&shared.ring[stage][n * kKeyLoads + c][thread], row + 32 * c, block >= 0);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int key = 2 * t + n % 2 + n / 2 * 8, block = shuffle(blocks, key);
          const Cache* row = values + (block < 0 ? 0 : block * a.v_block + ((fetched + key) & mask) * a.v_token);
#pragma unroll
          for (int c = 0; c < kValueLoads; ++c)
            copy_async(&shared.ring[stage][2 * kKeyLoads + n * kValueLoads + c][thread], row + 64 * c, block >= 0);
        }
        close_group();
        fetched += kWarps * kKeys;
        blocks = look_up(fetched);
      };
#pragma unroll
      for (int s = 0; s < kStages - 1; ++s) fetch(s);

      // Per warp: `state` belongs to head g, its sum is this lane's share. acc[j] holds dims 8 g + 2 (j % 4) and the
      // next, of chunk j / 4, for heads 2 t and 2 t + 1.
      SoftmaxState state{kNone, 0.0f};
      float acc[kDim / 16][4] = {};
      int stage = 0;
      for (int base = low + warp * kKeys; base < high; base += kWarps * kKeys) {
        wait_groups<kStages - 2>();
        fetch(stage == 0 ? kStages - 1 : stage - 1);
        const auto& ring = shared.ring[stage];
        float scores[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int c = 0; c < kKeyLoads; ++c) {
            const uint4 k = operand<T, Cache>(ring[n * kKeyLoads + c][thread]);
            mma(scores[n], {q[c].x, 0, q[c].y, 0}, {k.x, k.y}, T{});
            mma(scores[n], {q[c].z, 0, q[c].w, 0}, {k.z, k.w}, T{});
          }
        uint32_t p[2];
        const float shrink = soften<T>(state, scale, a.softcap, base + 2 * t, scores, is_seen, p);
        const float shrinks[2] = {shuffle(shrink, 8 * t), shuffle(shrink, 8 * t + 4)};
#pragma unroll
        for (int c = 0; c < kValueLoads; ++c) {
          uint4 v[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) v[n] = operand<T, Cache>(ring[2 * kKeyLoads + n * kValueLoads + c][thread]);
          const uint32_t words[4][4] = {{v[0].x, v[0].y, v[0].z, v[0].w}, {v[1].x, v[1].y, v[1].z, v[1].w},
                                        {v[2].x, v[2].y, v[2].z, v[2].w}, {v[3].x, v[3].y, v[3].z, v[3].w}};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float(&sums)[4] = acc[4 * c + j];
#pragma unroll
            for (int r = 0; r < 4; ++r) sums[r] *= shrinks[r % 2];
            mma(sums, {low_halves(words[0][j], words[1][j]), high_halves(words[0][j], words[1][j]),
                       low_halves(words[2][j], words[3][j]), high_halves(words[2][j], words[3][j])}, p, T{});
          }
        }
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
      state.sum += shuffle_xor(state.sum, 1);
      state.sum += shuffle_xor(state.sum, 2);
      wait_groups<0>();
      __syncthreads();  // the ring is no longer read; `parts` reuses its memory
      if (t == 0) shared.parts.states[warp][g] = state;
#pragma unroll
      for (int j = 0; j < kDim / 16; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          shared.parts.values[warp][2 * t + r % 2][64 * (j / 4) + 8 * g + 2 * (j % 4) + r / 2] = acc[j][r];
      __syncthreads();
      for (int entry = thread; entry < num_heads * kDim; entry += kThreads) {
        const int in_tile = entry / kDim, dim = entry % kDim;
        SoftmaxState whole{kNone, 0.0f};
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          fold(whole, value, shared.parts.states[w][in_tile], shared.parts.values[w][in_tile][dim]);
        const int64_t head = first_head + in_tile;
        if (num_splits == 1) {
          finish<T>(a, at, head, dim, whole, value);
          continue;
        }
        keep_partial<kDim>(a, a.is_mixed ? seq : at, head, i, dim, whole, value);
      }
      __syncthreads();
    }
  }
}

template <class T, class Cache, int kDim>
int launch_decode(const AttentionArgs& a, int64_t num_seqs, int64_t num_workers, Stream stream) {
  const auto parts = (a.group + kHeads - 1) / kHeads * (a.num_heads / a.group);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(num_seqs), static_cast<unsigned>(num_workers));
  return launch(decode_kernel<T, Cache, kDim>, grid, 256 / kDim * kWarp, stream, a);
}

int decode_by_threads(const AttentionArgs& a, const DecodeAttentionCall& c, Stream stream) {
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    return with_cache<T>(c.cache_dtype, c.dtype, [&](auto cache) {
      using Cache = decltype(cache);
      switch (c.dim) {
        case 64: return launch_decode<T, Cache, 64>(a, c.num_seqs, c.num_workers, stream);
        case 128: return launch_decode<T, Cache, 128>(a, c.num_seqs, c.num_workers, stream);
        case 256: return launch_decode<T, Cache, 256>(a, c.num_seqs, c.num_workers, stream);
        default: return kBadArgument;
      }
    });
  });
}

}  // namespace

int decode_attention(Stream stream, const DecodeAttentionCall& c) {
  AttentionArgs a{};
  a.out = c.out;
  a.q = c.q;
  a.k_cache = c.k_cache;
  a.v_cache = c.v_cache;
  a.block_table = static_cast<const int32_t*>(c.block_table);
  a.seq_lens = static_cast<const int32_t*>(c.seq_lens);
  a.query_start = static_cast<const int32_t*>(c.query_start);
  a.sinks = c.sinks;
  a.k_scale = static_cast<const float*>(c.k_scale);
  a.v_scale = static_cast<const float*>(c.v_scale);
  a.workspace = static_cast<float*>(c.workspace);
  a.is_mixed = c.num_tokens > c.num_seqs;
  a.num_slots = a.is_mixed ? c.num_seqs : c.num_tokens;
  a.num_heads = c.num_heads;
  a.group = c.num_heads / c.num_kv_heads;
  a.num_splits = c.num_splits;
  a.out_token = c.out_token;
  a.out_head = c.out_head;
  a.q_head = c.q_head;
  a.q_token = c.q_token;
  a.k_block = c.k_block;
  a.k_head = c.k_head;
  a.k_token = c.k_token;
  a.v_block = c.v_block;
  a.v_head = c.v_head;
  a.v_token = c.v_token;
  a.table_stride = c.table_stride;
  a.block_shift = c.block_shift;
  a.window = static_cast<int>(c.window);
  a.scale = static_cast<float>(c.scale) * kLog2e;
  a.softcap = static_cast<float>(c.softcap) * kLog2e;
  a.run = static_cast<int>(c.run > 1 ? c.run : 1);
  a.together = c.run == 1 ? kRun : 1;
  const int error = c.run ? decode_by_bulk(a, c, stream) : decode_by_threads(a, c, stream);
  return error || !a.workspace ? error : merge_partials(a, c, stream);
}

}  // namespace fuseline::cuda
