// Linears with packed weights: blocks of rows by chunks of panels; a Path packs rows and multiplies them.
//
//   Element, Packed                  of panels and of packed rows
//   kBlockRows                       rows of one block
//   packed_floats(rows, num_k)       room for packed rows
//   pack(job, row, packed, rows, r)  as row r of `rows`
//   multiply(packed, rows, num_k, panels, num_panels, wide, c, ldc, group)   c[rows][ldc], fp32
#pragma once
#include "cpu/parallel.h"
#include "chunks.h"

namespace fuseline::FL_ISA {
namespace {

// Tiling of a product: panels per tile (0: chosen by product.h) and panels per chunk (0: chosen by chunk_width).
// `choices` has one byte for each range of row counts: up to 1, 6, 14, 64, and more. The low two bits encode 0, 1, 2 or
// 4 panels per tile, the other bits pairs of panels per chunk.
struct Choice {
  int group = 0;
  int64_t width = 0;
};

Choice choice_for(int64_t choices, int64_t rows) {
  int range = rows <= 1 ? 0 : rows <= 6 ? 1 : rows <= 14 ? 2 : rows <= 64 ? 3 : 4;
  int64_t byte = choices >> (8 * range) & 0xff;
  return {(byte & 3) == 3 ? 4 : static_cast<int>(byte & 3), (byte >> 2) * 2};
}

struct Linear {
  const Tensor& out;
  const Tensor& x;
  const Tensor& panels;
  const Tensor& bias;
  int64_t num_k, num_out, choices;
  int64_t num_panels() const { return (num_out + kPanel - 1) / kPanel; }
};

template <class Path>
void multiply_chunk(const Linear& job, const typename Path::Packed* packed, int64_t row0, int64_t rows, int64_t p0,
                    int num_panels, int group) {
  int64_t width = int64_t{num_panels} * kPanel;
  float* wide = chunk_floats(kWideSize + (rows + 1) * width);
  float* bias = wide + kWideSize;
  float* c = bias + width;
  auto* panels = static_cast<const typename Path::Element*>(job.panels.data) + p0 * job.num_k * kPanel;
  Path::multiply(packed, rows, job.num_k, panels, num_panels, wide, c, width, group);
  store_sums(job.out, job.bias, row0, rows, p0 * kPanel, width, c, bias);
}

template <class Path>
void multiply_block(const Linear& job, int64_t row0, int64_t rows) {
  using Packed = typename Path::Packed;
  auto* packed = reinterpret_cast<Packed*>(caller_floats(Path::packed_floats(rows, job.num_k)));
  pack_rows(rows, [&](int64_t r) { Path::pack(job, row0 + r, packed, rows, r); });
  Choice choice = choice_for(job.choices, rows);
  int64_t width = choice.width, total = job.num_panels();
  if (width == 0)
    width = chunk_width(total, job.num_k * kPanel * static_cast<int64_t>(sizeof(typename Path::Element)), rows);
  if (rows > kTileRows && width > kMaxPanels) width = kMaxPanels;
  parallel((total + width - 1) / width, [&](int64_t chunk) {
    int64_t p0 = chunk * width, left = total - p0;
    multiply_chunk<Path>(job, packed, row0, rows, p0, static_cast<int>(left < width ? left : width), choice.group);
  });
}

// Splits rows into blocks of nearly equal height; each block reads all weights once.
template <class Path>
void multiply(const Linear& job) {
  int64_t rows = num_rows(job.x), num_blocks = (rows + Path::kBlockRows - 1) / Path::kBlockRows;
  for (int64_t b = 0; b < num_blocks; ++b) {
    int64_t begin = rows * b / num_blocks;
    multiply_block<Path>(job, begin, rows * (b + 1) / num_blocks - begin);
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
