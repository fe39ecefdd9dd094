// What lies between two attentions of a decode step, as one launch: blocks stay and go through a list of steps together.
//
// A block a multiprocessor computes its share of a step (tiles of outputs, rows of a norm, vectors of rope), then waits
// for all others. Weights do not wait: each thread copies those of its next products through a ring in shared memory,
// across the ends of tiles and of steps, so that memory is read on while blocks wait, and while norms and rope run.
//
// Products are those of few_rows.h with tiles of 16 outputs and eight warps, norms and rope those of norm.h and rope.h:
// the bits of a row depend on itself alone, and where linear.cu chooses such tiles too, they are the same.
#include "cuda/persistent.h"

namespace fuseline::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kStages = 13;  // 208 KiB under way on a multiprocessor
constexpr int kHalves = 2, kUnroll = kStageBytes / (16 * kThreads * kHalves), kLoads = kHalves * kUnroll;
constexpr int64_t kStep = kDepth * kUnroll, kStride = kWarps * kStep;

template <int kTiles>
struct Shared {
  uint4 ring[kStages][kLoads][kThreads];
  float sums[kWarps][kTiles][4][kWarp];
};

FL_DEVICE int64_t num_tiles(const Step& step) {
  const int outputs = outputs_of(kHalves, step.is_gated());
  return (step.linear.num_out + outputs - 1) / outputs;
}

// Copies weights ahead of their use: goes through the loads of this thread in the block's tiles of all products.
struct Copier {
  const Steps& all;
  int at = -1;  // the step whose weights are copied; num_steps: there are no more
  int64_t tile = 0, k = 0;
  const uint16_t* rows[kHalves];

  FL_DEVICE explicit Copier(const Steps& all) : all(all) { next_product(); }

  FL_DEVICE void copy(uint4 (*stage)[kThreads]) {
    if (at < all.num_steps) {
      const int64_t num_in = all.steps[at].linear.num_in;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          const int64_t from = k + u * kDepth;
          const bool is_there = from + 8 * (threadIdx.x % 4) < num_in;
          copy_async(&stage[u * kHalves + h][threadIdx.x], rows[h] + (is_there ? from : 0), is_there);
        }
      k += kStride;
      if (k >= num_in) next_tile(tile + gridDim.x);
    }
    close_group();
  }

  FL_DEVICE void next_product() {
    do {
      ++at;
      if (at == all.num_steps) return;
    } while (!all.steps[at].is_product() || !starts_at(blockIdx.x));
  }
  FL_DEVICE void next_tile(int64_t next) {
    if (!starts_at(next)) next_product();
  }
  // Begins with a tile of the product; false if this warp has no load in it.
  FL_DEVICE bool starts_at(int64_t next) {
    const Step& step = all.steps[at];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    tile = next;
    k = warp * kStep;
    if (tile >= num_tiles(step) || k >= step.linear.num_in) return false;
    const int64_t output = tile * outputs_of(kHalves, step.is_gated()) + lane / 4;
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
      rows[h] = weight_row(step.linear, output + h * step.linear.upper, step.is_gated(), lane % 4);
    return true;
  }
};

// The ring between copies and products.
template <int kTiles>
struct Ring {
  Shared<kTiles>& shared;
  Copier copier;
  int stage = 0;

  FL_DEVICE Ring(Shared<kTiles>& shared, const Steps& all) : shared(shared), copier(all) {
    for (int s = 0; s < kStages; ++s) copier.copy(shared.ring[s]);
  }

  // The block's share of a product.
  template <class T>
  FL_DEVICE void multiply(const Step& step) {
    const LinearArgs& a = step.linear;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint16_t* rows[kTiles];
    input_rows(a, lane, rows);
    for (int64_t tile = blockIdx.x; tile < num_tiles(step); tile += gridDim.x) {
      float sum[kTiles][4] = {};
#pragma unroll 1
      for (int64_t k = warp * kStep; k < a.num_in; k += kStride) {
        uint4 in[kUnroll][kTiles];
        load_inputs(rows, k, a.num_in, lane % 4, in);
        wait_groups<kStages - 1>();
        multiply_stage<T, kHalves>(shared.ring[stage], in, sum);
        copier.copy(shared.ring[stage]);  // reuses the stage that has just been read
        stage = stage == kStages - 1 ? 0 : stage + 1;
      }
      __syncthreads();  // the sums of the tile before are no longer read
      const int64_t first = tile * outputs_of(kHalves, step.is_gated());
      write_tile<T, kHalves, kTiles, kWarps>(a, first, step.is_gated(), sum, shared.sums);
    }
  }
};

// The block's share of a norm: a row at a time, or short rows a warp each.
template <class T, int kVector>
FL_DEVICE void compute_norm(const NormArgs& a, float* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (a.dim <= kHeld * kWarp * kVector) {
    for (uint32_t row = blockIdx.x * kWarps + warp; row < a.num_rows; row += gridDim.x * kWarps)
      norm_row<T, kVector, kWarp>(a, row, lane, shared);
    return;
  }
  for (uint32_t row = blockIdx.x; row < a.num_rows; row += gridDim.x)
    norm_row<T, kVector, kThreads>(a, row, threadIdx.x, shared);
}

template <class T, class Table, int kVector>
FL_DEVICE void compute_rope(const RopeStep& step) {
  const int64_t count = step.args.num_tokens * step.num_vectors;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; at < count; at += gridDim.x * kThreads)
    rope_vector<T, Table, T, kVector>(step.args, at / step.num_vectors, at % step.num_vectors);
}

template <class T>
FL_DEVICE void compute_rope(const RopeStep& step) {
  if (step.is_wide && step.has_wide_table) compute_rope<T, float, 4>(step);
  else if (step.is_wide) compute_rope<T, T, 4>(step);
  else if (step.has_wide_table) compute_rope<T, float, 1>(step);
  else compute_rope<T, T, 1>(step);
}

FL_DEVICE void prefetch_range(const PrefetchCall& range) {
  constexpr int64_t kLine = 128;
  const int64_t first = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  for (int64_t at = first * kLine; at < range.num_bytes; at += gridDim.x * kThreads * kLine)
    prefetch(static_cast<const char*>(range.from) + at);
}

// Grid: a block a multiprocessor. kTiles: rows / 8.
template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) persistent_kernel(const __grid_constant__ Steps all) {
  auto& shared = *reinterpret_cast<Shared<kTiles>*>(dynamic_shared());
  launch_dependents();
  wait_for_prerequisites();
  Ring<kTiles> ring(shared, all);
  float* sums = &shared.sums[0][0][0][0];
#pragma unroll 1
  for (int s = 0; s < all.num_steps; ++s) {
    const Step& step = all.steps[s];
    if (step.is_behind) sync_grid();
    if (step.is_product()) ring.template multiply<T>(step);
    else if (step.kind == StepKind::kRopeCache) compute_rope<T>(step.rope);
    else if (step.kind == StepKind::kPrefetch) prefetch_range(step.prefetch);
    else if (step.norm.is_wide) compute_norm<T, kWide<T>>(step.norm.args, sums);
    else compute_norm<T, 1>(step.norm.args, sums);
  }
  wait_groups<0>();
}

// Reads a record's call; false if its size is another.
template <class Call>
bool read(const char* from, int64_t num_bytes, Call& to) {
  if (num_bytes != sizeof(Call)) return false;
  memcpy(&to, from, sizeof(Call));
  return true;
}

template <class Call>
bool read_product(const char* from, int64_t num_bytes, Step& step, int64_t& most_rows) {
  Call call;
  if (!read(from, num_bytes, call)) return false;
  step.linear = args_of(call);
  most_rows = call.num_rows > most_rows ? call.num_rows : most_rows;
  return call.num_rows <= 16;
}

template <class T>
bool read_norm(const char* from, int64_t num_bytes, Step& step) {
  NormCall call;
  if (!read(from, num_bytes, call)) return false;
  step.norm = {args_of(call), false};
  step.norm.is_wide = is_wide<T>(step.norm.args);
  return true;
}

template <class T>
bool read_rope(const char* from, int64_t num_bytes, Step& step) {
  RopeCacheCall call;
  if (!read(from, num_bytes, call) || call.cache_dtype != call.dtype) return false;
  const RopeArgs a = args_of(call);
  const bool has_wide_table = call.table_dtype != call.dtype;
  const bool wide = has_wide_table ? is_wide<T, float, T, 4>(a) : is_wide<T, T, T, 4>(a);
  step.rope = {a, num_vectors(a, wide ? 4 : 1), wide, has_wide_table};
  return true;
}

template <class T>
bool read_step(const char* from, int64_t num_bytes, Step& step, int64_t& most_rows) {
  switch (step.kind) {
    case StepKind::kLinear: return read_product<LinearCall>(from, num_bytes, step, most_rows);
    case StepKind::kLinearActMul: return read_product<LinearActMulCall>(from, num_bytes, step, most_rows);
    case StepKind::kNorm: return read_norm<T>(from, num_bytes, step);
    case StepKind::kRopeCache: return read_rope<T>(from, num_bytes, step);
    case StepKind::kPrefetch: return read(from, num_bytes, step.prefetch);
    default: return false;
  }
}

template <class T>
bool read_steps(const PersistentCall& c, Steps& all, int64_t& most_rows) {
  if (c.num_steps > kMostSteps) return false;
  const char* from = reinterpret_cast<const char*>(c.steps);
  all.num_steps = static_cast<int>(c.num_steps);
  for (int s = 0; s < all.num_steps; ++s) {
    int64_t head[2];
    memcpy(head, from, sizeof(head));
    Step& step = all.steps[s];
    step.kind = static_cast<StepKind>(head[0]);
    step.is_behind = s > 0 && step.kind != StepKind::kPrefetch;
    if (!read_step<T>(from + sizeof(head), head[1], step, most_rows)) return false;
    from += sizeof(head) + head[1];
  }
  return true;
}

}  // namespace

int persistent(Stream stream, const PersistentCall& c) {
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    Steps all{};
    int64_t most_rows = 0;
    if (!read_steps<T>(c, all, most_rows)) return kBadArgument;
    return most_rows > 8 ? launch_resident(persistent_kernel<T, 2>, kThreads, stream, all, sizeof(Shared<2>))
                         : launch_resident(persistent_kernel<T, 1>, kThreads, stream, all, sizeof(Shared<1>));
  });
}

}  // namespace fuseline::cuda
