// The register tile that every matrix product here is made of, in linear, attention and experts.
//
// c[r][p][lane] (+)= sum over k, ascending, of a[r][k] * b[p][k][lane]: one chain of fma() per element, so an element's
// value depends neither on how many rows or panels share the tile nor on where the sum over k is cut.
#pragma once
#include "cpu/vec.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int kPanel = 16;                    // outputs of a panel
constexpr int kPanelVecs = kPanel / kLanes;   // vectors that hold one k of a panel
constexpr int kPrefetch = 2048;                // elements ahead of the one in use, when a tile is too thin to hide it
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 3;

// Panels side by side in a tile of `rows` rows: as many accumulators as the registers hold.
constexpr int tile_panels(int rows) {
  if (kLanes == 16) return rows <= 6 ? 4 : 2;
  if (kLanes == 8) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  return rows == 1 ? 2 : 1;
}

// a: [ROWS][LDA]; b: panels of [num_k][16], `panel_step` elements apart; c: rows `ldc` floats apart, panels 16 apart.
template <int ROWS, int PANELS, int LDA, class T>
FL_INLINE void tile(const float* a, const T* b, int64_t panel_step, int num_k, float* c, int64_t ldc, bool add) {
  constexpr int kVecs = PANELS * kPanelVecs;
  vf acc[ROWS][kVecs];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = add ? load(c + r * ldc + v * kLanes) : set1(0.0f);
  auto step = [&](int k) __attribute__((always_inline)) {
    vf y[kVecs];
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) y[p * kPanelVecs + v] = load(b + p * panel_step + k * kPanel + v * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      vf x = set1(a[r * LDA + k]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
  };
  int k = 0;
  if constexpr (ROWS <= 4 && sizeof(T) == 2) {
    for (; k + 2 <= num_k; k += 2) {   // two k of a panel are one cache line
      for (int p = 0; p < PANELS; ++p) __builtin_prefetch(b + p * panel_step + k * kPanel + kPrefetch);
      step(k);
      step(k + 1);
    }
  }
  for (; k < num_k; ++k) step(k);
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int ROWS, int LDA, class T>
[[gnu::noinline]] void tile_strip(const float* a, const T* b, int64_t panel_step, int num_panels, int num_k, float* c,
                                  int64_t ldc, bool add) {
  constexpr int kStep = tile_panels(ROWS);
  int p = 0;
  for (; p + kStep <= num_panels; p += kStep)
    tile<ROWS, kStep, LDA>(a, b + p * panel_step, panel_step, num_k, c + p * kPanel, ldc, add);
  for (; p < num_panels; ++p)
    tile<ROWS, 1, LDA>(a, b + p * panel_step, panel_step, num_k, c + p * kPanel, ldc, add);
}

// The tile for a row count known at run time, 1 <= rows <= kTileRows.
template <int LDA, class T, int ROWS = kTileRows>
FL_INLINE void tile_rows(int rows, const float* a, const T* b, int64_t panel_step, int num_panels, int num_k, float* c,
                         int64_t ldc, bool add) {
  if (rows == ROWS) return tile_strip<ROWS, LDA>(a, b, panel_step, num_panels, num_k, c, ldc, add);
  if constexpr (ROWS > 1) tile_rows<LDA, T, ROWS - 1>(rows, a, b, panel_step, num_panels, num_k, c, ldc, add);
}

}  // namespace
}  // namespace fuseline::FL_ISA
