// Tiles of a cache of codes, decoded for attention: keys as panels and values as rows of T, in units of cache_unit.
#pragma once
#include "cache_codes.h"
#include "tiles.h"

namespace fuseline::FL_ISA {
namespace {

// Keys [lo, hi) of a tile and their values; int8's scales by key of the tile, 0 for those outside [lo, hi).
template <class T>
struct DecodedTile {
  T *panels, *values;              // [kTilePanels][D][16], [kKeys][value_step]; of latents, whole keys
  uint32_t* words;                 // of one panel, where blocks are no multiple of it
  float *key_scales, *value_scales;   // [kKeys]
};

inline int64_t value_step(const Attention& job) { return job.is_latent ? job.key_dim : job.padded_dim; }

inline int64_t decoded_size(const Attention& job) {
  return kKeys * (job.key_dim + value_step(job) + 2) + kPanel * (job.key_dim + 4);
}

template <class T>
DecodedTile<T> decoded_tile(const Attention& job, float* p) {
  float *values = p + kKeys * job.key_dim, *scales = values + kKeys * value_step(job);
  auto* words = reinterpret_cast<uint32_t*>(scales + 2 * kKeys);
  return {reinterpret_cast<T*>(p), reinterpret_cast<T*>(values), words, scales, scales + kKeys};
}

// Prefetches the rows of the kPanel keys that are a tile after `key`: hardware does not follow blocks.
inline void fetch_ahead(const Attention& job, const Tensor& cache, const Task& task, int64_t key) {
  key += kKeys;
  if (key >= task.end()) return;
  const int32_t* table = static_cast<const int32_t*>(job.block_table.data) + task.seq * job.block_table.strides[0];
  const char* rows = static_cast<const char*>(cache.data) + task.kv_head * cache.strides[1] +
                     table[key / job.block_size * job.block_table.strides[1]] * cache.strides[0] +
                     key % job.block_size * cache.strides[2];
  for (int64_t byte = 0; byte < kPanel * cache.strides[2]; byte += 64) __builtin_prefetch(rows + byte, 0, 2);
}

template <class T, class Kind>
FL_INLINE void decode_keys(const Attention& job, const Kind& kind, const uint32_t* words, int64_t first,
                           const DecodedTile<T>& to) {
  decode_panel<kIsPaired<T>>(kind, words, job.key_dim, reinterpret_cast<uint32_t*>(to.panels + first * job.key_dim));
  if (scale_bytes(job.code)) __builtin_memcpy(to.key_scales + first, words + job.key_dim / 4 * kPanel, 4 * kPanel);
}

// Decodes the panels of keys [lo, hi); `first`: place in the tile of the first lane.
template <class T, class Kind>
void decode_panels(const Attention& job, const Kind& kind, const Task& task, int64_t lo, int64_t hi, int64_t first,
                   const DecodedTile<T>& to) {
  int64_t row = job.k_cache.sizes[3], before = lo % kPanel;
  if (key_lanes(job.block_size) == kPanel) {
    for_blocks<uint8_t>(job, job.k_cache, task, lo - before, hi,
                        [&](const uint8_t* block, int64_t within, int64_t count, int64_t n) {
      for (int64_t i = 0; i < count; i += kPanel) {
        fetch_ahead(job, job.k_cache, task, lo - before + n + i);
        decode_keys(job, kind, reinterpret_cast<const uint32_t*>(block + (within + i) * row), first + n + i, to);
      }
    });
    return;
  }
  for (int64_t key = lo - before; key < hi; key += kPanel) {
    int64_t begin = key < lo ? lo : key, end = key + kPanel < hi ? key + kPanel : hi;
    for_blocks<uint8_t>(job, job.k_cache, task, begin, end,
                        [&](const uint8_t* block, int64_t within, int64_t count, int64_t n) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t w = 0; w < row / 4; ++w)
          __builtin_memcpy(to.words + w * kPanel + (begin - key + n + i),
                           block + key_word(job.block_size, row, within + i, w), 4);
    });
    decode_keys(job, kind, to.words, first + key - lo + before, to);
  }
}

// Rows of `num` numbers with their scales: values, or the keys of latents.
template <class T, class Kind>
void decode_rows(const Attention& job, const Kind& kind, const Task& task, int64_t lo, int64_t hi, int64_t first,
                 int64_t num, const DecodedTile<T>& to) {
  int64_t row = job.v_cache.strides[2];
  for_blocks<uint8_t>(job, job.v_cache, task, lo, hi,
                      [&](const uint8_t* block, int64_t within, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; ++i) {
      if ((lo + n + i) % kPanel == 0) fetch_ahead(job, job.v_cache, task, lo + n + i);
      const uint8_t* from = block + (within + i) * row;
      decode_row(kind, from, num, to.values + (n + i) * value_step(job));
      if (scale_bytes(job.code)) __builtin_memcpy(to.value_scales + first + n + i, from + num, 4);
    }
  });
}

// Decodes keys [lo, hi) of the tile at `base`.
template <class T>
void decode_tile(const Attention& job, const Task& task, int64_t base, int64_t lo, int64_t hi, const DecodedTile<T>& to,
                 Places<T>& tile) {
  for (int64_t i = 0; i < kKeys; ++i) to.key_scales[i] = to.value_scales[i] = 0.0f;
  with_cache_kind(job.code, [&](const auto& kind) {
    if (!job.is_latent) decode_panels(job, kind, task, lo, hi, (lo - base) / kPanel * kPanel, to);
    decode_rows(job, kind, task, lo, hi, lo - base, job.is_latent ? job.key_dim : job.value_dim, to);
  });
  int64_t first = (lo - base) / kPanel;
  for (int64_t p = 0; p < kTilePanels; ++p)
    tile.panels[p] = to.panels + (first + p < kTilePanels ? first + p : first) * kPanel * job.key_dim;
  for (int64_t i = 0; i < kKeys; ++i) tile.values[i] = to.values + (i < hi - lo ? i : 0) * value_step(job);
  if (!job.is_latent) return;
  panels_of_rows(tile.values, lo % kPanel, hi - lo, job.key_dim, to.panels + first * kPanel * job.key_dim);
  __builtin_memcpy(to.key_scales, to.value_scales, kKeys * sizeof(float));
}

}  // namespace
}  // namespace fuseline::FL_ISA
