// Rows of integers x a weight of integer codes -> fp32.
//
// PLANES 1: a row is quantized to int8 by one scale, x = code * scale. PLANES 2: inputs become numbers of 15 bits,
// high * 256 + low, by a power of two for each block of inputs: bf16 of at least a 64th of their block's largest exactly.
// Within a block codes are multiplied and summed exactly; a block's sum, less zero * (sum of x's codes), is scaled and
// added in fp32 to those before it, with one plane the total times the row's scale. So neither the number of rows nor
// the instruction set changes the sum of a block.
#pragma once
#include "codes_product.h"
#include "int8_dot.h"

namespace fuseline::FL_ISA {
namespace {

typedef int8_t int8x16 __attribute__((vector_size(16)));
typedef int16_t int16x16 __attribute__((vector_size(32)));

constexpr int64_t kPadded = 64;    // inputs of a row are padded to a multiple,
constexpr int64_t kRowTile = 16;   // and with one plane there is room for a multiple of rows
constexpr int64_t kBlock = 128;    // most inputs of a block of PLANES 2
constexpr float kMagic = 12582912.0f;   // 1.5 * 2^23: a sum with it has its nearest integer in the low bits

// Quantized rows: operands [PLANES][rows][step words], sums of codes [rows][B] by block, scales [rows], or [rows][B].
template <int PLANES>
struct IntegerRows {
  int64_t rows, step, plane, block, num_blocks;   // plane: words of one; block: inputs
  uint32_t* words;
  int32_t* sums;
  float* scales;
};

inline int64_t padded_inputs(int64_t num_k) { return (num_k + kPadded - 1) / kPadded * kPadded; }
// Not a multiple of 1 KiB: rows of a tile would share cache sets.
template <class Kind>
inline int64_t int8_row_words(int64_t num_k) { return padded_inputs(num_k) / (Kind::kIsBytes ? 4 : 2) + 16; }
// Inputs that share a scale of the weight, and one of the row if they are few.
template <int PLANES>
inline int64_t block_inputs(const CodedWeight& weight) {
  int64_t group = weight.group ? weight.group : weight.num_k;
  if (PLANES == 1 || (group <= kBlock && weight.group)) return group;
  return kBlock;
}

// The bits of the largest magnitude; those of NaN if there is one. num_k is a multiple of 8.
inline int32_t largest_bits(const float* x, int64_t num_k) {
  vi most{};
  int64_t k = 0;
  for (; k + kLanes <= num_k; k += kLanes) {
    vi magnitude = (vi)load(x + k) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  int32_t largest = 0;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  for (; k < num_k; ++k) {
    int32_t magnitude = bit_cast<int32_t>(x[k]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// 127.5 steps from 0 to the largest magnitude, as compressed-tensors has them; NaN if an input is.
inline float row_scale(const float* x, int64_t num_k) {
  int32_t largest = largest_bits(x, num_k);
  return largest == 0 ? 1.0f : bit_cast<float>(largest) / 127.5f;
}

// codes[k] = x[k] / scale to the nearest of -128 .. 127, ties to even. num_k is a multiple of 16.
inline void quantize_row(const float* x, int64_t num_k, float scale, int8_t* codes) {
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

// x[k] = (high * 256 + low) * scale to the nearest, |high * 256 + low| <= 2^14; returns the scale, NaN if an input is
// not finite. Blocks of numbers too small for a scale are 0.
inline float split_block(const float* x, int64_t num_k, int8_t* high, int8_t* low, int32_t& total) {
  int32_t exponent = largest_bits(x, num_k) >> 23;
  total = 0;
  if (exponent < 32 || exponent == 255) {
    for (int64_t k = 0; k < num_k; ++k) high[k] = low[k] = 0;
    return exponent == 255 ? bit_cast<float>(0x7fc00000) : 0.0f;
  }
  float inverse = bit_cast<float>((267 - exponent) << 23);   // the largest becomes 2^13 to 2^14
  for (int64_t k = 0; k < num_k; ++k) {
    int32_t code = bit_cast<int32_t>(x[k] * inverse + kMagic) - bit_cast<int32_t>(kMagic);
    low[k] = static_cast<int8_t>(code);
    high[k] = static_cast<int8_t>((code - low[k]) >> 8);
    total += code;
  }
  return bit_cast<float>((exponent - 13) << 23);
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

// Quantizes x[K], padded with zeros to padded_inputs(K), as row r; `codes` has room for the planes. `fixed`: the scale of
// a finite row, or 0 for its own.
template <class Kind>
void pack_integers(const CodedWeight& weight, const IntegerRows<1>& rows, const float* x, float fixed, int8_t* codes,
                   int64_t r) {
  int64_t padded = padded_inputs(weight.num_k);
  float own = row_scale(x, padded), scale = fixed == 0.0f || own - own != 0.0f ? own : fixed;
  quantize_row(x, padded, scale, codes);
  store_operands<Kind>(codes, padded, rows.words + r * rows.step);
  for (int64_t b = 0; b < rows.num_blocks; ++b) {
    int64_t end = (b + 1) * rows.block < weight.num_k ? (b + 1) * rows.block : weight.num_k;
    int32_t sum = 0;
    for (int64_t k = b * rows.block; k < end; ++k) sum += codes[k];
    rows.sums[r * rows.num_blocks + b] = sum;
  }
  rows.scales[r] = scale;
}

template <class Kind>
void pack_integers(const CodedWeight& weight, const IntegerRows<2>& rows, const float* x, float, int8_t* codes,
                   int64_t r) {
  int64_t padded = padded_inputs(weight.num_k);
  for (int64_t b = 0; b < rows.num_blocks; ++b) {
    int64_t k = b * rows.block, n = b + 1 < rows.num_blocks ? rows.block : padded - k, at = r * rows.num_blocks + b;
    rows.scales[at] = split_block(x + k, n, codes + k, codes + padded + k, rows.sums[at]);
  }
  for (int p = 0; p < 2; ++p)
    store_operands<Kind>(codes + p * padded, padded, rows.words + p * rows.plane + r * rows.step);
}

// What operands have more than the codes stand for.
template <class Kind>
FL_INLINE int32_t offset_of(const CodedWeight& weight) {
  return Kind::kIsSigned || !weight.counts_up ? Kind::kOffset : 0;
}

// Scales sums of a block of kLanes outputs.
template <int PLANES>
struct BlockScale {
  vf scale, zero{};
  const int32_t* row_sums;    // [rows] of num_blocks each
  const float* row_scales;    // [rows], or of num_blocks each
  int64_t num_blocks;
  bool is_first, is_last, has_zeros, counts_up;
  FL_INLINE BlockScale(const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t r0, int64_t panel, int64_t b,
                       int v)
      : row_sums(rows.sums + r0 * rows.num_blocks + b),
        row_scales(rows.scales + (PLANES == 1 ? r0 : r0 * rows.num_blocks + b)), num_blocks(rows.num_blocks),
        is_first(b == 0), is_last(b == rows.num_blocks - 1), has_zeros(weight.zeros.present()),
        counts_up(weight.counts_up) {
    int64_t group = weight.group ? b * rows.block / weight.group : 0;
    scale = of_group(weight.scales, panel, group, v);
    if (has_zeros) zero = of_group(weight.zeros, panel, group, v);
  }
  // Adds the sums of row r0 + r to c; with one plane, the last block scales c by the row's own scale.
  FL_INLINE void add(int64_t r, vi sums, float* c) const {
    vf sum = __builtin_convertvector(sums, vf);
    if (has_zeros) sum = fma(set1(-static_cast<float>(row_sums[r * num_blocks])), zero, sum);
    vf total = fma(scale, sum, is_first ? vf{} : load(c));
    store(c, is_last ? total * set1(row_scales[r]) : total);
  }
  FL_INLINE void add(int64_t r, vi high, vi low, float* c) const {
    float of_row = row_scales[r * num_blocks];
    vf sum = __builtin_convertvector((high << 8) + low, vf), of_x{};
    if (has_zeros) of_x = set1(static_cast<float>(row_sums[r * num_blocks]));
    if (has_zeros && !counts_up) sum = fma(-of_x, zero, sum);
    vf total = fma(scale * set1(of_row), sum, is_first ? vf{} : load(c));
    store(c, has_zeros && counts_up ? fma(of_x * set1(of_row), zero, total) : total);
  }
};

// c[ROWS][PANELS * 16] of rows from r0 on and panels from `panel` on; those `ahead` words on are prefetched.
template <int ROWS, int PANELS, class Kind, int PLANES>
FL_INLINE void int8_tile(const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t r0, int64_t panel,
                         int64_t ahead, float* c, int64_t ldc) {
  constexpr int kVecs = PANELS * kPanelVecs;
  const uint32_t *x = rows.words + r0 * rows.step, *panels = weight.words(panel);
  int64_t num_units = weight.codes.sizes[1] / Kind::kWords, block_units = (rows.block + Kind::kCodes - 1) / Kind::kCodes;
  const int32_t *sums = rows.sums + r0 * rows.num_blocks, offset = offset_of<Kind>(weight);
  for (int64_t b = 0; b < rows.num_blocks; ++b) {
    // With two planes the low one takes what an offset adds to both.
    vi acc[PLANES][ROWS][kVecs];
    for (int p = 0; p < PLANES; ++p)
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < kVecs; ++v)
          acc[p][r][v] = p == PLANES - 1 ? set1i(-offset * sums[r * rows.num_blocks + b]) : vi{};
    int64_t end = (b + 1) * block_units < num_units ? (b + 1) * block_units : num_units;
    for (int64_t i = b * block_units; i < end; ++i) {
      vu words[kVecs], high[kVecs]{};
      auto load_line = [&](vu* to, int w) {
        for (int p = 0; p < PANELS; ++p) {
          const uint32_t* line = panels + p * weight.panel_words() + (i * Kind::kWords + w) * kPanel;
          __builtin_prefetch(line + ahead, 0, 2);
          for (int v = 0; v < kPanelVecs; ++v) to[p * kPanelVecs + v] = load_words(line + v * kLanes);
        }
      };
      if (Kind::kWords > Kind::kLow) load_line(high, Kind::kLow);
#pragma GCC unroll 4
      for (int w = 0; w < Kind::kLow; ++w) {
        load_line(words, w);
#pragma GCC unroll 4
        for (int j = 0; j < Kind::kOperands; ++j) {
          vu y[kVecs];
          for (int v = 0; v < kVecs; ++v) y[v] = Kind::operand(words[v], high[v], w, j);
          for (int p = 0; p < PLANES; ++p)
            for (int r = 0; r < ROWS; ++r) {
              vu all = x[p * rows.plane + r * rows.step + (i * Kind::kLow + w) * Kind::kOperands + j] - vu{};
              for (int v = 0; v < kVecs; ++v) acc[p][r][v] = dot_codes<Kind>(acc[p][r][v], y[v], all);
            }
        }
      }
    }
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) {
        BlockScale<PLANES> scale(weight, rows, r0, panel + p, b, v);
        for (int r = 0; r < ROWS; ++r) {
          float* to = c + r * ldc + p * kPanel + v * kLanes;
          if constexpr (PLANES == 1) scale.add(r, acc[0][r][p * kPanelVecs + v], to);
          else scale.add(r, acc[0][r][p * kPanelVecs + v], acc[1][r][p * kPanelVecs + v], to);
        }
      }
  }
}

// Panels side by side, and the most rows of a tile: as many sums as there are registers.
template <int PLANES>
constexpr int int8_panels(int rows) {
  if (kLanes == 16) return rows <= (PLANES == 1 ? 2 : 3) ? 4 : 2;
  return kLanes == 8 && rows <= (PLANES == 1 ? 2 : 1) ? 2 : 1;
}
template <int PLANES>
constexpr int kMostRows = PLANES == 1 ? kTileRows : kTileRows / 2;

template <int ROWS, class Kind, int PLANES>
[[gnu::noinline]] void int8_strip(const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t r0, int64_t panel,
                                  int num_panels, int64_t ahead, float* c, int64_t ldc) {
  constexpr int kSide = int8_panels<PLANES>(ROWS);
  int p = 0;
  for (; p + kSide <= num_panels; p += kSide)
    int8_tile<ROWS, kSide, Kind>(weight, rows, r0, panel + p, ahead, c + p * kPanel, ldc);
  for (; p < num_panels; ++p) int8_tile<ROWS, 1, Kind>(weight, rows, r0, panel + p, ahead, c + p * kPanel, ldc);
}

template <class Kind, int PLANES, int ROWS = kMostRows<PLANES>>
FL_INLINE void int8_rows(int num, const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t r0, int64_t panel,
                         int num_panels, int64_t ahead, float* c, int64_t ldc) {
  if (num == ROWS) return int8_strip<ROWS, Kind>(weight, rows, r0, panel, num_panels, ahead, c, ldc);
  if constexpr (ROWS > 1) int8_rows<Kind, PLANES, ROWS - 1>(num, weight, rows, r0, panel, num_panels, ahead, c, ldc);
}

}  // namespace
}  // namespace fuseline::FL_ISA
