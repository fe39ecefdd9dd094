// The register tile of every matrix product: linear, attention, experts.
//
// c[r][p][lane] (+)= sum over ascending k of a[r][k] * b[p][k][lane]: one chain of fma() per element, so an element's
// value depends neither on how many rows or panels share the tile nor on where the sum over k is split (at an even k).
//
// A panel holds 16 outputs: [K][16]; bf16 is paired along k: [K / 2][16][2], an odd last k unpaired. A word is then an
// operand of a bf16 dot instruction, and each of its halves converts to fp32 in one instruction.
#pragma once
#include "cpu/vec.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int kPanel = 16;                    // outputs per panel
constexpr int kPanelVecs = kPanel / kLanes;   // vectors per k of a panel
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 3;

template <class T>
constexpr bool kIsPaired = false;
template <>
constexpr bool kIsPaired<bf16> = true;

// Index of weight[lane][k] in a panel of num_k.
FL_INLINE int64_t panel_index(bool is_paired, int64_t num_k, int64_t k, int64_t lane) {
  bool has_partner = is_paired && (k | 1) < num_k;
  return has_partner ? (k & ~int64_t{1}) * kPanel + 2 * lane + (k & 1) : k * kPanel + lane;
}

// Panels at a fixed distance.
template <class T>
struct EvenPanels {
  using Element = T;
  const T* first;
  int64_t step;
  FL_INLINE const T* at(int p) const { return first + p * step; }
  FL_INLINE void fetch(int, int64_t) const {}
};
// The same, with panels `ahead` prefetched to L2 one cache line at a time: once several rows are computed per line, the
// core's own outstanding loads do not hide memory latency.
template <class T>
struct AheadPanels : EvenPanels<T> {
  int64_t ahead;
  FL_INLINE void fetch(int p, int64_t i) const { __builtin_prefetch(this->at(p) + ahead + i, 0, 2); }
};
// Panels at separate addresses, all from element `offset` on.
template <class T>
struct ListedPanels {
  using Element = T;
  const T* const* list;
  int64_t offset;
  FL_INLINE const T* at(int p) const { return list[p] + offset; }
  FL_INLINE void fetch(int, int64_t) const {}
};

// Panels side by side in a tile of `rows` rows: as many accumulators as there are registers.
constexpr int tile_panels(int rows) {
  if (kLanes == 16) return rows <= 6 ? 4 : 2;
  if (kLanes == 8) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
  return rows == 1 ? 2 : 1;
}

template <int ROWS, int VECS>
FL_INLINE void load_tile(vf (&acc)[ROWS][VECS], const float* c, int64_t ldc, bool add) {
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECS; ++v) acc[r][v] = add ? load(c + r * ldc + v * kLanes) : set1(0.0f);
}

template <int ROWS, int VECS>
FL_INLINE void store_tile(const vf (&acc)[ROWS][VECS], float* c, int64_t ldc) {
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECS; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

// Multiplies rows a [ROWS][LDA] by panels [p0, p0 + PANELS) of b; rows of c are `ldc` floats apart, panels 16 apart.
template <int ROWS, int PANELS, int LDA, class Panels>
FL_INLINE void tile(const float* a, const Panels& b, int p0, int num_k, float* c, int64_t ldc, bool add) {
  using T = typename Panels::Element;
  constexpr int kVecs = PANELS * kPanelVecs;
  const T* panels[PANELS];
  for (int p = 0; p < PANELS; ++p) panels[p] = b.at(p0 + p);
  vf acc[ROWS][kVecs];
  load_tile(acc, c, ldc, add);
  auto step = [&](int k, auto load_vec) __attribute__((always_inline)) {
    vf y[kVecs];
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) y[p * kPanelVecs + v] = load_vec(panels[p], v);
    for (int r = 0; r < ROWS; ++r) {
      vf x = set1(a[r * LDA + k]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
  };
  auto fetch = [&](int k) __attribute__((always_inline)) {
    for (int p = 0; p < PANELS; ++p) b.fetch(p0 + p, k * kPanel);
  };
  int k = 0;
  if constexpr (kIsPaired<T>) {
    for (; k + 2 <= num_k; k += 2) {
      fetch(k);
      step(k, [&](const T* q, int v) { return pair_low(load_words(q + k * kPanel + 2 * v * kLanes)); });
      step(k + 1, [&](const T* q, int v) { return pair_high(load_words(q + k * kPanel + 2 * v * kLanes)); });
    }
  }
  for (; k < num_k; ++k) {
    fetch(k);
    step(k, [&](const T* q, int v) { return load(q + k * kPanel + v * kLanes); });
  }
  store_tile(acc, c, ldc);
}

// The same for bf16 rows, a: [ROWS][LDA] words of two k, an odd last k padded with zero.
template <int ROWS, int PANELS, int LDA, class Panels>
FL_INLINE void tile(const uint32_t* a, const Panels& b, int p0, int num_k, float* c, int64_t ldc, bool add) {
  constexpr int kVecs = PANELS * kPanelVecs;
  const bf16* panels[PANELS];
  for (int p = 0; p < PANELS; ++p) panels[p] = b.at(p0 + p);
  vf acc[ROWS][kVecs];
  load_tile(acc, c, ldc, add);
  auto step = [&](int k, auto load_vec) __attribute__((always_inline)) {
    vu y[kVecs];
    for (int p = 0; p < PANELS; ++p) b.fetch(p0 + p, k * kPanel);
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < kPanelVecs; ++v) y[p * kPanelVecs + v] = load_vec(panels[p] + k * kPanel, v);
    for (int r = 0; r < ROWS; ++r) {
      vu x = a[r * LDA + k / 2] - vu{};
      for (int v = 0; v < kVecs; ++v) acc[r][v] = dot_pairs(acc[r][v], y[v], x);
    }
  };
  int k = 0;
  for (; k + 2 <= num_k; k += 2) step(k, [](const bf16* q, int v) { return load_words(q + 2 * v * kLanes); });
  if (k < num_k)
    step(k, [](const bf16* q, int v) {
      vh h;
      __builtin_memcpy(&h, q + v * kLanes, sizeof h);
      return widen_half(h);
    });
  store_tile(acc, c, ldc);
}

template <int ROWS, int LDA, int WIDEST, class A, class Panels>
[[gnu::noinline]] void tile_strip(const A* a, Panels b, int num_panels, int num_k, float* c, int64_t ldc, bool add) {
  constexpr int kStep = WIDEST < tile_panels(ROWS) ? WIDEST : tile_panels(ROWS);
  int p = 0;
  for (; p + kStep <= num_panels; p += kStep) tile<ROWS, kStep, LDA>(a, b, p, num_k, c + p * kPanel, ldc, add);
  for (; p < num_panels; ++p) tile<ROWS, 1, LDA>(a, b, p, num_k, c + p * kPanel, ldc, add);
}

// The tile for a runtime row count, 1 <= rows <= kTileRows, and at most WIDEST panels side by side.
// a: fp32, or words of two bf16.
template <int LDA, int WIDEST = kPanel, class A, class Panels, int ROWS = kTileRows>
FL_INLINE void tile_rows(int rows, const A* a, const Panels& b, int num_panels, int num_k, float* c, int64_t ldc,
                         bool add) {
  if (rows == ROWS) return tile_strip<ROWS, LDA, WIDEST>(a, b, num_panels, num_k, c, ldc, add);
  if constexpr (ROWS > 1) tile_rows<LDA, WIDEST, A, Panels, ROWS - 1>(rows, a, b, num_panels, num_k, c, ldc, add);
}

// The tile with each k of b in a separate row, rows[k][panel * 16 + lane]; prefetches next[k] and adds to c.
template <int ROWS, int PANELS, int LDA, class T>
FL_INLINE void key_tile(const float* a, const T* const* rows, const T* const* next, int num_k, float* c, int64_t ldc,
                        int64_t offset) {
  constexpr int kVecs = PANELS * kPanelVecs, kLine = 64 / sizeof(T);
  vf acc[ROWS][kVecs];
  load_tile(acc, c, ldc, true);
  for (int k = 0; k < num_k; ++k) {
    vf y[kVecs];
    for (int e = 0; e < PANELS * kPanel; e += kLine) __builtin_prefetch(next[k] + offset + e, 0, 2);
    for (int v = 0; v < kVecs; ++v) y[v] = load(rows[k] + offset + v * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      vf x = set1(a[r * LDA + k]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, y[v], acc[r][v]);
    }
  }
  store_tile(acc, c, ldc);
}

// The same for bf16, a: words of two k. Rows k and k + 1 are interleaved as they are read. If num_k is odd, rows[num_k]
// must be readable, and the upper half of a's last word must be 0.
template <int ROWS, int PANELS, int LDA>
FL_INLINE void key_tile(const uint32_t* a, const bf16* const* rows, const bf16* const* next, int num_k, float* c,
                        int64_t ldc, int64_t offset) {
  static_assert(PANELS % 2 == 0 && kPanelVecs == 1);
  vf acc[ROWS][PANELS];
  load_tile(acc, c, ldc, true);
  for (int k = 0; k < num_k; k += 2) {
    vu y[PANELS];
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < PANELS * kPanel; e += 32) __builtin_prefetch(next[k + i] + offset + e, 0, 2);
    for (int p = 0; p < PANELS; p += 2)
      pair_rows(rows[k] + offset + p * kPanel, rows[k + 1] + offset + p * kPanel, y + p);
    for (int r = 0; r < ROWS; ++r) {
      vu x = a[r * LDA + k / 2] - vu{};
      for (int p = 0; p < PANELS; ++p) acc[r][p] = dot_pairs(acc[r][p], y[p], x);
    }
  }
  store_tile(acc, c, ldc);
}

template <int ROWS, int LDA, class A, class T>
[[gnu::noinline]] void key_strip(const A* a, const T* const* rows, const T* const* next, int num_panels, int num_k,
                                 float* c, int64_t ldc) {
  constexpr int kStep = tile_panels(ROWS), kLeast = __is_same(A, uint32_t) ? 2 : 1;
  int p = 0;
  for (; p + kStep <= num_panels; p += kStep)
    key_tile<ROWS, kStep, LDA>(a, rows, next, num_k, c + p * kPanel, ldc, p * kPanel);
  for (; p < num_panels; p += kLeast)
    key_tile<ROWS, kLeast, LDA>(a, rows, next, num_k, c + p * kPanel, ldc, p * kPanel);
}

template <int LDA, class A, class T, int ROWS = kTileRows>
FL_INLINE void key_rows(int num_rows, const A* a, const T* const* rows, const T* const* next, int num_panels, int num_k,
                        float* c, int64_t ldc) {
  if (num_rows == ROWS) return key_strip<ROWS, LDA>(a, rows, next, num_panels, num_k, c, ldc);
  if constexpr (ROWS > 1) key_rows<LDA, A, T, ROWS - 1>(num_rows, a, rows, next, num_panels, num_k, c, ldc);
}

}  // namespace
}  // namespace fuseline::FL_ISA
