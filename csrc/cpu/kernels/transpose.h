// [16 rows][num_d] of any float type -> fp32 [num_d][16]: what turns keys into a panel for the register tile.
#pragma once
#include "views.h"
#include "tile.h"

namespace fuseline::FL_ISA {
namespace {

// Swaps the off-diagonal HALF x HALF quarters of every 2 HALF x 2 HALF square, for HALF = kLanes/2, ..., 1 (Eklundh).
template <int HALF>
FL_INLINE void transpose_square(vu* rows) {
  vu low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & HALF ? kLanes + l - HALF : l;
    high[l] = l & HALF ? kLanes + l : l + HALF;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & HALF) continue;
    vu a = rows[i], b = rows[i + HALF];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + HALF] = __builtin_shuffle(a, b, high);
  }
  if constexpr (HALF > 1) transpose_square<HALF / 2>(rows);
}

// Returns how many d it did: whole squares only.
template <class T>
FL_INLINE int64_t transpose_squares(const T* const* rows, int64_t num_d, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= num_d; d += kLanes) {
    vu square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = (vu)load(rows[i] + d);
    transpose_square<kLanes / 2>(square);
    for (int i = 0; i < kLanes; ++i) store_words(out + (d + i) * kPanel, square[i]);
  }
  return d;
}

// bf16 moves as pairs, half the shuffles: the word of (d, d + 1) splits into both floats.
FL_INLINE int64_t transpose_squares(const bf16* const* rows, int64_t num_d, float* out) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= num_d; d += 2 * kLanes) {
    vu square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = load_words(rows[i] + d);
    transpose_square<kLanes / 2>(square);
    for (int i = 0; i < kLanes; ++i) {
      store(out + (d + 2 * i) * kPanel, pair_low(square[i]));
      store(out + (d + 2 * i + 1) * kPanel, pair_high(square[i]));
    }
  }
  return d;
}

template <class T>
inline void transpose_panel(const T* const* rows, int64_t num_d, float* out) {
  for (int part = 0; part < kPanel; part += kLanes) {
    int64_t d = transpose_squares(rows + part, num_d, out + part);
    for (; d < num_d; ++d)
      for (int i = 0; i < kLanes; ++i) convert_row(rows[part + i] + d, 1, out + d * kPanel + part + i);
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
