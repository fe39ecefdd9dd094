// Linears of bf16 by AMX, which multiplies 16 rows x 32 inputs x 16 outputs at a time: a panel of pairs is its operand.
//
// Of each 32 inputs the instruction sums those at even and at odd places in two chains of fma from 0, and adds both to what
// it has. That order is the same for any number of rows, so all rows take it.
#include "linear.h"
#include "tile_config.h"

#if defined(__AMX_BF16__)
namespace fuseline::FL_BASE {
void linear(const Tensor* t, const int64_t* i, const double* f);
}

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kStep = 2 * kTile;      // inputs of an instruction
constexpr int64_t kTileDepth = 512;       // inputs for which two panels stay in the first cache
constexpr int64_t kFetchedRows = 64;      // up to this many rows wait for memory: the next panels are prefetched

// Adds inputs [0, num_k) of up to 32 rows by one or two panels to c, or begins it.
template <bool HAS_SECOND_ROWS, bool HAS_SECOND_PANEL>
FL_INLINE void multiply_tile(const uint32_t* x, int64_t step, const bf16* panel, int64_t panel_step, int64_t num_k,
                             int64_t ahead, float* c, int64_t ldc, bool add) {
  float* lower = c + kTile * ldc;
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if (HAS_SECOND_PANEL) { _tile_loadd(1, c + kPanel, ldc * 4); }
    if (HAS_SECOND_ROWS) { _tile_loadd(2, lower, ldc * 4); }
    if (HAS_SECOND_ROWS && HAS_SECOND_PANEL) { _tile_loadd(3, lower + kPanel, ldc * 4); }
  } else {
    _tile_zero(0);
    if (HAS_SECOND_PANEL) { _tile_zero(1); }
    if (HAS_SECOND_ROWS) { _tile_zero(2); }
    if (HAS_SECOND_ROWS && HAS_SECOND_PANEL) { _tile_zero(3); }
  }
  for (int64_t k = 0; k < num_k; k += kStep) {
    const bf16* line = panel + k * kPanel;
    for (int i = 0; ahead != 0 && i < kTile; ++i) {
      __builtin_prefetch(line + ahead + i * kStep, 0, 2);
      if (HAS_SECOND_PANEL) __builtin_prefetch(line + panel_step + ahead + i * kStep, 0, 2);
    }
    _tile_loadd(4, x + k / 2, step * 4);
    _tile_loadd(6, line, 64);
    if (HAS_SECOND_PANEL) { _tile_loadd(7, line + panel_step, 64); }
    if (HAS_SECOND_ROWS) { _tile_loadd(5, x + kTile * step + k / 2, step * 4); }
    _tile_dpbf16ps(0, 4, 6);
    if (HAS_SECOND_PANEL) { _tile_dpbf16ps(1, 4, 7); }
    if (HAS_SECOND_ROWS) { _tile_dpbf16ps(2, 5, 6); }
    if (HAS_SECOND_ROWS && HAS_SECOND_PANEL) { _tile_dpbf16ps(3, 5, 7); }
  }
  _tile_stored(0, c, ldc * 4);
  if (HAS_SECOND_PANEL) { _tile_stored(1, c + kPanel, ldc * 4); }
  if (HAS_SECOND_ROWS) { _tile_stored(2, lower, ldc * 4); }
  if (HAS_SECOND_ROWS && HAS_SECOND_PANEL) { _tile_stored(3, lower + kPanel, ldc * 4); }
}

struct TilePath {
  using Element = bf16;
  using Packed = uint32_t;
  static constexpr int64_t kBlockRows = 512;
  // Words of a row; not a multiple of 1 KiB: rows of a tile would share cache sets.
  static int64_t row_words(int64_t num_k) { return num_k / 2 + kTile; }
  static int64_t packed_floats(int64_t rows, int64_t num_k) { return rows * row_words(num_k); }
  static void pack(const Linear& job, int64_t row, uint32_t* packed, int64_t, int64_t r) {
    const bf16* x = static_cast<const bf16*>(job.x.data) + row_offset(job.x, row);
    __builtin_memcpy(packed + r * row_words(job.num_k), x, job.num_k * sizeof(bf16));
  }
  static void multiply(const uint32_t* packed, int64_t rows, int64_t num_k, const bf16* panels, int num_panels, float*,
                       float* c, int64_t ldc, int) {
    asm volatile("" ::: "memory");   // gcc does not know that tiles are loaded from memory
    int64_t step = row_words(num_k), panel_step = num_k * kPanel, first = 0, second = 0;
    for (int p = 0; p < num_panels; p += 2)
      for (int64_t k = 0; k < num_k; k += kTileDepth) {
        int64_t depth = num_k - k < kTileDepth ? num_k - k : kTileDepth;
        for (int64_t r = 0; r < rows; r += 2 * kTile) {
          int64_t left = rows - r, upper = left < kTile ? left : kTile;
          int64_t lower = left - upper < kTile ? left - upper : kTile;
          if (upper != first || lower != second) configure_tiles(kTile, first = upper, second = lower);
          int64_t ahead = r == 0 && rows <= kFetchedRows ? 2 * panel_step : 0;
          const bf16* panel = panels + p * panel_step + k * kPanel;
          const uint32_t* x = packed + r * step + k / 2;
          float* to = c + r * ldc + p * kPanel;
          auto run = [&](auto tile) { tile(x, step, panel, panel_step, depth, ahead, to, ldc, k > 0); };
          bool has_pair = p + 1 < num_panels;
          if (lower > 0) has_pair ? run(multiply_tile<true, true>) : run(multiply_tile<true, false>);
          else has_pair ? run(multiply_tile<false, true>) : run(multiply_tile<false, false>);
        }
      }
    _tile_release();
  }
};

}  // namespace

// `linear` of bf16 by bf16 with whole steps of inputs by tiles, else as the instruction set computes it that this one
// extends.
void linear_tiles(const Tensor* t, const int64_t* i, const double* f) {
  Linear job{t[0], t[1], t[2], t[3], t[1].sizes[t[1].ndim - 1], i[0], i[1]};
  bool fits = job.panels.dtype == DType::bf16 && job.x.dtype == DType::bf16 && job.num_k % kStep == 0 && job.num_k > 0;
  if (!fits) return FL_BASE::linear(t, i, f);
  multiply<TilePath>(job);
}

}  // namespace fuseline::FL_ISA
#endif
