// fp8 numbers of KV caches, by instructions every GPU has: their bits, shifted to where a wider type has its exponent,
// are the number over a power of two, and every wider type represents it exactly.
#pragma once
#include "cuda/device.h"

namespace fuseline::cuda {

// Cache dtype codes beside those of fuseline/op.h; u8 means e4m3.
constexpr int64_t kE4m3 = static_cast<int64_t>(DType::u8), kE5m2 = kE4m3 + 1;

// One sign bit, kExponent and kFraction bits. e5m2 is the high half of an fp16. e4m3 has no infinities; above its
// largest number there is only NaN, 0x7f.
template <int kExponent, int kFraction> struct Fp8 { uint8_t bits; };
using E4m3 = Fp8<4, 3>;
using E5m2 = Fp8<5, 2>;

template <class T> constexpr int kExponentBits = 8;
template <> inline constexpr int kExponentBits<Half> = 5;
template <int kExponent> constexpr int kBias = (1 << (kExponent - 1)) - 1;
template <int kExponent> constexpr float kLargest = kExponent == 4 ? 448.0f : 57344.0f;
constexpr float power_of_two(int n) { return n == 0 ? 1.0f : 2.0f * power_of_two(n - 1); }
// Ratio of the number to the one its shifted bits represent.
template <class T, int kExponent>
constexpr float kMoved = power_of_two(kBias<kExponentBits<T>> - kBias<kExponent>);

// Converts four numbers to two registers of two.
template <int kExponent, int kFraction, class T>
FL_DEVICE uint2 widen(uint32_t four, Fp8<kExponent, kFraction>, T) {
  constexpr int kShift = kExponentBits<T> - kExponent;
  const auto two = [](uint32_t bytes) {
    const uint32_t bits = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> kShift;
    return kShift == 0 ? bits : times(bits, kMoved<T, kExponent>, T{});
  };
  return {two(first_bytes(four)), two(last_bytes(four))};
}

// Rounds to nearest even, saturates at the largest number, keeps NaN. Normal numbers differ in exponent bias and
// fraction bits; subnormals count steps, to which adding 2^23 rounds.
template <int kExponent, int kFraction>
FL_DEVICE void from_float(float x, Fp8<kExponent, kFraction>& to) {
  constexpr int kDropped = 23 - kFraction;
  const float size = fabsf(x) > kLargest<kExponent> ? kLargest<kExponent> : fabsf(x);
  const uint32_t bits = float_bits(size) - (static_cast<uint32_t>(127 - kBias<kExponent>) << 23);
  uint32_t code = (bits + (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1)) >> kDropped;
  const float of_normal = mul_rn(size, 1 << (kBias<kExponent> - 1));  // over the smallest normal number
  if (of_normal < 1.0f) code = float_bits(add_rn(mul_rn(of_normal, 1 << kFraction), 8388608.0f)) & 0xf;
  if (x != x) code = 0x7f;
  to.bits = static_cast<uint8_t>((code & 0x7f) | (float_bits(x) >> 24 & 0x80));
}

// Calls f with a value of the cache's type, fp8 or T, and returns its result; kBadArgument for other dtypes.
template <class T, class F>
int with_cache(int64_t cache_dtype, int64_t dtype, const F& f) {
  if (cache_dtype == kE4m3) return f(E4m3{});
  if (cache_dtype == kE5m2) return f(E5m2{});
  return cache_dtype == dtype ? f(T{}) : kBadArgument;
}

}  // namespace fuseline::cuda
