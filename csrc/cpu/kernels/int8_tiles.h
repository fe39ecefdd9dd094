// The product of int8_product.h by AMX, which multiplies 16 rows x 64 inputs x 16 outputs at a time.
//
// Words of int8 codes are its operand as they are; those of fewer bits are unpacked once for all rows, less their offset. Sums are exact
// and scaled by the same code, so that they are those of the vector instructions.
#pragma once
#include "int8_product.h"
#include "tile_config.h"

namespace fuseline::FL_ISA {
namespace {

#if defined(__AMX_INT8__)
template <int PLANES>
constexpr int64_t kTileMinRows = PLANES == 1 ? 24 : 12;   // fewer are limited by memory
// Operands of a panel, [padded_inputs(K) / 4][16]: in place, or made in `space`.
template <class Kind>
inline const uint32_t* tile_operands(const CodedWeight& weight, int64_t panel, uint32_t* space) {
  const uint32_t* words = weight.words(panel);
  int64_t num_words = weight.codes.sizes[1];
  if (Kind::kIsSigned && num_words % kTile == 0) return words;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(offset_of<Kind>(weight)));
  uint32_t* to = space;
  for (const uint32_t* end = words + num_words * kPanel; words < end; words += Kind::kWords * kPanel) {
    vu high = load_words(words + (Kind::kWords - 1) * kPanel);
#pragma GCC unroll 4
    for (int w = 0; w < Kind::kLow; ++w) {
      vu word = load_words(words + w * kPanel);
      for (int j = 0; j < Kind::kOperands; ++j, to += kPanel) {
        vu some = word;
        if (!Kind::kIsSigned) some = (vu)_mm512_sub_epi8((__m512i)Kind::operand(word, high, w, j), offset);
        store_words(to, some);
      }
    }
  }
  return space;
}

// Sums of a block: those of 16 rows and, if there are, `others`, by two panels. With two planes, the low one of the same
// rows takes the place of others.
inline void sum_tiles(const uint32_t* x, const uint32_t* others, int64_t step, const uint32_t* first,
                      const uint32_t* second, int64_t num_words, int tile_words) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < num_words; i += tile_words) {
    _tile_loadd(4, x + i, step * 4);
    _tile_loadd(6, first + i * kPanel, 64);
    _tile_loadd(7, second + i * kPanel, 64);
    if (others) { _tile_loadd(5, others + i, step * 4); }
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (!others) continue;
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

// c[rows][ldc] of one or two panels. `space` has room for the operands of two.
template <class Kind, int PLANES>
void multiply_tiles(const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t panel, int num_panels,
                    uint32_t* space, float* c, int64_t ldc) {
  constexpr int kHalves = PLANES == 1 ? 2 : 1;
  int64_t padded = padded_inputs(weight.num_k), block = rows.num_blocks == 1 ? padded : rows.block;
  int tile_words = block < 64 ? static_cast<int>(block / 4) : kTile;
  const uint32_t* first = tile_operands<Kind>(weight, panel, space);
  const uint32_t* second = first;
  if (num_panels == 2) second = tile_operands<Kind>(weight, panel + 1, space + padded / 4 * kPanel);
  asm volatile("" ::: "memory");   // gcc does not know that tiles are loaded from memory
  alignas(64) int32_t sums[4][kTile * kPanel];
  for (int64_t r0 = 0; r0 < rows.rows; r0 += kHalves * kTile) {
    bool is_short = PLANES == 2 && rows.rows - r0 < kTile;   // with one plane there is room for all
    int64_t height = is_short ? rows.rows - r0 : kTile;
    if (r0 == 0 || is_short) configure_tiles(tile_words, height, height);
    for (int64_t b = 0; b < rows.num_blocks; ++b) {
      int64_t at = b * block / 4, end = (b + 1) * block < padded ? (b + 1) * block / 4 : padded / 4;
      const uint32_t *x = rows.words + r0 * rows.step + at, *others = nullptr;
      if (PLANES == 2) others = x + rows.plane;
      else if (rows.rows - r0 > kTile) others = x + kTile * rows.step;
      sum_tiles(x, others, rows.step, first + at * kPanel, second + at * kPanel, end - at, tile_words);
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      if (others) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
      }
      for (int half = 0; half < (PLANES == 1 && others ? 2 : 1); ++half)
        for (int p = 0; p < num_panels; ++p) {
          int64_t first_row = r0 + half * kTile, left = rows.rows - first_row;
          BlockScale<PLANES> scale(weight, rows, first_row, panel + p, b, 0);
          float* to = c + first_row * ldc + p * kPanel;
          auto sum = [&](int tile, int64_t r) { return (vi)load_words(sums[tile + p] + r * kPanel); };
          for (int64_t r = 0; r < (left < kTile ? left : kTile); ++r, to += ldc) {
            if constexpr (PLANES == 1) scale.add(r, sum(half * 2, r), to);
            else scale.add(r, sum(0, r), sum(2, r), to);
          }
        }
    }
  }
}

template <class Kind, int PLANES>
void multiply_by_tiles(const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t panel, int num_panels,
                       uint32_t* space, float* c, int64_t ldc) {
  for (int p = 0; p < num_panels; p += 2)
    multiply_tiles<Kind>(weight, rows, panel + p, num_panels - p < 2 ? 1 : 2, space, c + p * kPanel, ldc);
  _tile_release();
}
#else
template <int PLANES>
constexpr int64_t kTileMinRows = 1 << 30;
template <class Kind, int PLANES>
void multiply_by_tiles(const CodedWeight&, const IntegerRows<PLANES>&, int64_t, int, uint32_t*, float*, int64_t) {}
#endif

// Words of space that a product of `rows` rows needs.
template <int PLANES>
inline int64_t operand_words(const CodedWeight& weight, int64_t rows) {
  return rows < kTileMinRows<PLANES> ? 0 : padded_inputs(weight.num_k) / 2 * kPanel;
}

// c[rows][ldc] of panels from `panel` on: some panels at a time stay in a cache for all tiles of rows.
template <class Kind, int PLANES>
void multiply_int8_panels(const CodedWeight& weight, const IntegerRows<PLANES>& rows, int64_t panel, int num_panels,
                          uint32_t* space, float* c, int64_t ldc) {
  if (rows.rows >= kTileMinRows<PLANES>) return multiply_by_tiles<Kind>(weight, rows, panel, num_panels, space, c, ldc);
  constexpr int kSide = int8_panels<PLANES>(1);
  int64_t num_tiles = (rows.rows + kMostRows<PLANES> - 1) / kMostRows<PLANES>;
  for (int p = 0; p < num_panels; p += kSide) {
    int width = num_panels - p < kSide ? num_panels - p : kSide;
    for (int64_t t = 0; t < num_tiles; ++t) {
      int64_t r = rows.rows * t / num_tiles, num = rows.rows * (t + 1) / num_tiles - r;
      int64_t ahead = t == 0 ? kSide * weight.panel_words() : 0;
      int8_rows<Kind, PLANES>(static_cast<int>(num), weight, rows, r, panel + p, width, ahead, c + r * ldc + p * kPanel,
                              ldc);
    }
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
