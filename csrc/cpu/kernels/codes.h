// Weights of codes of 4, 5 or 8 bits: words[N/16][W][16] (compile/ops/linear_codes.py), and their values.
//
// A source gives operands for kStep inputs at a time: on the bf16-dot path words of two bf16, each for two inputs, else
// fp32. Values are exact in units of kUnit, but for tables, which are rounded to the dtype of x.
#pragma once
#include "fuseline/codes.h"
#include "product.h"

namespace fuseline::FL_ISA {
namespace {

// Values of codes of 4 bits: of int4, the nf4 and fp4 of bitsandbytes, e2m1 of the OCP, iq4nl of llama.cpp, and uint4.
alignas(64) constexpr float kTables[6][16] = {
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0052083333f, 0.6666666667f, 1.0f, 0.3333333333f, 0.5f, 0.1666666667f, 0.25f, -0.0f, -0.0052083333f,
     -0.6666666667f, -1.0f, -0.3333333333f, -0.5f, -0.1666666667f, -0.25f},
    {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f},
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
};

// Whether codes count up from the least value of their group, a float that is stored in the place of its zero:
// weight = code * scale + zero. Of others, weight = (value - zero) * scale.
FL_INLINE bool counts_up(int64_t kind) { return kind == kCodeUint4 || kind == kCodeUint8 || kind == kCodeUint5; }
FL_INLINE bool is_fives(int64_t kind) { return kind == kCodeInt5 || kind == kCodeUint5; }

// --- values of the codes in words ---

struct Int8 {
  static constexpr int kCodes = 4;   // per word
  static constexpr float kUnit = 0x1p-24f;   // a code stays in the upper byte of its word
  FL_INLINE vf value(vu word, int k) const { return __builtin_convertvector(upper_byte(word, k), vf); }
  FL_INLINE static vi upper_byte(vu word, int k) {
    if (k == 3) return (vi)(word & 0xff000000u);
#if defined(__AVX512BW__)
    __m512i places = _mm512_set4_epi32(0x0c808080, 0x08808080, 0x04808080, 0x00808080);
    return (vi)_mm512_shuffle_epi8((__m512i)word, _mm512_add_epi32(places, _mm512_set1_epi32(k << 24)));
#else
    return (vi)((word << (24 - 8 * k)) & 0xff000000u);
#endif
  }
};

// e4m3: 2^(e - 7) * (1 + m / 8), subnormal at e = 0.
struct Fp8 {
  static constexpr int kCodes = 4;
  static constexpr float kUnit = 1.0f;
  FL_INLINE vf value(vu word, int k) const {
    vu magnitude = (k == 3 ? word >> 4 : word << (20 - 8 * k)) & 0x07f00000u;
    vf normal = (vf)(magnitude + (120u << 23)), subnormal = normal + normal - set1(0x1p-6f);
    vf positive = select((vi)(magnitude < (vu{} + (1u << 23))), subnormal, normal);
    return (vf)((vu)positive | ((word << (24 - 8 * k)) & 0x80000000u));
  }
};

struct Nibbles {
  static constexpr int kCodes = 8;
  static constexpr float kUnit = 1.0f;
  const float* table;
  vu pairs{};   // kLanes == 16: table as bf16, twice
  explicit Nibbles(const float* values) : table(values) {
#if defined(__AVX512BW__)
    bf16 both[32];
    for (int i = 0; i < 32; ++i) both[i] = from_float<bf16>(values[i % 16]);
    pairs = load_words(both);
#endif
  }
  static constexpr int shift(int k) { return 8 * (k / 2) / 2 + 16 * (k & 1); }
  FL_INLINE vf value(vu word, int k) const {
    vu code = word >> shift(k);
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_load_ps(table));
#elif defined(__AVX2__)
    __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)code);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)code);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
    vf found;
    for (int l = 0; l < kLanes; ++l) found[l] = table[code[l] & 15];
    return found;
#endif
  }
};

// Integers of 5 bits, less an offset: 32 in four words like those of Nibbles and one of upper bits. Bit 2 w + h of byte b of it
// is of the code whose others are half h of byte b of word w. Only products of integers read them in place.
struct Fives {
  static constexpr int kCodes = 32, kWords = 5;
  static constexpr float kUnit = 1.0f;
  float offset;
  // Of code k of word w.
  FL_INLINE vf value(vu word, vu high, int w, int k) const {
    int at = Nibbles::shift(k), upper = at / 8 * 8 + 2 * w + at / 4 % 2;
    vu code = ((word >> at) & 15u) | ((high >> upper) & 1u) << 4;
    return __builtin_convertvector((vi)code, vf) - set1(offset);
  }
};

// --- operands of the dot path: values of inputs 2j and 2j + 1 as bf16, which hold them exactly ---

template <class Kind>
FL_INLINE vu pair_of(const Kind& kind, vu word, int j) {
  return ((vu)kind.value(word, 2 * j) >> 16) | ((vu)kind.value(word, 2 * j + 1) & 0xffff0000u);
}
#if defined(__AVX512BW__)
// Halves with bytes 2j and 2j + 1 on top.
FL_INLINE __m512i upper_bytes(vu word, int j) {
  __m512i places = _mm512_set4_epi32(0x0d800c80, 0x09800880, 0x05800480, 0x01800080);
  return _mm512_shuffle_epi8((__m512i)word, _mm512_add_epi32(places, _mm512_set1_epi32(0x02000200 * j)));
}
// Halves with a byte on top become sign, exponent and fraction of a bf16; subnormals are looked up.
FL_INLINE __m512i bf16_of(const Fp8&, __m512i h) {
  __m512i magnitude = _mm512_srli_epi16(_mm512_and_si512(h, _mm512_set1_epi16(0x7f00)), 4);
  __m512i normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
  __m512i subnormals = _mm512_set4_epi32(0x3c603c40, 0x3c203c00, 0x3bc03b80, 0x3b000000);   // m / 8 * 2^-6
  __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x80));
  __m512i found = _mm512_mask_permutexvar_epi16(normal, is_small, _mm512_srli_epi16(magnitude, 4), subnormals);
  return _mm512_ternarylogic_epi32(found, h, _mm512_set1_epi16(-0x8000), 0xf8);   // found | (h & sign)
}
FL_INLINE vu pair_of(const Fp8& kind, vu word, int j) { return (vu)bf16_of(kind, upper_bytes(word, j)); }
FL_INLINE vu pair_of(const Nibbles& kind, vu word, int j) {
  return (vu)_mm512_permutexvar_epi16((__m512i)(word >> (4 * j)), (__m512i)kind.pairs);
}
#endif

// Panels of codes, read in place: `words` is the first panel, `step` words apart.
template <class Kind, bool DOT>
struct InPlace {
  static constexpr int kStep = Kind::kCodes, kOperands = DOT ? kStep / 2 : kStep;
  Kind kind;
  const uint32_t* words;
  int64_t step, ahead;   // ahead: of what is read, in words, are prefetched
  FL_INLINE const uint32_t* at(int p) const { return words + p * step; }
  FL_INLINE void fetch(const uint32_t* line) const { __builtin_prefetch(line + ahead, 0, 2); }
  FL_INLINE float unit() const { return Kind::kUnit; }
  FL_INLINE auto operand(vu word, int j) const {
    if constexpr (DOT) return pair_of(kind, word, j);
    else return kind.value(word, j);
  }
  template <class Y>
  FL_INLINE void keep(int, int64_t, int, Y) const {}
};

// The same for the first rows of several tiles: operands are kept for the others, as Decoded reads them.
template <class Kind, bool DOT>
struct Decoding : InPlace<Kind, DOT> {
  uint32_t* decoded;
  int64_t decoded_step;
  template <class Y>
  FL_INLINE void keep(int p, int64_t i, int v, Y y) const {
    store_words(decoded + p * decoded_step + i * kPanel + v * kLanes, (vu)y);
  }
};

// Operands that were decoded before, [panel][k][16] fp32 or [panel][k / 2][16] words of two bf16.
template <bool DOT>
struct Decoded {
  static constexpr int kStep = DOT ? 2 : 1, kOperands = 1;
  const uint32_t* words;
  int64_t step;
  float of_code;   // unit of the values
  FL_INLINE const uint32_t* at(int p) const { return words + p * step; }
  FL_INLINE void fetch(const uint32_t*) const {}
  FL_INLINE float unit() const { return of_code; }
  FL_INLINE auto operand(vu word, int) const {
    if constexpr (DOT) return word;
    else return (vf)word;
  }
  template <class Y>
  FL_INLINE void keep(int, int64_t, int, Y) const {}
};

constexpr int64_t kAhead = 512;   // words that are prefetched while others are decoded

// Decodes num_k inputs, a multiple of kCodes, of a panel.
template <bool DOT, class Kind>
inline void decode_panel(const Kind& kind, const uint32_t* words, int64_t num_k, uint32_t* out) {
  InPlace<Kind, DOT> source{kind, words, 0, 0};
  for (int64_t k = 0; k < num_k; k += Kind::kCodes)
    for (int v = 0; v < kPanelVecs; ++v) {
      const uint32_t* line = words + k / Kind::kCodes * kPanel + v * kLanes;
      __builtin_prefetch(line + kAhead, 0, 2);
      vu word = load_words(line);
      for (int j = 0; j < source.kOperands; ++j)
        store_words(out + (k / (DOT ? 2 : 1) + j) * kPanel + v * kLanes, (vu)source.operand(word, j));
    }
}

// fp32.
inline void decode_panel(const Fives& kind, const uint32_t* words, int64_t num_k, float* out) {
  for (int64_t k = 0; k < num_k; k += Fives::kCodes, words += Fives::kWords * kPanel)
    for (int v = 0; v < kPanelVecs; ++v) {
      vu high = load_words(words + 4 * kPanel + v * kLanes);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w)
        for (int j = 0; j < 8; ++j)
          store(out + (k + 8 * w + j) * kPanel + v * kLanes,
                kind.value(load_words(words + w * kPanel + v * kLanes), high, w, j));
    }
}

// Calls body(kind) with what the codes of a weight stand for; `dtype`: what tables are rounded to.
template <class F>
void with_kind(int64_t code, DType dtype, const F& body) {
  if (code == kCodeInt8 || code == kCodeUint8) return body(Int8{});
  if (code == kCodeFp8) return body(Fp8{});
  if (is_fives(code)) return body(Fives{code == kCodeInt5 ? 16.0f : 0.0f});
  alignas(64) float table[16];
  with_float(dtype, [&](auto t) {
    for (int v = 0; v < 16; v += kLanes)
      store(table + v, round_to<decltype(t)>(load(kTables[code - kCodeInt4] + v)));
  });
  body(Nibbles(table));
}

}  // namespace
}  // namespace fuseline::FL_ISA
