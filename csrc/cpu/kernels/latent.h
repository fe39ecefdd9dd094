// Panels of keys from rows of a cache of latents, in which a token's value is the beginning of its key.
#pragma once
#include "keys.h"

namespace fuseline::FL_ISA {
namespace {

// Transposes kLanes vectors of words: blocks of S change places, then those of S / 2 in them, ...
template <int S = kLanes / 2>
FL_INLINE void transpose_words(vu (&v)[kLanes]) {
  vi low, high;
  for (int k = 0; k < kLanes; ++k) low[k] = k & S ? kLanes + k - S : k, high[k] = k & S ? kLanes + k : k + S;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const vu a = v[i], b = v[i + S];
    v[i] = __builtin_shuffle(a, b, low), v[i + S] = __builtin_shuffle(a, b, high);
  }
  if constexpr (S > 1) transpose_words<S / 2>(v);
}

// panel (keys.h) = keys rows[0, kPanel) of num_d numbers.
template <class T>
inline void panel_of_rows(const T* const* rows, int64_t num_d, T* panel) {
  constexpr int64_t kPerWord = 4 / sizeof(T);
  int64_t d = 0;
  // Numbers of two bytes are words only where they are paired.
  if constexpr (kPerWord == 1 || kIsPaired<T>)
    for (; d + kPerWord * kLanes <= num_d; d += kPerWord * kLanes)
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        vu v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load_words(rows[lane + i] + d);
        transpose_words(v);
        for (int i = 0; i < kLanes; ++i) store_words(panel + (d + i * kPerWord) * kPanel + lane * kPerWord, v[i]);
      }
  for (; d < num_d; ++d)
    for (int lane = 0; lane < kPanel; ++lane) panel[panel_index(kIsPaired<T>, num_d, d, lane)] = rows[lane][d];
}

// The panels of `count` keys, the first of which is lane `first` of the first panel; other lanes hold any key.
template <class T>
inline void panels_of_rows(const T* const* rows, int64_t first, int64_t count, int64_t num_d, T* panels) {
  for (int64_t begin = -first; begin < count; begin += kPanel, panels += kPanel * num_d) {
    const T* lanes[kPanel];
    for (int64_t l = 0; l < kPanel; ++l) lanes[l] = rows[begin + l >= 0 && begin + l < count ? begin + l : 0];
    panel_of_rows(lanes, num_d, panels);
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
