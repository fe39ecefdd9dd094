// The product of int8_product.h by AMX, which multiplies 16 rows x 64 inputs x 16 outputs at a time.
//
// Words of int8 codes are its operand as they are; those of int4 are unpacked once for all rows, less 8. Sums are exact
// and scaled by the same code, so that they are those of the vector instructions.
#pragma once
#include "int8_product.h"

namespace fuseline::FL_ISA {
namespace {

#if defined(__AMX_INT8__)
constexpr int64_t kTileMinRows = 24;   // fewer are limited by memory
constexpr int kTile = 16;             // rows, outputs, and words of inputs

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums of two times 16 rows by two panels, 4 and 5 rows, 6 and 7 panels, of `words` of inputs each.
inline void configure_tiles(int words) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 6 ? kTile : words);
    config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? words * 4 : 64);
  }
  _tile_loadconfig(&config);
}

// Operands of a panel, [padded_inputs(K) / 4][16]: in place, or made in `space`.
template <class Kind>
inline const uint32_t* tile_operands(const CodedWeight& weight, int64_t panel, uint32_t* space) {
  const uint32_t* words = weight.words(panel);
  int64_t num_words = weight.codes.sizes[1];
  if (Kind::kCodes == 4 && num_words % kTile == 0) return words;
  for (int64_t i = 0; i < num_words; ++i)
    for (int j = 0; j < Kind::kOperands; ++j) {
      vu word = load_words(words + i * kPanel);
      if (Kind::kCodes == 8) word = (vu)_mm512_sub_epi8((__m512i)Kind::operand(word, j), _mm512_set1_epi8(8));
      store_words(space + (i * Kind::kOperands + j) * kPanel, word);
    }
  return space;
}

// Sums of a group: those of rows [0, 16) and, if there are more, [16, 32), by two panels.
inline void sum_tiles(const uint32_t* x, int64_t step, bool has_more, const uint32_t* first, const uint32_t* second,
                         int64_t num_words, int tile_words) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < num_words; i += tile_words) {
    _tile_loadd(4, x + i, step * 4);
    _tile_loadd(6, first + i * kPanel, 64);
    _tile_loadd(7, second + i * kPanel, 64);
    if (has_more) { _tile_loadd(5, x + kTile * step + i, step * 4); }
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if (!has_more) continue;
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

// c[rows][ldc] of one or two panels. `space` has room for the operands of two.
template <class Kind>
void multiply_tiles(const CodedWeight& weight, const Int8Rows& block, int64_t panel, int num_panels, uint32_t* space,
                    float* c, int64_t ldc) {
  int64_t padded = padded_inputs(weight.num_k), group = weight.group ? weight.group : padded;
  int tile_words = group < 64 ? static_cast<int>(group / 4) : kTile;
  const uint32_t* first = tile_operands<Kind>(weight, panel, space);
  const uint32_t* second = first;
  if (num_panels == 2) second = tile_operands<Kind>(weight, panel + 1, space + padded / 4 * kPanel);
  asm volatile("" ::: "memory");   // gcc does not know that tiles are loaded from memory
  alignas(64) int32_t sums[4][kTile * kPanel];
  configure_tiles(tile_words);
  for (int64_t r0 = 0; r0 < block.rows; r0 += 2 * kTile)
    for (int64_t g = 0; g < weight.num_groups(); ++g) {
      int64_t at = g * group / 4, end = (g + 1) * group < padded ? (g + 1) * group / 4 : padded / 4;
      bool has_more = block.rows - r0 > kTile;
      sum_tiles(block.words + r0 * block.step + at, block.step, has_more, first + at * kPanel, second + at * kPanel,
                end - at, tile_words);
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      if (has_more) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
      }
      for (int half = 0; half < (has_more ? 2 : 1); ++half)
        for (int p = 0; p < num_panels; ++p) {
          int64_t first_row = r0 + half * kTile, rows = block.rows - first_row;
          GroupScale scale(weight, block, first_row, panel + p, g, 0);
          float* to = c + first_row * ldc + p * kPanel;
          for (int64_t r = 0; r < (rows < kTile ? rows : kTile); ++r, to += ldc)
            scale.add(r, (vi)load_words(sums[half * 2 + p] + r * kPanel), to);
        }
    }
}

template <class Kind>
void multiply_by_tiles(const CodedWeight& weight, const Int8Rows& block, int64_t panel, int num_panels, uint32_t* space,
                       float* c, int64_t ldc) {
  for (int p = 0; p < num_panels; p += 2)
    multiply_tiles<Kind>(weight, block, panel + p, num_panels - p < 2 ? 1 : 2, space, c + p * kPanel, ldc);
  _tile_release();
}
#else
constexpr int64_t kTileMinRows = 1 << 30;
template <class Kind>
void multiply_by_tiles(const CodedWeight&, const Int8Rows&, int64_t, int, uint32_t*, float*, int64_t) {}
#endif

// Words of space that a product of `rows` rows needs.
inline int64_t operand_words(const CodedWeight& weight, int64_t rows) {
  return rows < kTileMinRows ? 0 : padded_inputs(weight.num_k) / 2 * kPanel;
}

// c[rows][ldc] of panels from `panel` on: some panels at a time stay in a cache for all tiles of rows.
template <class Kind>
void multiply_int8_panels(const CodedWeight& weight, const Int8Rows& block, int64_t panel, int num_panels,
                          uint32_t* space, float* c, int64_t ldc) {
  if (block.rows >= kTileMinRows) return multiply_by_tiles<Kind>(weight, block, panel, num_panels, space, c, ldc);
  constexpr int kSide = codes_panels(1);
  int64_t num_tiles = (block.rows + kTileRows - 1) / kTileRows;
  for (int p = 0; p < num_panels; p += kSide) {
    int width = num_panels - p < kSide ? num_panels - p : kSide;
    for (int64_t t = 0; t < num_tiles; ++t) {
      int64_t r = block.rows * t / num_tiles, rows = block.rows * (t + 1) / num_tiles - r;
      int64_t ahead = t == 0 ? kSide * weight.panel_words() : 0;
      int8_rows<Kind>(static_cast<int>(rows), weight, block, r, panel + p, width, ahead, c + r * ldc + p * kPanel, ldc);
    }
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
