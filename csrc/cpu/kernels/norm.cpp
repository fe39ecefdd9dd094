// RMSNorm and LayerNorm, alone or after a residual addition. One thread sums a row, in a fixed order.
#include "cpu/rows.h"
#include "fuseline/codes.h"

namespace fuseline::FL_ISA {
namespace {

// sum = round(x + residual) if there is a residual; returns the row that the norm reads.
template <class T>
FL_INLINE const T* add_row(const T* x, const T* residual, T* sum, int64_t width) {
  if (!residual) return x;
  for_columns(width, [&](int64_t c, int64_t n) {
    store_some(sum + c, load_some(x + c, n) + load_some(residual + c, n), n);
  });
  return sum;
}

template <class T>
FL_INLINE vf scaled(vf normed, const T* weight, int64_t c, int64_t n, int64_t mode) {
  if (!weight) return normed;
  const vf w = load_some(weight + c, n);
  if (mode == kNormCastThenScale) return round_to<T>(normed) * w;
  return normed * (mode == kNormOnePlus ? 1.0f + w : w);
}

template <class T>
void rms_row(T* out, const T* x, const T* weight, int64_t width, int64_t mode, float eps) {
  vf squares = zero();
  for_columns(width, [&](int64_t c, int64_t n) {
    const vf v = load_some(x + c, n);
    squares = fma(v, v, squares);
  });
  const float scale = 1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(width) + eps);
  for_columns(width, [&](int64_t c, int64_t n) {
    store_some(out + c, scaled<T>(load_some(x + c, n) * scale, weight, c, n, mode), n);
  });
}

template <class T>
void layer_row(T* out, const T* x, const T* weight, const T* bias, int64_t width, float eps) {
  vf sums = zero();
  for_columns(width, [&](int64_t c, int64_t n) { sums += load_some(x + c, n); });
  const float mean = hsum(sums) / static_cast<float>(width);
  vf squares = zero();
  for_columns(width, [&](int64_t c, int64_t n) {
    // Lanes past the end hold -mean after the subtraction; they must contribute nothing.
    const vf v = load_some(x + c, n) - mean;
    if (n == kLanes) {
      squares = fma(v, v, squares);
      return;
    }
    for (int64_t k = 0; k < n; ++k) squares[k] += v[k] * v[k];
  });
  const float scale = 1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(width) + eps);
  for_columns(width, [&](int64_t c, int64_t n) {
    vf v = (load_some(x + c, n) - mean) * scale;
    if (weight) v = v * load_some(weight + c, n);
    if (bias) v = v + load_some(bias + c, n);
    store_some(out + c, v, n);
  });
}

template <class T>
const T* optional_row(const Tensor& t) { return t.present() ? static_cast<const T*>(t.data) : nullptr; }

// Calls normalize(T{}, out row, x row) for every row, after the optional addition.
template <class F>
void for_rows(const Tensor& out, const Tensor* sum, const Tensor& x, const Tensor* residual, const F& normalize) {
  with_float(x.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t width = last_size(x);
    parallel_ranges(num_rows(x), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* in = row<T>(x, r);
        if (residual) in = add_row(in, row<T>(*residual, r), row<T>(*sum, r), width);
        normalize(type, row<T>(out, r), in, width);
      }
    });
  });
}

void rms(const Tensor& out, const Tensor* sum, const Tensor& x, const Tensor* residual, const Tensor& weight,
         int64_t mode, double eps) {
  for_rows(out, sum, x, residual, [&](auto type, auto* to, const auto* in, int64_t width) {
    rms_row(to, in, optional_row<decltype(type)>(weight), width, mode, static_cast<float>(eps));
  });
}

void layer(const Tensor& out, const Tensor* sum, const Tensor& x, const Tensor* residual, const Tensor& weight,
           const Tensor& bias, double eps) {
  for_rows(out, sum, x, residual, [&](auto type, auto* to, const auto* in, int64_t width) {
    using T = decltype(type);
    layer_row(to, in, optional_row<T>(weight), optional_row<T>(bias), width, static_cast<float>(eps));
  });
}

}  // namespace

void rms_norm(const Tensor* t, const int64_t* i, const double* f) { rms(t[0], nullptr, t[1], nullptr, t[2], i[0], f[0]); }

void add_rms_norm(const Tensor* t, const int64_t* i, const double* f) { rms(t[0], &t[1], t[2], &t[3], t[4], i[0], f[0]); }

void layer_norm(const Tensor* t, const int64_t*, const double* f) {
  layer(t[0], nullptr, t[1], nullptr, t[2], t[3], f[0]);
}

void add_layer_norm(const Tensor* t, const int64_t*, const double* f) {
  layer(t[0], &t[1], t[2], &t[3], t[4], t[5], f[0]);
}

}  // namespace fuseline::FL_ISA
