// RMSNorm and LayerNorm, alone and behind a residual addition. A line is one warp's or one block's; it is read once,
// held in registers as far as those go, and summed in an order that follows from its length. Rounding as in
// compile/ops/norm.py.
#include "cuda/kernels.h"
#include "cuda/vector.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {
namespace {

constexpr int kHeld = 4;          // vectors of a line that a thread keeps
constexpr int kLinesOfWarps = 4;  // lines of a block whose warps have one each

struct NormArgs {
  void *out, *total;
  const void *x, *residual, *weight, *bias;
  // Line r lies at r / inner * outer stride + r % inner * inner stride.
  int64_t num_lines, inner, out_outer, out_inner, x_outer, x_inner, residual_outer, residual_inner;
  int64_t dim;
  float eps;
  int mode;  // of codes.h; kLayer for LayerNorm
};
constexpr int kLayer = -1;

FL_DEVICE int64_t place_of(int64_t line, int64_t inner, int64_t outer_stride, int64_t inner_stride) {
  return line / inner * outer_stride + line % inner * inner_stride;
}

// Of all threads of a line, in one order.
template <int kThreads>
FL_DEVICE float line_sum(float x, float* shared) {
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

// Block: a line, or of a warp each, kLinesOfWarps. kVector: numbers of one load.
template <class T, int kVector, int kThreads>
__global__ void __launch_bounds__(kThreads == kWarp ? kLinesOfWarps * kWarp : kThreads) norm_kernel(const NormArgs a) {
  __shared__ float shared[kThreads == kWarp ? 1 : kThreads / kWarp];
  const int thread = threadIdx.x % kThreads;
  const int64_t line = kThreads == kWarp ? blockIdx.x * static_cast<int64_t>(kLinesOfWarps) + threadIdx.x / kWarp
                                         : static_cast<int64_t>(blockIdx.x);
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  launch_dependents();
  for (int64_t c = thread * kVector; weight && c < a.dim; c += kThreads * kVector) prefetch(weight + c);
  wait_for_prerequisites();
  if (line >= a.num_lines) return;
  const int64_t at = place_of(line, a.inner, a.out_outer, a.out_inner);
  const T* x = static_cast<const T*>(a.x) + place_of(line, a.inner, a.x_outer, a.x_inner);
  const T* residual = static_cast<const T*>(a.residual);
  if (residual) residual += place_of(line, a.inner, a.residual_outer, a.residual_inner);
  T* total = static_cast<T*>(a.total) + at;
  T* out = static_cast<T*>(a.out) + at;

  float held[kHeld][kVector];
  // f(first column, its numbers) for this thread's vectors: those held, then those that are read again each time.
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
  // The line to norm: x, or x + residual as its dtype holds it, which is stored.
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
    mean = line_sum<kThreads>(mean, shared) / static_cast<float>(a.dim);
  }
  float squares = 0.0f;
  for_each([&](int64_t, const float(&v)[kVector]) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) squares = fmaf(v[k] - mean, v[k] - mean, squares);
  });
  const float scale = rsqrtf(line_sum<kThreads>(squares, shared) / static_cast<float>(a.dim) + a.eps);
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
  const auto lines = static_cast<unsigned>(a.num_lines);
  if (a.dim <= kHeld * kWarp * kVector)
    return launch(norm_kernel<T, kVector, kWarp>, dim3((lines + kLinesOfWarps - 1) / kLinesOfWarps),
                  kLinesOfWarps * kWarp, stream, a);
  if (a.dim <= kHeld * 256 * kVector) return launch(norm_kernel<T, kVector, 256>, dim3(lines), 256, stream, a);
  return launch(norm_kernel<T, kVector, 512>, dim3(lines), 512, stream, a);
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
