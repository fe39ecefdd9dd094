// Exact products of int8 inputs with codes of 8 or 4 bits, summed in int32.
//
// An operand of a weight and one of x hold the same inputs of an output and of a row: four bytes each, those of the
// weight unsigned (a code plus kOffset), or two int16. Products of bytes are added by VNNI in int32; else by pairs in
// int16, for which only those of 4 bits are small enough.
#pragma once
#include "codes.h"

namespace fuseline::FL_ISA {
namespace {

typedef int16_t vs __attribute__((vector_size(kLanes * 4)));

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kHasByteDot = true;
#else
constexpr bool kHasByteDot = false;
#endif
#if defined(__AVX2__)
constexpr bool kHasBytePairs = true;
#else
constexpr bool kHasBytePairs = false;
#endif

// acc + sums of two products of int16.
FL_INLINE vi dot_halves(vi acc, vu a, vu b) {
#if defined(__AVX512BW__)
  return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return acc + ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

// acc + sums of four products of bytes, those of the weight unsigned; without VNNI, below 128.
FL_INLINE vi dot_bytes(vi acc, vu weight, vu x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weight, (__m512i)x);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)weight, (__m256i)x);
#elif defined(__AVX512BW__)
  return dot_halves(acc, (vu)_mm512_maddubs_epi16((__m512i)weight, (__m512i)x), vu{} + 0x10001u);
#elif defined(__AVX2__)
  return dot_halves(acc, (vu)_mm256_maddubs_epi16((__m256i)weight, (__m256i)x), vu{} + 0x10001u);
#else
  return dot_halves(acc, weight, x);
#endif
}

// A kind gives the operands of kCodes codes, which are kWords words: kOperands of each of kLow words, and one of upper bits after them; kOrder has the inputs of
// eight in the order in which operands hold them. kOffset: of codes that do not count up, or of all if kIsSigned.
struct Int8Operands {
  static constexpr bool kIsBytes = kHasByteDot, kIsSigned = true;
  static constexpr int kCodes = 4, kWords = 1, kLow = 1, kOperands = kIsBytes ? 1 : 2, kOffset = kIsBytes ? 128 : 0;
  static constexpr int8_t kOrder[8] = {0, kIsBytes ? 1 : 2, kIsBytes ? 2 : 1, 3,
                                       4, kIsBytes ? 5 : 6, kIsBytes ? 6 : 5, 7};
  FL_INLINE static vu operand(vu word, vu, int, int j) {
    if (kIsBytes) return word ^ 0x80808080u;
    return (vu)((j == 0 ? (vs)word << 8 : (vs)word) >> 8);
  }
};

struct Int4Operands {
  static constexpr bool kIsBytes = kHasByteDot || kHasBytePairs, kIsSigned = false;
  static constexpr int kCodes = 8, kWords = 1, kLow = 1, kOperands = kIsBytes ? 2 : 4, kOffset = 8;
  static constexpr int8_t kOrder[8] = {0, kIsBytes ? 4 : 1, kIsBytes ? 1 : 2, kIsBytes ? 5 : 3,
                                       kIsBytes ? 2 : 4, kIsBytes ? 6 : 5, kIsBytes ? 3 : 6, 7};
  FL_INLINE static vu operand(vu word, vu, int, int j) {
    return (word >> (4 * j)) & (kIsBytes ? 0x0f0f0f0fu : 0x000f000fu);
  }
};

// Codes of 5 bits (Fives), for products of bytes.
struct Int5Operands {
  static constexpr bool kIsBytes = true, kIsSigned = false;
  static constexpr int kCodes = 32, kWords = 5, kLow = 4, kOperands = 2, kOffset = 16;
  static constexpr int8_t kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  FL_INLINE static vu operand(vu word, vu high, int w, int j) {
    const int at = 2 * w + j;
    return ((word >> (4 * j)) & 0x0f0f0f0fu) | ((at < 4 ? high << (4 - at) : high >> (at - 4)) & 0x10101010u);
  }
};

FL_INLINE bool is_integer(int64_t kind) {
  return kind == kCodeInt8 || kind == kCodeUint8 || kind == kCodeInt4 || kind == kCodeUint4 || is_fives(kind);
}
// Calls body with the operands of a kind of integers.
template <class F>
void with_operands(int64_t kind, const F& body) {
  if (kind == kCodeInt4 || kind == kCodeUint4) return body(Int4Operands{});
  if (is_fives(kind)) return body(Int5Operands{});
  body(Int8Operands{});
}

template <class Kind>
FL_INLINE vi dot_codes(vi acc, vu weight, vu x) {
  return Kind::kIsBytes ? dot_bytes(acc, weight, x) : dot_halves(acc, weight, x);
}

}  // namespace
}  // namespace fuseline::FL_ISA
