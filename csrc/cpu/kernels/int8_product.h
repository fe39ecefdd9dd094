// Rows of int8 x a weight of int8 or int4 codes -> fp32.
//
// A row is quantized by one scale: x = code * scale. Within a group codes are multiplied and summed exactly; a group's
// sum, less zero * (sum of x's codes), is scaled and added in fp32 to those before it, and the total times the row's
// scale. So neither the number of rows nor the instruction set changes the sum of a group.
#pragma once
#include "codes_product.h"
#include "int8_dot.h"

namespace fuseline::FL_ISA {
namespace {

typedef int8_t int8x16 __attribute__((vector_size(16)));
typedef int16_t int16x16 __attribute__((vector_size(32)));

constexpr int64_t kPadded = 64;    // inputs of a row are padded to a multiple,
constexpr int64_t kRowTile = 16;   // and there is room for a multiple of rows

// Quantized rows: operands [rows][step words], sums of codes [rows][G] by group, scales [rows].
struct Int8Rows {
  int64_t rows, step;
  uint32_t* words;
  int32_t* sums;
  float* scales;
};

inline int64_t padded_inputs(int64_t num_k) { return (num_k + kPadded - 1) / kPadded * kPadded; }
// Not a multiple of 1 KiB: rows of a tile would share cache sets.
template <class Kind>
inline int64_t int8_row_words(int64_t num_k) { return padded_inputs(num_k) / (Kind::kIsBytes ? 4 : 2) + 16; }

// 127.5 steps from 0 to the largest magnitude, as compressed-tensors has them; NaN if an input is.
inline float row_scale(const float* x, int64_t num_k) {
  vi most{};
  for (int64_t k = 0; k < num_k; k += kLanes) {
    vi magnitude = (vi)load(x + k) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  int32_t largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  return largest == 0 ? 1.0f : bit_cast<float>(largest) / 127.5f;
}

// codes[k] = x[k] / scale to the nearest of -128 .. 127, ties to even. num_k is a multiple of 16.
inline void quantize_row(const float* x, int64_t num_k, float scale, int8_t* codes) {
  constexpr float kMagic = 12582912.0f;   // 1.5 * 2^23: a sum has its integer in the low bits
  for (int64_t k = 0; k < num_k; k += kLanes) {
    vf ratio = vmin(vmax(load(x + k) / set1(scale), set1(-128.0f)), set1(127.0f));
    vi code = (vi)(ratio + kMagic) - bit_cast<int32_t>(kMagic);
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtepi32_epi8((__m512i)code));
#else
    for (int l = 0; l < kLanes; ++l) codes[k + l] = static_cast<int8_t>(code[l]);
#endif
  }
}

// Codes as operands of the kind.
template <class Kind>
inline void store_operands(const int8_t* codes, int64_t num_k, uint32_t* words) {
  int8x16 order;
  for (int k = 0; k < 16; ++k) order[k] = static_cast<int8_t>(k / 8 * 8 + Kind::kOrder[k % 8]);
  for (int64_t k = 0; k < num_k; k += 16) {
    int8x16 some;
    __builtin_memcpy(&some, codes + k, sizeof some);
    some = __builtin_shuffle(some, order);
    int16x16 wide = __builtin_convertvector(some, int16x16);
    if (Kind::kIsBytes) __builtin_memcpy(words + k / 4, &some, sizeof some);
    else __builtin_memcpy(words + k / 2, &wide, sizeof wide);
  }
}

// Quantizes x[K], padded with zeros to padded_inputs(K), as row r. `fixed`: the scale of
// a finite row, or 0 for its own.
template <class Kind>
void pack_int8_row(const CodedWeight& weight, const Int8Rows& block, const float* x, float fixed, int8_t* codes,
                   int64_t r) {
  int64_t padded = padded_inputs(weight.num_k), group = weight.group ? weight.group : weight.num_k;
  float own = row_scale(x, padded), scale = fixed == 0.0f || own - own != 0.0f ? own : fixed;
  quantize_row(x, padded, scale, codes);
  store_operands<Kind>(codes, padded, block.words + r * block.step);
  for (int64_t g = 0; g < weight.num_groups(); ++g) {
    int64_t end = (g + 1) * group < weight.num_k ? (g + 1) * group : weight.num_k;
    int32_t sum = 0;
    for (int64_t k = g * group; k < end; ++k) sum += codes[k];
    block.sums[r * weight.num_groups() + g] = sum;
  }
  block.scales[r] = scale;
}

// Scales sums of a group of kLanes outputs.
struct GroupScale {
  vf scale, zero{};
  const int32_t* row_sums;    // [rows] of num_groups each
  const float* row_scales;    // [rows]
  int64_t num_groups;
  bool is_first, is_last, has_zeros;
  FL_INLINE GroupScale(const CodedWeight& weight, const Int8Rows& block, int64_t r0, int64_t panel, int64_t g, int v)
      : scale(of_group(weight.scales, panel, g, v)), row_sums(block.sums + r0 * weight.num_groups() + g),
        row_scales(block.scales + r0), num_groups(weight.num_groups()), is_first(g == 0), is_last(g == num_groups - 1),
        has_zeros(weight.zeros.present()) {
    if (has_zeros) zero = of_group(weight.zeros, panel, g, v);
  }
  // Adds the sums of row r0 + r to c, and with the last group scales c by the row's own scale.
  FL_INLINE void add(int64_t r, vi sums, float* c) const {
    vf sum = __builtin_convertvector(sums, vf);
    if (has_zeros) sum = fma(set1(-static_cast<float>(row_sums[r * num_groups])), zero, sum);
    vf total = fma(scale, sum, is_first ? vf{} : load(c));
    store(c, is_last ? total * set1(row_scales[r]) : total);
  }
};

// c[ROWS][PANELS * 16] of rows from r0 on and panels from `panel` on; those `ahead` words on are prefetched.
template <int ROWS, int PANELS, class Kind>
FL_INLINE void int8_tile(const CodedWeight& weight, const Int8Rows& block, int64_t r0, int64_t panel, int64_t ahead,
                         float* c, int64_t ldc) {
  constexpr int kVecs = PANELS * kPanelVecs;
  const uint32_t *x = block.words + r0 * block.step, *panels = weight.words(panel);
  int64_t num_groups = weight.num_groups(), num_words = weight.codes.sizes[1];
  int64_t group_words = weight.group ? weight.group / Kind::kCodes : num_words;
  const int32_t* sums = block.sums + r0 * num_groups;
  for (int64_t g = 0; g < num_groups; ++g) {
    vi acc[ROWS][kVecs];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVecs; ++v) acc[r][v] = set1i(-Kind::kOffset * sums[r * num_groups + g]);
    int64_t end = (g + 1) * group_words < num_words ? (g + 1) * group_words : num_words;
    for (int64_t i = g * group_words; i < end; ++i) {
      vu words[kVecs];
      for (int p = 0; p < PANELS; ++p) {
        const uint32_t* line = panels + p * weight.panel_words() + i * kPanel;
        __builtin_prefetch(line + ahead, 0, 2);
        for (int v = 0; v < kPanelVecs; ++v) words[p * kPanelVecs + v] = load_words(line + v * kLanes);
      }
#pragma GCC unroll 4
      for (int j = 0; j < Kind::kOperands; ++j) {
        vu y[kVecs];
        for (int v = 0; v < kVecs; ++v) y[v] = Kind::operand(words[v], j);
        for (int r = 0; r < ROWS; ++r) {
          vu all = x[r * block.step + i * Kind::kOperands + j] - vu{};
          for (int v = 0; v < kVecs; ++v) acc[r][v] = dot_codes<Kind>(acc[r][v], y[v], all);
        }
      }
    }
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) {
        GroupScale scale(weight, block, r0, panel + p, g, v);
        for (int r = 0; r < ROWS; ++r)
          scale.add(r, acc[r][p * kPanelVecs + v], c + r * ldc + p * kPanel + v * kLanes);
      }
  }
}

template <int ROWS, class Kind>
[[gnu::noinline]] void int8_strip(const CodedWeight& weight, const Int8Rows& block, int64_t r0, int64_t panel,
                                  int num_panels, int64_t ahead, float* c, int64_t ldc) {
  constexpr int kSide = codes_panels(ROWS);
  int p = 0;
  for (; p + kSide <= num_panels; p += kSide)
    int8_tile<ROWS, kSide, Kind>(weight, block, r0, panel + p, ahead, c + p * kPanel, ldc);
  for (; p < num_panels; ++p) int8_tile<ROWS, 1, Kind>(weight, block, r0, panel + p, ahead, c + p * kPanel, ldc);
}

template <class Kind, int ROWS = kTileRows>
FL_INLINE void int8_rows(int rows, const CodedWeight& weight, const Int8Rows& block, int64_t r0, int64_t panel,
                         int num_panels, int64_t ahead, float* c, int64_t ldc) {
  if (rows == ROWS) return int8_strip<ROWS, Kind>(weight, block, r0, panel, num_panels, ahead, c, ldc);
  if constexpr (ROWS > 1) int8_rows<Kind, ROWS - 1>(rows, weight, block, r0, panel, num_panels, ahead, c, ldc);
}

}  // namespace
}  // namespace fuseline::FL_ISA
