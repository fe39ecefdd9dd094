// out[1, T, H, N] = x[1, H, T, K] times a weight of each head, packed as panels of 16 outputs (tile.h).
//
// A task is a head, some of its rows and some of its panels. Each output is one fp32 chain over ascending k, rounded
// once, so that it depends on its row alone.
#include "cpu/parallel.h"
#include "chunks.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kRows = 4 * kTileRows;    // of a task
constexpr int64_t kPanels = kMaxPanels;     // of a task

struct Fp32Rows {
  using Packed = float;
  static int64_t size(int64_t rows, int64_t num_k) { return packed_size(rows, num_k); }
  template <class T>
  static void pack(const T* x, int64_t num_k, float* packed, int64_t rows, int64_t r) {
    pack_row(x, num_k, packed, rows, r);
  }
  template <class W>
  static void multiply(const float* packed, int64_t rows, int64_t num_k, const W* panels, int num_panels, float* wide,
                       float* c, int64_t ldc) {
    product(packed, packed_step(rows), rows, num_k, panels, num_panels, wide, c, ldc);
  }
};

struct Bf16Rows {
  using Packed = uint32_t;
  static int64_t size(int64_t rows, int64_t num_k) { return dot_size(rows, num_k); }
  static void pack(const bf16* x, int64_t num_k, uint32_t* packed, int64_t rows, int64_t r) {
    pack_dot_row(x, num_k, packed, rows, r);
  }
  static void multiply(const uint32_t* packed, int64_t rows, int64_t num_k, const bf16* panels, int num_panels, float*,
                       float* c, int64_t ldc) {
    dot_product(packed, dot_step(rows), rows, num_k, panels, num_panels, c, ldc);
  }
};

// Tokens [token, token + rows) of a head times its panels from p0 on.
template <class Rows, class X, class W>
void multiply_heads(const Tensor* t, int64_t head, int64_t token, int64_t rows, int64_t p0, int64_t num_panels) {
  const Tensor &out = t[0], &x = t[1], &panels = t[2];
  const int64_t num_k = panels.sizes[2], num_out = out.sizes[3], width = num_panels * kPanel;
  float* wide = chunk_floats(kWideSize + rows * width + Rows::size(rows, num_k));
  float* c = wide + kWideSize;
  auto* packed = reinterpret_cast<typename Rows::Packed*>(c + rows * width);
  for (int64_t r = 0; r < rows; ++r)
    Rows::pack(static_cast<const X*>(x.data) + head * x.strides[1] + (token + r) * x.strides[2], num_k, packed, rows, r);
  Rows::multiply(packed, rows, num_k, static_cast<const W*>(panels.data) + head * panels.strides[0] + p0 * kPanel * num_k,
                 static_cast<int>(num_panels), wide, c, width);
  const int64_t n0 = p0 * kPanel, n = num_out - n0 < width ? num_out - n0 : width;
  with_float(out.dtype, [&](auto type) {
    for (int64_t r = 0; r < rows; ++r)
      convert_row(c + r * width, n, static_cast<decltype(type)*>(out.data) + (token + r) * out.strides[1] +
                                        head * out.strides[2] + n0);
  });
}

template <class Rows, class X, class W>
void multiply_all(const Tensor* t) {
  const int64_t num_heads = t[1].sizes[1], num_tokens = t[1].sizes[2], num_panels = t[2].sizes[1];
  const int64_t row_tasks = (num_tokens + kRows - 1) / kRows, panel_tasks = (num_panels + kPanels - 1) / kPanels;
  parallel(num_heads * row_tasks * panel_tasks, [&](int64_t task) {
    const int64_t head = task / (row_tasks * panel_tasks), of_rows = task / panel_tasks % row_tasks;
    const int64_t token = of_rows * kRows, p0 = task % panel_tasks * kPanels;
    multiply_heads<Rows, X, W>(t, head, token, num_tokens - token < kRows ? num_tokens - token : kRows, p0,
                               num_panels - p0 < kPanels ? num_panels - p0 : kPanels);
  });
}

}  // namespace

// t: out!, x, panels [H, ceil(N/16), K, 16]; i: num_out.
void head_linear(const Tensor* t, const int64_t*, const double*) {
  if constexpr (kHasDot)
    if (t[2].dtype == DType::bf16 && t[1].dtype == DType::bf16) return multiply_all<Bf16Rows, bf16, bf16>(t);
  with_float(t[2].dtype, [&](auto w) {
    with_float(t[1].dtype, [&](auto x) { multiply_all<Fp32Rows, decltype(x), decltype(w)>(t); });
  });
}

}  // namespace fuseline::FL_ISA
