// Linears of up to 16 rows, which are limited by reading the weights: one pass over them, a tile of outputs a block
// (few_rows.h).
#include "cuda/few_rows.h"

namespace fuseline::cuda {
namespace {

constexpr int kStages = 3;  // of the ring buffer: they fit the default limit, four blocks a multiprocessor
constexpr int64_t kWideOutputs = 4096, kManyTiles = 256;

// Grid: tiles of outputs, eight per half. kHalves 1: only the lower half, for narrow products. kTiles: rows / 8.
template <class T, int kHalves, int kTiles, int kWarps, bool kIsGated>
__global__ void __launch_bounds__(kWarps* kWarp) few_rows_kernel(const LinearArgs a) {
  constexpr int kThreads = kWarps * kWarp;
  constexpr int kUnroll = kStageBytes / (16 * kThreads * kHalves), kStep = kDepth * kUnroll;
  __shared__ uint4 ring[kStages][kHalves * kUnroll][kThreads];
  launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, t = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * outputs_of(kHalves, kIsGated), output = first + lane / 4;
  const uint16_t* weight_rows[2] = {weight_row(a, output, kIsGated, t), weight_row(a, output + a.upper, kIsGated, t)};
  const uint16_t* rows[kTiles];
  input_rows(a, lane, rows);

  const auto fetch = [&](int64_t k, int stage) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int64_t at = k + u * kDepth;
        const bool is_there = at + 8 * t < a.num_in;
        copy_async(&ring[stage][u * kHalves + h][threadIdx.x], weight_rows[h] + (is_there ? at : 0), is_there);
      }
    close_group();
  };
  const int64_t begin = warp * kStep, stride = kWarps * kStep;
#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch(begin + s * stride, s);
  wait_for_prerequisites();

  float sum[kTiles][4] = {};
  int stage = 0;
#pragma unroll 1  // keeps registers low enough for four blocks per multiprocessor
  for (int64_t k = begin; k < a.num_in; k += stride) {
    uint4 in[kUnroll][kTiles];
    load_inputs(rows, k, a.num_in, t, in);
    wait_groups<kStages - 1>();
    multiply_stage<T, kHalves>(ring[stage], in, sum);
    fetch(k + kStages * stride, stage);  // reuses the stage that has just been read
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_groups<0>();
  __syncthreads();
  write_tile<T, kHalves, kTiles, kWarps>(a, first, kIsGated, sum, reinterpret_cast<float(*)[kTiles][4][kWarp]>(ring));
}

template <class T, int kHalves, int kWarps, bool kIsGated>
int launch_tiles(const LinearArgs& a, Stream stream) {
  constexpr int kOutputs = kIsGated ? 8 : 8 * kHalves;
  const dim3 grid(static_cast<unsigned>((a.num_out + kOutputs - 1) / kOutputs));
  const auto kernel = a.num_rows > 8 ? few_rows_kernel<T, kHalves, 2, kWarps, kIsGated>
                                     : few_rows_kernel<T, kHalves, 1, kWarps, kIsGated>;
  return launch(kernel, grid, kWarps * kWarp, stream, a, Overlap::kWeights);
}

}  // namespace

// Tiles and warps follow from the product's size alone: enough bytes under way for every multiprocessor of a
// large GPU.
int linear(Stream stream, const LinearCall& c) {
  const LinearArgs a = args_of(c);
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (c.num_out >= kWideOutputs) return launch_tiles<T, 2, 8, false>(a, stream);
    return c.num_out >= 8 * kManyTiles ? launch_tiles<T, 1, 8, false>(a, stream)
                                       : launch_tiles<T, 1, 16, false>(a, stream);
  });
}

int linear_act_mul(Stream stream, const LinearActMulCall& c) {
  const LinearArgs a = args_of(c);
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    return c.num_out >= 8 * kManyTiles ? launch_tiles<T, 2, 8, true>(a, stream)
                                       : launch_tiles<T, 2, 16, true>(a, stream);
  });
}

}  // namespace fuseline::cuda
