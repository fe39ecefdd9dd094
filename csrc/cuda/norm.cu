// RMSNorm and LayerNorm, alone or after a residual addition. One warp or one block computes a row; it reads the row
// once, keeps as much as fits in registers, and sums in an order that depends on its length alone. Rounds as
// compile/ops/norm.py does.
#include "cuda/kernels.h"
#include "cuda/vector.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {
namespace {

constexpr int kHeld = 2;          // vectors of a row that a thread keeps in registers
constexpr int kRowsPerBlock = 4;  // rows per block if a warp computes each
template <int kThreads>
constexpr int kBlock = kThreads == kWarp ? kRowsPerBlock * kWarp : kThreads;

struct NormArgs {
  void *out, *total;
  const void *x, *residual, *weight, *bias;
  // Row r is at r / inner * outer stride + r % inner * inner stride.
  uint32_t num_rows, inner;
  int64_t out_outer, out_inner, x_outer, x_inner, residual_outer, residual_inner;
  int64_t dim;
  float eps;
  int mode;  // of codes.h; kLayer for LayerNorm
};
constexpr int kLayer = -1;

FL_DEVICE int64_t place_of(uint32_t row, uint32_t inner, int64_t outer_stride, int64_t inner_stride) {
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

// Grid: one row per block, or kRowsPerBlock with a warp each. kVector: numbers per load. Loads precede all stores, which
// the compiler takes for stores to their sources: a row waits for memory once, and once for its weights. 1024 threads
// share a multiprocessor's registers, 768 of rows of a warp.
template <class T, int kVector, int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kThreads == kWarp ? 6 : 1024 / kThreads)
    norm_kernel(const NormArgs a) {
  __shared__ float shared[kThreads == kWarp ? 1 : kThreads / kWarp];
  const int thread = threadIdx.x % kThreads;
  const uint32_t row = kThreads == kWarp ? blockIdx.x * kRowsPerBlock + threadIdx.x / kWarp : blockIdx.x;
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

  using Vector = Some<T, kVector>;
  Vector held[kHeld], others[kHeld];
  // Calls f(first column, its numbers) for this thread's vectors: those in registers, then those reread each time.
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t c = (thread + i * kThreads) * kVector;
      if (c >= a.dim) continue;
      float v[kVector];
      widen(v, held[i]);
      f(c, v, i);
    }
    for (int64_t c = (thread + kHeld * kThreads) * kVector; c < a.dim; c += kThreads * kVector) {
      float again[kVector];
      load(again, (residual ? total : x) + c);
      f(c, again, kHeld);
    }
  };
  // The input of the norm where there is a residual: x + residual rounded to its dtype, which is also stored.
  const auto sum_of = [&](int64_t c, const Vector& left, const Vector& right) {
    float v[kVector], other[kVector];
    widen(v, left);
    widen(other, right);
    Vector sum;
#pragma unroll
    for (int k = 0; k < kVector; ++k) sum.at[k] = cast<T>(v[k] + other[k]);
    *reinterpret_cast<Vector*>(total + c) = sum;
    return sum;
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (thread + i * kThreads) * kVector;
    if (c < a.dim) held[i] = some_of<kVector>(x + c);
    if (c < a.dim && residual) others[i] = some_of<kVector>(residual + c);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (thread + i * kThreads) * kVector;
    if (c < a.dim && residual) held[i] = sum_of(c, held[i], others[i]);
  }
  for (int64_t c = (thread + kHeld * kThreads) * kVector; residual && c < a.dim; c += kThreads * kVector) {
    sum_of(c, some_of<kVector>(x + c), some_of<kVector>(residual + c));
  }

  float mean = 0.0f;
  if (a.mode == kLayer) {
    for_each([&](int64_t, const float(&v)[kVector], int) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) mean += v[k];
    });
    mean = row_sum<kThreads>(mean, shared) / static_cast<float>(a.dim);
  }
  float squares = 0.0f;
  for_each([&](int64_t, const float(&v)[kVector], int) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) squares = fmaf(v[k] - mean, v[k] - mean, squares);
  });
  const float scale = rsqrtf(row_sum<kThreads>(squares, shared) / static_cast<float>(a.dim) + a.eps);
  Vector weights[kHeld], biases[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t c = (thread + i * kThreads) * kVector;
    if (c < a.dim && weight) weights[i] = some_of<kVector>(weight + c);
    if (c < a.dim && bias) biases[i] = some_of<kVector>(bias + c);
  }
  for_each([&](int64_t c, const float(&v)[kVector], int i) {
    float y[kVector], w[kVector] = {}, b[kVector] = {};
    if (weight) widen(w, i < kHeld ? weights[i] : some_of<kVector>(weight + c));
    if (bias) widen(b, i < kHeld ? biases[i] : some_of<kVector>(bias + c));
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
  const auto launch_with = [&](auto kernel, unsigned blocks, int threads) {
    return launch(kernel, dim3(blocks), threads, stream, a);
  };
  const int64_t vectors = (a.dim + kVector - 1) / kVector;
  if (vectors <= kHeld * kWarp)
    return launch_with(norm_kernel<T, kVector, kWarp>, (a.num_rows + kRowsPerBlock - 1) / kRowsPerBlock, kBlock<kWarp>);
  if (vectors <= kHeld * 256) return launch_with(norm_kernel<T, kVector, 256>, a.num_rows, 256);
  if (vectors <= kHeld * 512) return launch_with(norm_kernel<T, kVector, 512>, a.num_rows, 512);
  return launch_with(norm_kernel<T, kVector, 1024>, a.num_rows, 1024);
}

}  // namespace

int norm(Stream stream, const NormCall& c) {
  const auto num_rows = static_cast<uint32_t>(c.num_lines), inner = static_cast<uint32_t>(c.inner);
  const NormArgs a{c.out,       c.total,   c.x,       c.residual,       c.weight,         c.bias, num_rows, inner,
                   c.out_outer, c.out_inner, c.x_outer, c.x_inner, c.residual_outer, c.residual_inner, c.dim,
                   static_cast<float>(c.eps), static_cast<int>(c.mode)};
  return with_float(c.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_wide = is_aligned(16, sizeof(T), {c.out, c.total, c.x, c.residual, c.weight, c.bias}, c.out_outer,
                                    c.out_inner, c.x_outer, c.x_inner, c.residual_outer, c.residual_inner, c.dim);
    return is_wide ? launch_norm<T, kWide<T>>(a, stream) : launch_norm<T, 1>(a, stream);
  });
}

}  // namespace fuseline::cuda
