// out[M, N] = x[M, K] @ weight^T + bias, with weight packed as panels of 16 outputs (tile.h); and pack_panels.
//
// Each output is one fp32 chain over ascending k, plus the bias in fp32, rounded once to out's dtype (as in addmm).
#include "linear.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kPackDepth = 64;

// How rows are packed and multiplied: the fp32 path, or the bf16-dot path on pairs.
template <class W>
struct Fp32Path {
  using Element = W;
  using Packed = float;
  static constexpr int64_t kBlockRows = 16 * kTileRows;   // rows of one block
  static int64_t packed_floats(int64_t rows, int64_t num_k) { return packed_size(rows, num_k); }
  static void pack(const Linear& job, int64_t row, float* packed, int64_t rows, int64_t r) {
    with_float(job.x.dtype, [&](auto t) {
      pack_row(static_cast<const decltype(t)*>(job.x.data) + row_offset(job.x, row), job.num_k, packed, rows, r);
    });
  }
  static void multiply(const float* packed, int64_t rows, int64_t num_k, const W* panels, int num_panels, float* wide,
                       float* c, int64_t ldc, int group) {
    product(packed, packed_step(rows), rows, num_k, panels, num_panels, wide, c, ldc, group);
  }
};

struct Bf16DotPath {
  using Element = bf16;
  using Packed = uint32_t;
  static constexpr int64_t kBlockRows = 32 * kTileRows;
  static int64_t packed_floats(int64_t rows, int64_t num_k) { return dot_size(rows, num_k); }
  static void pack(const Linear& job, int64_t row, uint32_t* packed, int64_t rows, int64_t r) {
    pack_dot_row(static_cast<const bf16*>(job.x.data) + row_offset(job.x, row), job.num_k, packed, rows, r);
  }
  static void multiply(const uint32_t* packed, int64_t rows, int64_t num_k, const bf16* panels, int num_panels, float*,
                       float* c, int64_t ldc, int group) {
    dot_product(packed, dot_step(rows), rows, num_k, panels, num_panels, c, ldc, group);
  }
};

// Packs output rows [lo, hi) of one panel; weight row 0 is output row `first`.
template <class From, class To>
void pack_panel(const Tensor& panels, const Tensor& weight, int64_t first, int64_t lo, int64_t hi) {
  int64_t num_k = weight.sizes[1];
  To* panel = static_cast<To*>(panels.data) + lo / kPanel * kPanel * num_k;
  for (int64_t k0 = 0; k0 < num_k; k0 += kPackDepth) {
    int64_t depth = num_k - k0 < kPackDepth ? num_k - k0 : kPackDepth;
    for (int64_t n = lo; n < hi; ++n) {
      const From* row = static_cast<const From*>(weight.data);
      row += (n - first) * weight.strides[0] + k0 * weight.strides[1];
      From in[kPackDepth];
      To out[kPackDepth];
      for (int64_t k = 0; k < depth; ++k) in[k] = row[k * weight.strides[1]];
      convert_row(in, depth, out);
      for (int64_t k = 0; k < depth; ++k) panel[panel_index(kIsPaired<To>, num_k, k0 + k, n % kPanel)] = out[k];
    }
  }
}

}  // namespace

// t: out!, x, panels, bias?; i: num_out, choices.
void linear(const Tensor* t, const int64_t* i, const double*) {
  Linear job{t[0], t[1], t[2], t[3], t[1].sizes[t[1].ndim - 1], i[0], i[1]};
  if constexpr (kHasDot)
    if (job.panels.dtype == DType::bf16 && job.x.dtype == DType::bf16) return multiply<Bf16DotPath>(job);
  with_float(job.panels.dtype, [&](auto w) { multiply<Fp32Path<decltype(w)>>(job); });
}

// t: panels!, weight; i: row_offset. Row n of weight becomes lane (row_offset + n) % 16 of panel (row_offset + n) / 16.
// Other lanes are not written, so parts of joined weights may be packed in any order into zeroed panels.
void pack_panels(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &panels = t[0], &weight = t[1];
  int64_t first = i[0], end = first + weight.sizes[0], p0 = first / kPanel, p1 = (end + kPanel - 1) / kPanel;
  parallel(p1 - p0, [&](int64_t chunk) {
    int64_t lo = (p0 + chunk) * kPanel, hi = lo + kPanel;
    with_float(panels.dtype, [&](auto to) {
      with_float(weight.dtype, [&](auto from) {
        pack_panel<decltype(from), decltype(to)>(panels, weight, first, lo > first ? lo : first,
                                                                  hi < end ? hi : end);
      });
    });
  });
}

}  // namespace fuseline::FL_ISA
