// rows [M, K] x packed weights [N/16][K][16] -> fp32, blocked for the caches; used by linear and experts.
#pragma once
#include "views.h"
#include "tile.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int kDepth = 512;                // k per block: a tile of rows fits L1, 8 panels fit L2
constexpr int kPackedRow = kDepth + 16;    // not a power of two: rows of a tile would share cache sets
constexpr int kMaxPanels = 8;              // panels of one product() call if rows exceed a tile
constexpr int kWideSize = kMaxPanels * kDepth * kPanel;

// Packed rows are [ceil(K / kDepth)][M][kPackedRow] fp32; packed_size is their number of floats. product() accepts a
// range of the M rows: `packed` then points at its first row, and blocks are packed_step(M) apart.
inline int64_t packed_step(int64_t num_rows) { return num_rows * kPackedRow; }
inline int64_t packed_size(int64_t num_rows, int64_t num_k) {
  return (num_k + kDepth - 1) / kDepth * packed_step(num_rows);
}

template <class T>
inline void pack_row(const T* x, int64_t num_k, float* packed, int64_t num_rows, int64_t r) {
  for (int64_t k = 0; k < num_k; k += kDepth, packed += packed_step(num_rows))
    convert_row(x + k, num_k - k < kDepth ? num_k - k : kDepth, packed + r * kPackedRow);
}

// On the bf16-dot path rows stay bf16: [ceil(K / kDepth)][M][kDotRow] words.
constexpr int kDotRow = kDepth / 2 + 16;
inline int64_t dot_step(int64_t num_rows) { return num_rows * kDotRow; }
inline int64_t dot_size(int64_t num_rows, int64_t num_k) { return (num_k + kDepth - 1) / kDepth * dot_step(num_rows); }

inline void pack_dot_row(const bf16* x, int64_t num_k, uint32_t* packed, int64_t num_rows, int64_t r) {
  for (int64_t k = 0; k < num_k; k += kDepth, packed += dot_step(num_rows)) {
    int64_t n = num_k - k < kDepth ? num_k - k : kDepth;
    uint32_t* row = packed + r * kDotRow;
    if (n % 2) row[n / 2] = 0;
    __builtin_memcpy(row, x + k, n * sizeof(bf16));
  }
}

// Converts a panel to fp32 [num_k][16].
template <class T>
inline void widen_panel(const T* panel, int num_k, float* wide) {
  int k = 0;
  if constexpr (kIsPaired<T>) {
    for (; k + 2 <= num_k; k += 2)
      for (int v = 0; v < kPanelVecs; ++v) {
        vu w = load_words(panel + k * kPanel + 2 * v * kLanes);
        store(wide + k * kPanel + v * kLanes, pair_low(w));
        store(wide + (k + 1) * kPanel + v * kLanes, pair_high(w));
      }
  }
  convert_row(panel + k * kPanel, int64_t{num_k - k} * kPanel, wide + k * kPanel);
}

template <class T>
inline void widen_panels(const T* panels, int64_t panel_step, int num_panels, int num_k, float* wide) {
  for (int p = 0; p < num_panels; ++p)
    widen_panel(panels + p * panel_step, num_k, wide + p * kDepth * kPanel);
}

// Multiplies all rows of one depth block, in tiles of nearly equal height.
template <class T>
inline void product_block(const float* a, int64_t num_rows, const T* b, int64_t panel_step, int num_panels, int num_k,
                          float* c, int64_t ldc, bool add) {
  int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < num_tiles; ++t) {
    int64_t r = num_rows * t / num_tiles;
    int rows = static_cast<int>(num_rows * (t + 1) / num_tiles - r);
    tile_rows<kPackedRow>(rows, a + r * kPackedRow, EvenPanels<T>{b, panel_step}, num_panels, num_k, c + r * ldc, ldc,
                          add);
  }
}

// Up to this many rows are limited by memory, and by the latency of the chain of an output: several panels at a time are
// read over all of k. With more rows, the bf16-dot path reads two panels at once and prefetches the next ones.
constexpr int kStreamRows = 6;
constexpr int kStreamPanels = 4;
constexpr int kGroupPanels = 2;

// Few rows: reads panels in place, `group` at a time over all of k.
template <int GROUP, class T>
inline void product_stream(const float* packed, int64_t step, int num_rows, int64_t num_k, const T* panels, int num_panels,
                           float* c, int64_t ldc) {
  int64_t panel_step = num_k * kPanel;
  for (int p = 0; p < num_panels; p += GROUP) {
    const float* a = packed;
    int width = num_panels - p < GROUP ? num_panels - p : GROUP;
    for (int64_t k = 0; k < num_k; k += kDepth, a += step) {
      int depth = static_cast<int>(num_k - k < kDepth ? num_k - k : kDepth);
      EvenPanels<T> b{panels + p * panel_step + k * kPanel, panel_step};
      tile_rows<kPackedRow, GROUP>(num_rows, a, b, width, depth, c + p * kPanel, ldc, k > 0);
    }
  }
}

// c[M][ldc] = rows x panels. More rows than one tile: each block of at most kMaxPanels panels is converted to fp32
// once, in `wide` of kWideSize floats. Fewer rows: panels are read in place, since memory bandwidth is the limit.
template <class T>
inline void product(const float* packed, int64_t step, int64_t num_rows, int64_t num_k, const T* panels, int num_panels,
                    float* wide, float* c, int64_t ldc, int group = 0) {
  int64_t panel_step = num_k * kPanel;
  if (group == 0 && num_rows <= kStreamRows) group = kStreamPanels;
  if (num_rows <= kTileRows && group > 0) {
    int rows = static_cast<int>(num_rows);
    if (group == 1) return product_stream<1>(packed, step, rows, num_k, panels, num_panels, c, ldc);
    if (group == 2) return product_stream<2>(packed, step, rows, num_k, panels, num_panels, c, ldc);
    return product_stream<4>(packed, step, rows, num_k, panels, num_panels, c, ldc);
  }
  for (int64_t k = 0; k < num_k; k += kDepth, packed += step) {
    int depth = static_cast<int>(num_k - k < kDepth ? num_k - k : kDepth);
    const T* b = panels + k * kPanel;
    if (sizeof(T) == 4 || num_rows <= kTileRows) {
      product_block(packed, num_rows, b, panel_step, num_panels, depth, c, ldc, k > 0);
      continue;
    }
    widen_panels(b, panel_step, num_panels, depth, wide);
    product_block(packed, num_rows, wide, kDepth * kPanel, num_panels, depth, c, ldc, k > 0);
  }
}

template <int GROUP>
inline void dot_stream(const uint32_t* packed, int64_t step, int64_t num_rows, int64_t num_k, const bf16* panels,
                       int num_panels, float* c, int64_t ldc) {
  int64_t panel_step = num_k * kPanel, num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  for (int p = 0; p < num_panels; p += GROUP) {
    int width = num_panels - p < GROUP ? num_panels - p : GROUP;
    const uint32_t* a = packed;
    for (int64_t k = 0; k < num_k; k += kDepth, a += step) {
      int depth = static_cast<int>(num_k - k < kDepth ? num_k - k : kDepth);
      EvenPanels<bf16> b{panels + p * panel_step + k * kPanel, panel_step};
      if (num_rows <= kStreamRows) {
        tile_rows<kDotRow, GROUP>(static_cast<int>(num_rows), a, b, width, depth, c + p * kPanel, ldc, k > 0);
        continue;
      }
      AheadPanels<bf16> ahead{b, GROUP * panel_step};
      for (int64_t t = 0; t < num_tiles; ++t) {
        int64_t r = num_rows * t / num_tiles;
        int rows = static_cast<int>(num_rows * (t + 1) / num_tiles - r);
        tile_rows<kDotRow, GROUP>(rows, a + r * kDotRow, ahead, width, depth, c + r * ldc + p * kPanel, ldc, k > 0);
      }
    }
  }
}

// product() for rows packed by pack_dot_row; panels are always read in place.
inline void dot_product(const uint32_t* packed, int64_t step, int64_t num_rows, int64_t num_k, const bf16* panels,
                        int num_panels, float* c, int64_t ldc, int group = 0) {
  if (group == 0) group = num_rows <= kStreamRows ? kStreamPanels : kGroupPanels;
  if (group == 1) return dot_stream<1>(packed, step, num_rows, num_k, panels, num_panels, c, ldc);
  if (group == 2) return dot_stream<2>(packed, step, num_rows, num_k, panels, num_panels, c, ldc);
  dot_stream<4>(packed, step, num_rows, num_k, panels, num_panels, c, ldc);
}

}  // namespace
}  // namespace fuseline::FL_ISA
