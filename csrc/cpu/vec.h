// Vectors of kLanes fp32 numbers for the ISA a source is compiled for, and conversions of bf16 and f16.
// Everything has internal linkage: otherwise the linker could keep one ISA's copy for all.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fuseline/op.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fuseline::FL_ISA {
namespace {

#define FL_INLINE [[gnu::always_inline]] inline

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

// Storage types of the two 16-bit formats.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From>
FL_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  __builtin_memcpy(&r, &v, sizeof r);
  return r;
}

FL_INLINE vf set1(float x) { return x - vf{}; }
FL_INLINE vi set1i(int32_t x) { return x - vi{}; }
FL_INLINE vf zero() { return vf{}; }

// a * b + c, rounded once where the ISA has fma.
FL_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

FL_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
// If `a` is NaN the result is b, as with the SSE instructions.
FL_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
FL_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
FL_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

FL_INLINE vf vsqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)a);
#else
  for (int k = 0; k < kLanes; ++k) a[k] = __builtin_sqrtf(a[k]);
  return a;
#endif
}

// Horizontal sum by halves, in one fixed tree.
FL_INLINE float hsum(vf v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}

template <int HALF>
FL_INLINE vf max_halves(vf v) {
  vi other;
  for (int k = 0; k < kLanes; ++k) other[k] = k ^ HALF;
  v = vmax(v, __builtin_shuffle(v, other));
  if constexpr (HALF > 1) return max_halves<HALF / 2>(v);
  return v;
}

FL_INLINE float hmax(vf v) {
  return max_halves<kLanes / 2>(v)[0];
}

// --- bf16: the upper half of an fp32, rounded to nearest even; NaN stays NaN ---

// gcc 12 emits three instructions for a 256-to-512-bit conversion where one exists.
FL_INLINE vu widen_half(vh h) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}
FL_INLINE vh narrow_word(vu u) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, vh);
#endif
}

// Two bf16 of a word, as fp32.
FL_INLINE vf pair_low(vu w) { return (vf)(w << 16); }
FL_INLINE vf pair_high(vu w) { return (vf)(w & 0xffff0000u); }

// acc + a.low * b.low + a.high * b.high, by pairs.
#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
FL_INLINE vf dot_pairs(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
// Interleaves 32 numbers of two rows into pairs (a[l], b[l]), 16 per vector.
FL_INLINE void pair_rows(const bf16* a, const bf16* b, vu* pairs) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b), places = _mm512_load_si512(kFirst);
  pairs[0] = (vu)_mm512_permutex2var_epi16(x, places, y);
  pairs[1] = (vu)_mm512_permutex2var_epi16(x, _mm512_add_epi16(places, _mm512_set1_epi16(16)), y);
}
// Rounds two vectors to bf16, to nearest even, concatenated; subnormals become 0.
FL_INLINE vu narrow_pairs(vf a, vf b) { return (vu)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
#else
constexpr bool kHasDot = false;
FL_INLINE vf dot_pairs(vf acc, vu a, vu b) {
  return fma(pair_high(a), pair_high(b), fma(pair_low(a), pair_low(b), acc));
}
#endif

FL_INLINE vf widen_bf16(vh h) { return (vf)(widen_half(h) << 16); }

FL_INLINE vh narrow_bf16(vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  vu bits = (vu)(v != v) & nan;
  bits |= ~(vu)(v != v) & rounded;
  return narrow_word(bits);
}

// --- f16: F16C where the ISA has it, else integer arithmetic with the same result ---

#if !defined(__F16C__)
FL_INLINE vf widen_f16_soft(vh h) {
  vu u = __builtin_convertvector(h, vu);
  vu magnitude = (u & 0x7fffu) << 13;
  // Multiplying by 2^112 corrects the exponent bias and normalizes f16 subnormals.
  vf scaled = (vf)magnitude * bit_cast<float>(uint32_t{0x77800000});
  vi special = (vi)(magnitude >= vu{} + 0x0f800000u);
  vf value = select(special, (vf)(magnitude | 0x7f800000u), scaled);
  return (vf)((vu)value | ((u & 0x8000u) << 16));
}

FL_INLINE vh narrow_f16_soft(vf v) {
  vu sign = (vu)v & 0x80000000u;
  vu magnitude = (vu)v ^ sign;
  vu odd = (magnitude >> 13) & 1u;
  vu normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  // Adding 0.5 leaves the f16 subnormal's bits, rounded to even, in the low bits of the sum.
  vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  vu is_small = (vu)(magnitude < vu{} + 0x38800000u);
  vu is_big = (vu)(magnitude >= vu{} + 0x47800000u);
  vu is_nan = (vu)(magnitude > vu{} + 0x7f800000u);
  vu bits = (is_small & subnormal) | (~is_small & normal);
  bits = (is_big & 0x7c00u) | (~is_big & bits);
  bits = (is_nan & ((magnitude >> 13) & 0x3ffu & 0xffffu)) | bits;
  bits |= is_nan & 0x7e00u;
  return __builtin_convertvector(bits | (sign >> 16), vh);
}
#endif

FL_INLINE vf widen_f16(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  return widen_f16_soft(h);
#endif
}

FL_INLINE vh narrow_f16(vf v) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return narrow_f16_soft(v);
#endif
}

// --- loads and stores of kLanes numbers, unaligned, to and from fp32 ---

FL_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FL_INLINE vf load(const bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_bf16(h);
}
FL_INLINE vf load(const f16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_f16(h);
}
FL_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
FL_INLINE void store(bf16* p, vf v) {
  vh h = narrow_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
FL_INLINE void store(f16* p, vf v) {
  vh h = narrow_f16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

FL_INLINE vu load_words(const void* p) {
  vu v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FL_INLINE void store_words(void* p, vu v) { __builtin_memcpy(p, &v, sizeof v); }

// Loads or stores the first `n` < kLanes numbers; other lanes read as zero and are not written.
template <class T>
FL_INLINE vf load_n(const T* p, int64_t n) {
  T lane[kLanes] = {};
  for (int64_t k = 0; k < n; ++k) lane[k] = p[k];
  return load(lane);
}
template <class T>
FL_INLINE void store_n(T* p, vf v, int64_t n) {
  T lane[kLanes];
  store(lane, v);
  for (int64_t k = 0; k < n; ++k) p[k] = lane[k];
}

// Value after a store and load as T: kernels call round_to<T> where Transformers rounds.
template <class T>
FL_INLINE vf round_to(vf v);
template <>
FL_INLINE vf round_to<float>(vf v) { return v; }
template <>
FL_INLINE vf round_to<bf16>(vf v) { return widen_bf16(narrow_bf16(v)); }
template <>
FL_INLINE vf round_to<f16>(vf v) { return widen_f16(narrow_f16(v)); }

// Scalars take the vector code, so a tail rounds exactly as whole vectors do.
template <class T>
FL_INLINE float to_float(T x) { return load_n(&x, 1)[0]; }
template <>
FL_INLINE float to_float(float x) { return x; }
template <>
FL_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
template <class T>
FL_INLINE T from_float(float x) {
  T r;
  store_n(&r, set1(x), 1);
  return r;
}
template <>
FL_INLINE float from_float<float>(float x) { return x; }

}  // namespace
}  // namespace fuseline::FL_ISA
