// The norm of a row, by a warp or a block: norm.cu launches it alone, persistent.cu between products.
//
// The row is read once, as much as fits is kept in registers, and the sum's order depends on the row's length and its
// number of threads alone. Rounds as compile/ops/norm.py does.
#pragma once
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/vector.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {
namespace {

constexpr int kHeld = 2;  // vectors of a row that a thread keeps in registers

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

// Computes a row, as thread `thread` of its kThreads. Loads precede all stores, which the compiler takes for stores to
// their sources: a row waits for memory once, and once for its weights. `shared`: a float for each warp of a block.
template <class T, int kVector, int kThreads>
FL_DEVICE void norm_row(const NormArgs& a, uint32_t row, int thread, float* shared) {
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
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

inline NormArgs args_of(const NormCall& c) {
  NormArgs a{};
  a.out = c.out;
  a.total = c.total;
  a.x = c.x;
  a.residual = c.residual;
  a.weight = c.weight;
  a.bias = c.bias;
  a.num_rows = static_cast<uint32_t>(c.num_lines);
  a.inner = static_cast<uint32_t>(c.inner);
  a.out_outer = c.out_outer;
  a.out_inner = c.out_inner;
  a.x_outer = c.x_outer;
  a.x_inner = c.x_inner;
  a.residual_outer = c.residual_outer;
  a.residual_inner = c.residual_inner;
  a.dim = c.dim;
  a.eps = static_cast<float>(c.eps);
  a.mode = static_cast<int>(c.mode);
  return a;
}

// Whether every row can be read and written in vectors of 16 bytes.
template <class T>
bool is_wide(const NormArgs& a) {
  return is_aligned(16, sizeof(T), {a.out, a.total, a.x, a.residual, a.weight, a.bias}, a.out_outer, a.out_inner,
                    a.x_outer, a.x_inner, a.residual_outer, a.residual_inner, a.dim);
}

}  // namespace
}  // namespace fuseline::cuda
