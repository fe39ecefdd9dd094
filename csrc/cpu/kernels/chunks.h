// Chunks of panels for the threads of a linear, and what becomes of a chunk's sums: shared by linear and linear_codes.
#pragma once
#include "product.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kPackRows = 8;                    // rows of x packed per chunk
constexpr int64_t kThinChunkBytes = 128 << 10;      // weights read per chunk when rows are few

// Panels per chunk: at least four chunks per thread, and the least idle time in the last round.
inline int64_t chunk_width(int64_t total, int64_t panel_bytes, int64_t rows) {
  int64_t widest = kMaxPanels, threads = num_threads();
  if (rows <= kTileRows) {
    int64_t fit = kThinChunkBytes / panel_bytes;
    widest = fit < 4 ? 4 : fit > 32 ? 32 : fit;
  }
  int64_t even = total / (threads * 4), best = kGroupPanels, least = 0;
  if (even > widest) even = widest;
  for (int64_t width = kGroupPanels; width <= even; width += kGroupPanels) {
    int64_t rounds = ((total + width - 1) / width + threads - 1) / threads;
    int64_t cost = rounds * (4 * width + 1);   // claiming a chunk costs about a quarter of a panel
    if (least == 0 || cost <= least) best = width, least = cost;
  }
  return best;
}

inline void add_bias(float* c, const float* bias, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes) store(c + j, load(c + j) + load(bias + j));
}

// Rounds sums c[rows][width] of outputs from n0 on to rows of out from row0 on, plus the bias; `wide_bias` [width].
inline void store_sums(const Tensor& out, const Tensor& bias, int64_t row0, int64_t rows, int64_t n0, int64_t width,
                       float* c, float* wide_bias) {
  int64_t num_out = last_size(out), n = num_out - n0 < width ? num_out - n0 : width;
  if (bias.present())
    with_float(bias.dtype, [&](auto t) { convert_row(static_cast<decltype(t)*>(bias.data) + n0, n, wide_bias); });
  with_float(out.dtype, [&](auto t) {
    for (int64_t r = 0; r < rows; ++r) {
      if (bias.present()) add_bias(c + r * width, wide_bias, width);
      convert_row(c + r * width, n, static_cast<decltype(t)*>(out.data) + row_offset(out, row0 + r) + n0);
    }
  });
}

// Calls pack(r) for every row, by all threads where there are many.
template <class F>
inline void pack_rows(int64_t rows, const F& pack) {
  if (rows <= kTileRows) {
    for (int64_t r = 0; r < rows; ++r) pack(r);
    return;
  }
  parallel_ranges(rows, kPackRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) pack(r);
  });
}

}  // namespace
}  // namespace fuseline::FL_ISA
