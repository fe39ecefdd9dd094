// Layout of keys in a KV-cache block: panels of the register tile (tile.h), so that scores read keys as products read
// weights.
//
// A block [B][D] is stored as [B / W][D][W], bf16 as [B / W][D / 2][W][2] (pairs along D). W is 16, or B if 16 does not
// divide B.
#pragma once
#include "tile.h"

namespace fuseline::FL_ISA {
namespace {

inline int64_t key_lanes(int64_t block_size) { return block_size % kPanel == 0 ? kPanel : block_size; }

// Calls body(d, index in the block, count) for the elements of key `within`; paired elements come two at a time.
template <class T, class F>
FL_INLINE void for_key(int64_t block_size, int64_t num_d, int64_t within, const F& body) {
  const int64_t lanes = key_lanes(block_size), lane = within % lanes, panel = (within - lane) * num_d;
  int64_t d = 0;
  if constexpr (kIsPaired<T>)
    for (; d + 2 <= num_d; d += 2) body(d, panel + d * lanes + 2 * lane, int64_t{2});
  for (; d < num_d; ++d) body(d, panel + d * lanes + lane, int64_t{1});
}

template <class T>
inline void write_key(T* block, int64_t block_size, int64_t num_d, int64_t within, const T* key) {
  for_key<T>(block_size, num_d, within, [&](int64_t d, int64_t at, int64_t count) __attribute__((always_inline)) {
    __builtin_memcpy(block + at, key + d, count * sizeof(T));
  });
}

// Copies key `within` into lane `lane` of a panel of 16.
template <class T>
inline void copy_key(const T* block, int64_t block_size, int64_t num_d, int64_t within, T* panel, int64_t lane) {
  for_key<T>(block_size, num_d, within, [&](int64_t d, int64_t at, int64_t count) __attribute__((always_inline)) {
    __builtin_memcpy(panel + panel_index(kIsPaired<T>, num_d, d, lane), block + at, count * sizeof(T));
  });
}

}  // namespace
}  // namespace fuseline::FL_ISA
