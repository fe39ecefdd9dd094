// out[M, N] = x[M, K] @ weight^T + bias, with a weight of codes: groups of inputs share a scale and a zero (codes.h).
#include "codes_product.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kBlockRows = 32 * kTileRows;   // rows that share a decoded block

struct LinearCodes {
  const Tensor &out, &x, &order, &bias;
  CodedWeight weight;
};

// A row of x, its inputs in the weight's order.
template <class T>
const T* ordered_row(const LinearCodes& job, int64_t row) {
  const T* x = static_cast<const T*>(job.x.data) + row_offset(job.x, row);
  if (!job.order.present()) return x;
  T* ordered = reinterpret_cast<T*>(chunk_floats(job.weight.num_k));
  for (int64_t k = 0; k < job.weight.num_k; ++k) ordered[k] = x[index_at(job.order, k)];
  return ordered;
}

template <bool DOT, class Kind>
void multiply_codes(const LinearCodes& job, const Kind& kind) {
  const CodedWeight& weight = job.weight;
  int64_t all = num_rows(job.x), num_blocks = (all + kBlockRows - 1) / kBlockRows, total = weight.num_panels();
  for (int64_t i = 0; i < num_blocks; ++i) {
    int64_t row0 = all * i / num_blocks, rows = all * (i + 1) / num_blocks - row0;
    int64_t size = (weight.num_k + kDepth - 1) / kDepth * Packing<DOT>::step(rows);
    float* space = caller_floats(size + rows * weight.num_groups());
    CodedRows<DOT> block{rows, rows, reinterpret_cast<typename Packing<DOT>::A*>(space), space + size};
    with_float(job.x.dtype, [&](auto t) {
      using T = decltype(t);
      if constexpr (!DOT || __is_same(T, bf16))
        pack_rows(rows, [&](int64_t r) { pack_codes_row(weight, block, ordered_row<T>(job, row0 + r), r); });
    });
    int64_t width = chunk_width(total, weight.panel_words() * 4, rows);
    if (rows > kFewRows && width > kMaxPanels) width = kMaxPanels;
    parallel((total + width - 1) / width, [&](int64_t chunk) {
      int64_t p0 = chunk * width, panels = total - p0 < width ? total - p0 : width, ldc = panels * kPanel;
      float* wide = chunk_floats(kWideSize + (rows + 1) * ldc);
      float* bias = wide + kWideSize;
      float* c = bias + ldc;
      multiply_panels(weight, kind, block, p0, static_cast<int>(panels), wide, c, ldc);
      store_sums(job.out, job.bias, row0, rows, p0 * kPanel, ldc, c, bias);
    });
  }
}

template <class Kind>
void multiply_kind(const LinearCodes& job, const Kind& kind) {
  if constexpr (kHasDot && !__is_same(Kind, Fives))
    if (job.x.dtype == DType::bf16) return multiply_codes<true>(job, kind);
  multiply_codes<false>(job, kind);
}

}  // namespace

// t: out!, x, codes, scales, zeros?, order?, bias?; i: num_out, group, kind.
void linear_codes(const Tensor* t, const int64_t* i, const double*) {
  LinearCodes job{t[0], t[1], t[5], t[6], {t[2], t[3], t[4], last_size(t[1]), i[1], counts_up(i[2])}};
  with_kind(i[2], job.x.dtype, [&](const auto& kind) { multiply_kind(job, kind); });
}

}  // namespace fuseline::FL_ISA
