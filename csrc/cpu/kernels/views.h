// Typed access to views, conversion of rows to and from fp32, and scratch. The tail of a row takes the vector path too,
// so an element's value does not depend on its place in the row.
#pragma once
#include "cpu/rows.h"
#include "cpu/vec_math.h"

namespace fuseline::FL_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = __FLT_MAX__;

// Element at offset i of an i64, i32 or u8 view.
FL_INLINE int64_t int_at(const Tensor& t, int64_t i) {
  if (t.dtype == DType::i64) return static_cast<const int64_t*>(t.data)[i];
  if (t.dtype == DType::i32) return static_cast<const int32_t*>(t.data)[i];
  return static_cast<const uint8_t*>(t.data)[i];
}

FL_INLINE void set_int(const Tensor& t, int64_t i, int64_t value) {
  if (t.dtype == DType::i64) static_cast<int64_t*>(t.data)[i] = value;
  else if (t.dtype == DType::i32) static_cast<int32_t*>(t.data)[i] = static_cast<int32_t>(value);
  else static_cast<uint8_t*>(t.data)[i] = static_cast<uint8_t>(value);
}

// y[i] = x[i], converted to fp32 or rounded to To; y may alias x.
template <class From, class To>
FL_INLINE void convert_row(const From* x, int64_t n, To* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < n) store_n(y + i, load_n(x + i, n - i), n - i);
}

FL_INLINE float float_at(const Tensor& t, int64_t i) {
  float y = 0.0f;
  with_float(t.dtype, [&](auto p) { convert_row(static_cast<decltype(p)*>(t.data) + i, 1, &y); });
  return y;
}

FL_INLINE float exp_of(float x) { return vexp(set1(x))[0]; }

// Scratch of the thread that runs a chunk; caller_floats: of the thread that starts parallel work.
FL_INLINE float* chunk_floats(int64_t n) { return static_cast<float*>(scratch(Scratch::kChunk, n * 4)); }
FL_INLINE float* caller_floats(int64_t n) { return static_cast<float*>(scratch(Scratch::kCaller, n * 4)); }

}  // namespace
}  // namespace fuseline::FL_ISA
