// Addressing of strided views: rows along the last dimension, and dtype dispatch.
#pragma once
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace fuseline::FL_ISA {
namespace {

// Calls body(T{}) with the storage type of a floating dtype. The argument checks reject all other dtypes.
template <class F>
FL_INLINE void with_float(DType dtype, const F& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: return;
  }
}

inline int64_t num_rows(const Tensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim - 1; ++d) n *= t.sizes[d];
  return n;
}

// Element offset of row `index`, in row-major order over all dimensions but the last.
inline int64_t row_offset(const Tensor& t, int64_t index) {
  int64_t offset = 0;
  for (int d = t.ndim - 2; d >= 0; --d) {
    offset += index % t.sizes[d] * t.strides[d];
    index /= t.sizes[d];
  }
  return offset;
}

template <class T>
FL_INLINE T* row(const Tensor& t, int64_t index) {
  return static_cast<T*>(t.data) + row_offset(t, index);
}

inline int64_t last_size(const Tensor& t) { return t.sizes[t.ndim - 1]; }

// Element `k` of a one-dimensional i64 or i32 tensor.
FL_INLINE int64_t index_at(const Tensor& t, int64_t k) {
  const int64_t at = k * t.strides[0];
  return t.dtype == DType::i64 ? static_cast<const int64_t*>(t.data)[at] : static_cast<const int32_t*>(t.data)[at];
}

// Element `r` of an i64 or i32 view in row-major order.
inline int64_t id_at(const Tensor& ids, int64_t r) {
  int64_t offset = 0;
  for (int d = ids.ndim - 1; d >= 0; --d) {
    offset += r % ids.sizes[d] * ids.strides[d];
    r /= ids.sizes[d];
  }
  return ids.dtype == DType::i64 ? static_cast<const int64_t*>(ids.data)[offset]
                                 : static_cast<const int32_t*>(ids.data)[offset];
}

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::u8: return 1;
    default: return 2;
  }
}

// Rows of `width` elements per chunk that outweigh the cost of claiming it.
inline int64_t row_grain(int64_t width) { return width >= 4096 ? 1 : 4096 / (width > 0 ? width : 1); }

// Calls body(column, count) for whole vectors, then for the tail with count < kLanes.
template <class F>
FL_INLINE void for_columns(int64_t width, const F& body) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) body(c, int64_t{kLanes});
  if (c < width) body(c, width - c);
}

template <class T>
FL_INLINE vf load_some(const T* p, int64_t count) { return count == kLanes ? load(p) : load_n(p, count); }
template <class T>
FL_INLINE void store_some(T* p, vf v, int64_t count) {
  if (count == kLanes)
    store(p, v);
  else
    store_n(p, v, count);
}

}  // namespace
}  // namespace fuseline::FL_ISA
