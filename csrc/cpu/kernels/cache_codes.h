// KV caches of one byte a number: int8 with a scale for each token and head, or fp8 with one scale for a layer.
//
// Numbers of a key lie in words of four, panels of words as those of a weight of codes (codes.h): a block [B][D] as
// [B / W][D / 4][W][4], W as in keys.h; behind each panel of int8 lie its scales, W of fp32. Values lie as rows [B][E],
// each of int8 with its scale behind it. D and E of int8 are multiples of 4.
#pragma once
#include "codes.h"
#include "keys.h"
#include "views.h"

namespace fuseline::FL_ISA {
namespace {

// e5m2: 2^(e - 15) * (1 + m / 4), subnormal at e = 0.
struct Fp8Wide {
  static constexpr int kCodes = 4;
  static constexpr float kUnit = 1.0f;
  FL_INLINE vf value(vu word, int k) const {
    vu byte = word << (24 - 8 * k), magnitude = (byte & 0x7f000000u) >> 3;
    vf normal = (vf)(magnitude + (112u << 23)), subnormal = normal + normal - set1(0x1p-14f);
    vf positive = select((vi)(magnitude < (vu{} + (1u << 23))), subnormal, normal);
    return (vf)((vu)positive | (byte & 0x80000000u));
  }
};

#if defined(__AVX512BW__)
FL_INLINE __m512i bf16_of(const Fp8Wide&, __m512i h) {
  __m512i magnitude = _mm512_srli_epi16(_mm512_and_si512(h, _mm512_set1_epi16(0x7f00)), 3);
  __m512i normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16(112 << 7));
  __m512i subnormals = _mm512_set1_epi64(0x3840380037800000);   // m / 4 * 2^-14
  __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x80));
  __m512i found = _mm512_mask_permutexvar_epi16(normal, is_small, _mm512_srli_epi16(magnitude, 5), subnormals);
  return _mm512_ternarylogic_epi32(found, h, _mm512_set1_epi16(-0x8000), 0xf8);   // found | (h & sign)
}
FL_INLINE vu pair_of(const Fp8Wide& kind, vu word, int j) { return (vu)bf16_of(kind, upper_bytes(word, j)); }
#endif

template <class F>
FL_INLINE void with_cache_kind(int64_t code, const F& body) {
  if (code == kCacheInt8) return body(Int8{});
  if (code == kCacheE4m3) return body(Fp8{});
  body(Fp8Wide{});
}

// Bytes of a token's scale.
constexpr int64_t scale_bytes(int64_t code) { return code == kCacheInt8 ? sizeof(float) : 0; }

FL_INLINE float cache_unit(int64_t code) { return code == kCacheInt8 ? Int8::kUnit : 1.0f; }

// Byte of a block where word `w` of key `within` lies. `row`: bytes of a key with its scale.
FL_INLINE int64_t key_word(int64_t block_size, int64_t row, int64_t within, int64_t w) {
  int64_t lanes = key_lanes(block_size), lane = within % lanes;
  return (within - lane) * row + (w * lanes + lane) * 4;
}

// --- numbers to codes ---

// The code of kLanes numbers in the low byte of each word, rounded to nearest even.
FL_INLINE vu int8_codes(vf x) { return (vu)(x + 12582912.0f) & 0xffu; }   // 1.5 * 2^23

// Numbers of MANTISSA bits; below 2^-kBias, steps are those of `magic`'s unit in the last place.
template <int MANTISSA, uint32_t BIAS>
FL_INLINE vu fp8_codes(vf x, float largest, float magic) {
  constexpr int kShift = 23 - MANTISSA;
  vf clamped = select((vi)(x != x), x, vmax(vmin(x, set1(largest)), set1(-largest)));
  vu sign = (vu)clamped & 0x80000000u, magnitude = (vu)clamped ^ sign;
  vu normal = ((magnitude + ((1u << (kShift - 1)) - 1) + ((magnitude >> kShift) & 1u)) >> kShift) - (BIAS << MANTISSA);
  vu small = (vu)((vf)magnitude + magic) - bit_cast<uint32_t>(magic);
  vu is_small = (vu)(magnitude < (vu{} + ((BIAS + 1) << 23)));
  vu is_nan = (vu)(magnitude > (vu{} + 0x7f800000u));
  vu bits = (is_small & small) | (~is_small & normal);
  return (is_nan & 0x7fu) | (~is_nan & bits) | (sign >> 24);
}

FL_INLINE vu cache_codes(int64_t code, vf x) {
  if (code == kCacheInt8) return int8_codes(x);
  return code == kCacheE4m3 ? fp8_codes<3, 120>(x, 448.0f, 0x1p14f) : fp8_codes<2, 112>(x, 57344.0f, 0x1p7f);
}

// Codes of x[n], divided by a scale: int8's own, which is returned, else `scale`.
template <class T>
inline float encode_row(int64_t code, const T* x, int64_t n, float scale, uint8_t* out) {
  if (code == kCacheInt8) {
    vf top{};
    for_columns(n, [&](int64_t c, int64_t count) { top = vmax(vabs(load_some(x + c, count)), top); });
    scale = hmax(top) / 127.0f;
  }
  float by = scale == 0.0f ? 1.0f : scale;   // of zeros
  for_columns(n, [&](int64_t c, int64_t count) {
    vu codes = cache_codes(code, load_some(x + c, count) / by);
    for (int64_t l = 0; l < count; ++l) out[c + l] = static_cast<uint8_t>(codes[l]);
  });
  return scale;
}

// --- codes to operands of attention, in units of cache_unit ---

FL_INLINE vu load_bytes(const uint8_t* p, int64_t count) {
  typedef uint8_t vb __attribute__((vector_size(kLanes)));
  vb bytes{};
  __builtin_memcpy(&bytes, p, count);
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32((__m128i)bytes);
#else
  return __builtin_convertvector(bytes, vu);
#endif
}

#if defined(__AVX512BF16__)
// Values of 2 kLanes codes, as bf16.
template <class Kind>
FL_INLINE vu bf16_values(const Kind& kind, const uint8_t* row) {
  return (vu)bf16_of(kind, _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)row)), 8));
}
FL_INLINE vu bf16_values(const Int8& kind, const uint8_t* row) {
  return narrow_pairs(kind.value(load_bytes(row, kLanes), 0), kind.value(load_bytes(row + kLanes, kLanes), 0));
}
#endif

// out[n] = values of codes; bf16 holds them exactly.
template <class T, class Kind>
FL_INLINE void decode_row(const Kind& kind, const uint8_t* row, int64_t n, T* out) {
  int64_t done = 0;
#if defined(__AVX512BF16__)
  if constexpr (kIsPaired<T>)
    for (; done + 2 * kLanes <= n; done += 2 * kLanes) store_words(out + done, bf16_values(kind, row + done));
#endif
  for_columns(n - done, [&](int64_t c, int64_t count) {
    store_some(out + done + c, kind.value(load_bytes(row + done + c, count), 0), count);
  });
}

}  // namespace
}  // namespace fuseline::FL_ISA
