// Products of up to 16 rows: what a warp does with the weights it has copied, and how a tile of outputs is written.
//
// A warp multiplies a tile of 16 weight rows by all rows of x with matrix instructions. The order of k within an
// instruction is free as long as both operands agree, so a lane loads eight neighbours of a weight row and of x (128
// bits) as its operands of two instructions, without transposing. Weights pass through a ring buffer in shared memory
// in which each thread reads only what it copied itself: this needs no barriers and keeps a fixed number of bytes in
// flight. The warps of a block share K round-robin, and their sums are added in order. None of this depends on the
// number of rows, so a row's bits do not either.
//
// Legend: M rows, N outputs, K inputs; lane = (g = lane / 4, t = lane % 4).
#pragma once
#include "cuda/activate.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kDepth = 32;          // k that a warp loads of a row at once: two matrix instructions
constexpr int kStageBytes = 16384;  // of the ring buffer, per block

struct LinearArgs {
  void* out;
  const void *x, *weight, *bias;
  int64_t x_stride, weight_stride;
  int64_t num_rows, num_out, num_in;
  int64_t upper;  // distance in rows from the tile's lower eight weight rows to its upper eight
  int act;
};

// Outputs of a tile: of a gated product only those of its lower half are written.
FL_DEVICE int outputs_of(int num_halves, bool is_gated) { return is_gated ? 8 : 8 * num_halves; }

// Where a lane reads weight row n; missing rows repeat the first one, and their results are not written.
FL_DEVICE const uint16_t* weight_row(const LinearArgs& a, int64_t n, bool is_gated, int t) {
  const bool is_there = n < a.num_out + (is_gated ? a.upper : 0);
  return static_cast<const uint16_t*>(a.weight) + (is_there ? n * a.weight_stride : 0) + 8 * t;
}

// Where a lane reads the rows of x that it multiplies.
template <int kTiles>
FL_DEVICE void input_rows(const LinearArgs& a, int lane, const uint16_t* (&rows)[kTiles]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    rows[i] = static_cast<const uint16_t*>(a.x) + (8 * i + g < a.num_rows ? (8 * i + g) * a.x_stride : 0) + 8 * t;
}

// A warp's share of x at k, of as many loads as a stage has.
template <int kUnroll, int kTiles>
FL_DEVICE void load_inputs(const uint16_t* const (&rows)[kTiles], int64_t k, int64_t num_in, int t,
                           uint4 (&in)[kUnroll][kTiles]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int64_t at = k + u * kDepth;
      in[u][i] = at + 8 * t < num_in ? *reinterpret_cast<const uint4*>(rows[i] + at) : uint4{0, 0, 0, 0};
    }
}

// Adds the products of a stage.
template <class T, int kHalves, int kUnroll, int kTiles, int kThreads>
FL_DEVICE void multiply_stage(const uint4 (*stage)[kThreads], const uint4 (&in)[kUnroll][kTiles],
                              float (&sum)[kTiles][4]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint4 low = stage[u * kHalves][threadIdx.x];
    const uint4 high = kHalves == 2 ? stage[u * kHalves + kHalves - 1][threadIdx.x] : uint4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      mma(sum[i], {low.x, high.x, low.y, high.y}, {in[u][i].x, in[u][i].y}, T{});
      mma(sum[i], {low.z, high.z, low.w, high.w}, {in[u][i].z, in[u][i].w}, T{});
    }
  }
}

// Adds the warps' sums in order and writes the tile whose first output is `first`. `sums` is shared by the block, whose
// threads must no longer use its memory.
template <class T, int kHalves, int kTiles, int kWarps>
FL_DEVICE void write_tile(const LinearArgs& a, int64_t first, bool is_gated, const float (&sum)[kTiles][4],
                          float (*sums)[kTiles][4][kWarp]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][i][j][lane] = sum[i][j];
  __syncthreads();

  // Each entry is row 8 i + 2 t + j of the outputs of lane (g, t), lower and upper half.
  T* out = static_cast<T*>(a.out);
  const T* bias = static_cast<const T*>(a.bias);
  for (int entry = threadIdx.x; entry < kTiles * 2 * kWarp; entry += kWarps * kWarp) {
    const int of = entry % kWarp, j = entry / kWarp % 2, i = entry / kWarp / 2;
    const int64_t row = 8 * i + 2 * (of % 4) + j, n = first + of / 4;
    if (row >= a.num_rows || n >= a.num_out) continue;
    const bool has_upper = kHalves == 2 && (is_gated || n + a.upper < a.num_out);
    float lower = 0.0f, upper = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      lower += sums[w][i][j][of];
      if (kHalves == 2) upper += sums[w][i][j + 2][of];
    }
    if (bias) lower += to_float(bias[n]);
    if (bias && has_upper) upper += to_float(bias[n + a.upper]);
    if (is_gated) lower = rounded<T>(activate(rounded<T>(lower), a.act)) * rounded<T>(upper);
    out[row * a.num_out + n] = cast<T>(lower);
    if (!is_gated && has_upper) out[row * a.num_out + n + a.upper] = cast<T>(upper);
  }
}

inline LinearArgs args_of(const LinearCall& c) {
  return {c.out, c.x, c.weight.data, c.bias, c.x_stride, c.weight_stride, c.num_rows, c.num_out, c.num_in, 8, 0};
}
inline LinearArgs args_of(const LinearActMulCall& c) {
  return {c.out,      c.x,       c.weight.data, c.bias,    c.x_stride,              c.weight_stride,
          c.num_rows, c.num_out, c.num_in,      c.num_out, static_cast<int>(c.act)};
}

}  // namespace
}  // namespace fuseline::cuda
