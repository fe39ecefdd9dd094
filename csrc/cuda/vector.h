// Loads and stores of neighbouring numbers as floats, as one vector if aligned, else one by one.
#pragma once
#include "cuda/device.h"

namespace fuseline::cuda {

template <class T>
constexpr int kWide = 16 / sizeof(T);

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Some { T at[kCount]; };

// As they lie in memory, in fewer registers than as floats.
template <int kCount, class T>
FL_DEVICE Some<T, kCount> some_of(const T* from) {
  return *reinterpret_cast<const Some<T, kCount>*>(from);
}

template <int kCount, class T>
FL_DEVICE void widen(float (&to)[kCount], const Some<T, kCount>& some) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) to[k] = to_float(some.at[k]);
}

template <int kCount, class T>
FL_DEVICE void load(float (&to)[kCount], const T* from) {
  widen(to, some_of<kCount>(from));
}

template <int kCount, class T>
FL_DEVICE void store(T* to, const float (&from)[kCount]) {
  Some<T, kCount> some;
#pragma unroll
  for (int k = 0; k < kCount; ++k) some.at[k] = cast<T>(from[k]);
  *reinterpret_cast<Some<T, kCount>*>(to) = some;
}

// Whether pointers and strides (or sizes), counted in elements of `size` bytes, are multiples of `bytes`.
template <class... S>
bool is_aligned(int64_t bytes, int64_t size, std::initializer_list<const void*> pointers, S... strides) {
  uint64_t all = ((static_cast<uint64_t>(strides) * size) | ... | 0);
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  return all % bytes == 0;
}

}  // namespace fuseline::cuda
