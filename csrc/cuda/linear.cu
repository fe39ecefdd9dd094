// Linears of up to 16 rows, which are limited by reading the weights: one pass over them.
//
// A warp multiplies a tile of 16 weight rows by all rows of x with matrix instructions. The order of k within an
// instruction is free as long as both operands agree, so a lane loads eight neighbours of a weight row and of x (128
// bits) as its operands of two instructions, without transposing. Weights pass through a ring buffer in shared memory
// in which each thread reads only what it copied itself: this needs no barriers and keeps a fixed number of bytes in
// flight. The warps of a block share K round-robin, and their sums are added in order. None of this depends on the
// number of rows, so a row's bits do not either.
//
// Legend: M rows, N outputs, K inputs; lane = (g = lane / 4, t = lane % 4).
#include "cuda/activate.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kDepth = 32;          // k that a warp loads of a row at once: two matrix instructions
constexpr int kStages = 3;          // of the ring buffer
constexpr int kStageBytes = 16384;  // per block; three stages fit the default limit, four blocks a multiprocessor
constexpr int64_t kWideOutputs = 4096, kManyTiles = 256;

struct LinearArgs {
  void* out;
  const void *x, *weight, *bias;
  int64_t x_stride, weight_stride;
  int64_t num_rows, num_out, num_in;
  int64_t upper;  // distance in rows from the tile's lower eight weight rows to its upper eight
  int act;
};

// Grid: tiles of outputs, eight per half. kHalves 1: only the lower half, for narrow products. kTiles: rows / 8.
template <class T, int kHalves, int kTiles, int kWarps, bool kIsGated>
__global__ void __launch_bounds__(kWarps* kWarp) few_rows_kernel(const LinearArgs a) {
  constexpr int kThreads = kWarps * kWarp, kOutputs = kIsGated ? 8 : 8 * kHalves;
  constexpr int kUnroll = kStageBytes / (16 * kThreads * kHalves), kStep = kDepth * kUnroll;
  __shared__ uint4 ring[kStages][kHalves * kUnroll][kThreads];
  launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kOutputs + g;
  // Missing rows repeat the first one; their results are not written.
  const auto weight_row = [&](int64_t n) {
    const bool is_there = n < a.num_out + (kIsGated ? a.upper : 0);
    return static_cast<const uint16_t*>(a.weight) + (is_there ? n * a.weight_stride : 0) + 8 * t;
  };
  const uint16_t* weight_rows[2] = {weight_row(output), weight_row(output + a.upper)};
  const uint16_t* rows[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    rows[i] = static_cast<const uint16_t*>(a.x) + (8 * i + g < a.num_rows ? (8 * i + g) * a.x_stride : 0) + 8 * t;

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
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int64_t at = k + u * kDepth;
        in[u][i] = at + 8 * t < a.num_in ? *reinterpret_cast<const uint4*>(rows[i] + at) : uint4{0, 0, 0, 0};
      }
    wait_groups<kStages - 1>();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint4 low = ring[stage][u * kHalves][threadIdx.x];
      const uint4 high = kHalves == 2 ? ring[stage][u * kHalves + kHalves - 1][threadIdx.x] : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma(sum[i], {low.x, high.x, low.y, high.y}, {in[u][i].x, in[u][i].y}, T{});
        mma(sum[i], {low.z, high.z, low.w, high.w}, {in[u][i].z, in[u][i].w}, T{});
      }
    }
    fetch(k + kStages * stride, stage);  // reuses the stage that has just been read
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_groups<0>();
  __syncthreads();
  auto sums = reinterpret_cast<float(*)[kTiles][4][kWarp]>(ring);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][i][j][lane] = sum[i][j];
  __syncthreads();

  // Each entry is row 8 i + 2 t + j of the outputs of lane (g, t), lower and upper half.
  T* out = static_cast<T*>(a.out);
  const T* bias = static_cast<const T*>(a.bias);
  for (int entry = threadIdx.x; entry < kTiles * 2 * kWarp; entry += kThreads) {
    const int of = entry % kWarp, j = entry / kWarp % 2, i = entry / kWarp / 2;
    const int64_t row = 8 * i + 2 * (of % 4) + j, n = static_cast<int64_t>(blockIdx.x) * kOutputs + of / 4;
    if (row >= a.num_rows || n >= a.num_out) continue;
    const bool has_upper = kHalves == 2 && (kIsGated || n + a.upper < a.num_out);
    float lower = 0.0f, upper = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      lower += sums[w][i][j][of];
      if (kHalves == 2) upper += sums[w][i][j + 2][of];
    }
    if (bias) lower += to_float(bias[n]);
    if (bias && has_upper) upper += to_float(bias[n + a.upper]);
    if (kIsGated) lower = rounded<T>(activate(rounded<T>(lower), a.act)) * rounded<T>(upper);
    out[row * a.num_out + n] = cast<T>(lower);
    if (!kIsGated && has_upper) out[row * a.num_out + n + a.upper] = cast<T>(upper);
  }
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
  const LinearArgs a{c.out,      c.x,       c.weight.data, c.bias, c.x_stride, c.weight_stride,
                     c.num_rows, c.num_out, c.num_in,      8,      0};
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (c.num_out >= kWideOutputs) return launch_tiles<T, 2, 8, false>(a, stream);
    return c.num_out >= 8 * kManyTiles ? launch_tiles<T, 1, 8, false>(a, stream)
                                       : launch_tiles<T, 1, 16, false>(a, stream);
  });
}

int linear_act_mul(Stream stream, const LinearActMulCall& c) {
  const LinearArgs a{c.out,      c.x,       c.weight.data, c.bias,    c.x_stride,              c.weight_stride,
                     c.num_rows, c.num_out, c.num_in,      c.num_out, static_cast<int>(c.act)};
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    return c.num_out >= 8 * kManyTiles ? launch_tiles<T, 2, 8, true>(a, stream)
                                       : launch_tiles<T, 2, 16, true>(a, stream);
  });
}

}  // namespace fuseline::cuda
