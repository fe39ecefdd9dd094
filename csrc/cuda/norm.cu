// RMSNorm and LayerNorm, alone or after a residual addition. One warp or one block computes a row; it reads the row
// once, keeps as much as fits in registers, and sums in an order that depends on its length alone. Rounds as
// compile/ops/norm.py does.
#include "cuda/kernels.h"
#include "cuda/vector.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {
namespace {

constexpr int kHeld = 4;          // vectors of a row that a thread keeps in registers
constexpr int kRowsPerBlock = 4;  // rows per block if a warp computes each

struct NormArgs {
  void *out, *total;
  const void *x, *residual, *weight, *bias;
  // Row r is at r / inner * outer stride + r % inner * inner stride.
  int64_t num_rows, inner, out_outer, out_inner, x_outer, x_inner, residual_outer, residual_inner;
  int64_t dim;
  float eps;
  int mode;  // of codes.h; kLayer for LayerNorm
};
constexpr int kLayer = -1;

FL_DEVICE int64_t place_of(int64_t row, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  return row / inner * outer_stride + row % inner * inner_stride;
}

// Sum over all threads of a row, in a fixed order.
template <int kThreads>
FL_DEVICE float row_sum(float x, float* shared) {
  x = warp_sum(x);
  if (kThreads == kWarp) return x;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[w];
  __syncthreads();
  return sum;
}

// Grid: one row per block, or kRowsPerBlock with a warp each. kVector: numbers per load.
template <class T, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads == kWarp ? kRowsPerBlock * kWarp : kThreads) norm_kernel(const NormArgs a) {
  __shared__ float shared[kThreads == kWarp ? 1 : kThreads / kWarp];
  const int thread = threadIdx.x % kThreads;
  const int64_t row = kThreads == kWarp ? blockIdx.x * static_cast<int64_t>(kRowsPerBlock) + threadIdx.x / kWarp
                                        : static_cast<int64_t>(blockIdx.x);
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  launch_dependents();
  for (int64_t c = thread * kVector; weight && c < a.dim; c += kThreads * kVector) prefetch(weight + c);
  wait_for_prerequisites();
  if (row >= a.num_rows) return;
  const int64_t at = place_of(row, a.inner, a.out_outer, a.out_inner);
  const T* x = static_cast<const T*>(a.x) + place_of(row, a.inner, a.x_outer, a.x_inner);
  const T* residual = static_cast<const T*>(a.residual);
  if (residual) residual += place_of(row, a.inner, a.residual_outer, a.residual_inner);
  T* total = static_cast<T*>(a.total) + at;
  T* out = static_cast<T*>(a.out) + at;

  float held[kHeld][kVector];
  // Calls f(first column, its numbers) for this thread's vectors: those in registers, then those reread each time.
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t c = (thread + i * kThreads) * kVector;
      if (c < a.dim) f(c, held[i]);
    }
    for (int64_t c = (thread + kHeld * kThreads) * kVector; c < a.dim; c += kThreads * kVector) {
      float again[kVector];
      load(again, (residual ? total : x) + c);
      f(c, again);
    }
  };
  // Reads the input of the norm: x, or x + residual rounded to its dtype, which is also stored.
  const auto read = [&](int64_t c, float(&v)[kVector]) {
    load(v, x + c);
    if (!residual) return;
    float other[kVector];
    load(other, residual + c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = rounded<T>(v[k] + other[k]);
    store(total + c, v);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (thread + i * kThreads) * kVector;
    if (c < a.dim) read(c, held[i]);
  }
  for (int64_t c = (thread + kHeld * kThreads) * kVector; residual && c < a.dim; c += kThreads * kVector) {
    float v[kVector];
    read(c, v);
  }

  float mean = 0.0f;
  if (a.mode == kLayer) {
    for_each([&](int64_t, const float(&v)[kVector]) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) mean += v[k];
    });
    mean = row_sum<kThreads>(mean, shared) / static_cast<float>(a.dim);
  }
  float squares = 0.0f;
  for_each([&](int64_t, const float(&v)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) squares = fmaf(v[k] - mean, v[k] - mean, squares);
  });
  const float scale = rsqrtf(row_sum<kThreads>(squares, shared) / static_cast<float>(a.dim) + a.eps);
  for_each([&](int64_t c, const float(&v)[kVector]) {
    float y[kVector], w[kVector] = {}, b[kVector] = {};
    if (weight) load(w, weight + c);
    if (bias) load(b, bias + c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      y[k] = (v[k] - mean) * scale;
      if (weight && a.mode == kNormCastThenScale) y[k] = rounded<T>(y[k]);
      if (weight) y[k] = y[k] * (a.mode == kNormOnePlus ? 1.0f + w[k] : w[k]);
      if (bias) y[k] = y[k] + b[k];
    }
    store(out + c, y);
  });
}

template <class T, int kVector>
int launch_norm(const NormArgs& a, Stream stream) {
  const auto rows = static_cast<unsigned>(a.num_rows);
  if (a.dim <= kHeld * kWarp * kVector)
    return launch(norm_kernel<T, kVector, kWarp>, dim3((rows + kRowsPerBlock - 1) / kRowsPerBlock),
                  kRowsPerBlock * kWarp, stream, a);
  if (a.dim <= kHeld * 256 * kVector) return launch(norm_kernel<T, kVector, 256>, dim3(rows), 256, stream, a);
  return launch(norm_kernel<T, kVector, 512>, dim3(rows), 512, stream, a);
}

}  // namespace

int norm(Stream stream, const NormCall& c) {
  const NormArgs a{c.out,     c.total,   c.x,       c.residual,       c.weight,
                   c.bias,    c.num_lines, c.inner, c.out_outer,      c.out_inner,
                   c.x_outer, c.x_inner, c.residual_outer, c.residual_inner, c.dim,
                   static_cast<float>(c.eps), static_cast<int>(c.mode)};
  return with_float(c.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = is_aligned(16, sizeof(T), {c.out, c.total, c.x, c.residual, c.weight, c.bias}, c.out_outer,
                                    c.out_inner, c.x_outer, c.x_inner, c.residual_outer, c.residual_inner, c.dim);
    return is_wide ? launch_norm<T, kWide<T>>(a, stream) : launch_norm<T, 1>(a, stream);
  });
}

}  // namespace fuseline::cuda
