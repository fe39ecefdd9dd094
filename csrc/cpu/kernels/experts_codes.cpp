// Experts whose weights are codes of 4 or 8 bits (codes.h), multiplied as linear_codes does.
#include "codes_product.h"
#include "experts.h"

namespace fuseline::FL_ISA {
namespace {

struct CodedExperts {
  const Tensor &codes, &scales, &zeros, &order;   // [E][P][W][16], [E][P][G][16], [E][K]
  int64_t size, num_k, group, kind;       // size: outputs; kind: CodeKind
  DType dtype;                            // of x
  bool is_dot() const { return kHasDot && dtype == DType::bf16; }
  int64_t num_out() const { return size; }
  int64_t depth_blocks() const { return (num_k + kDepth - 1) / kDepth; }
  int64_t row_floats() const { return is_dot() ? Packing<true>::step(1) : Packing<false>::step(1); }
  int64_t num_sums() const { return zeros.present() ? scales.sizes[2] : 0; }
  int64_t packed_floats(int64_t rows) const {
    return (rows * (depth_blocks() * row_floats() + num_sums()) + 15) / 16 * 16;
  }

  int64_t spare_floats() const { return order.present() ? num_k : 0; }
  int64_t wide_floats(int64_t) const { return kWideSize; }
  CodedWeight matrix(int64_t expert) const {
    return {of_expert(codes, expert), of_expert(scales, expert), of_expert(zeros, expert), num_k, group, counts_up(kind)};
  }
  // `rows` packed rows from `first` on; sums of groups lie behind all packed rows.
  template <bool DOT>
  CodedRows<DOT> rows_at(const float* packed, int64_t num_rows, int64_t first, int64_t rows) const {
    using A = typename Packing<DOT>::A;
    auto* words = reinterpret_cast<A*>(const_cast<float*>(packed));
    auto* sums = const_cast<float*>(packed) + num_rows * depth_blocks() * row_floats();
    return {rows, num_rows, words + first * Packing<DOT>::kRow, sums + first * num_sums()};
  }
  template <class T>
  void pack(int64_t expert, const T* row, float* spare, float* packed, int64_t num_rows, int64_t r) const {
    if (order.present()) {
      T* ordered = reinterpret_cast<T*>(spare);
      for (int64_t k = 0; k < num_k; ++k) ordered[k] = row[int_at(order, expert * order.strides[0] + k)];
      row = ordered;
    }
    if constexpr (kHasDot && __is_same(T, bf16))
      pack_codes_row(matrix(0), rows_at<true>(packed, num_rows, 0, num_rows), row, r);
    else
      pack_codes_row(matrix(0), rows_at<false>(packed, num_rows, 0, num_rows), row, r);
  }
  void multiply(const Item& item, const float* packed, int64_t num_rows, int64_t panel, int num_panels, float* wide,
                float* c, int64_t ldc) const {
    CodedWeight weight = matrix(item.expert);
    with_kind(kind, dtype, [&](const auto& kind) {
      if constexpr (kHasDot)
        if (is_dot())
          return multiply_panels(weight, kind, rows_at<true>(packed, num_rows, item.row, item.num_rows), panel,
                                 num_panels, wide, c, ldc);
      multiply_panels(weight, kind, rows_at<false>(packed, num_rows, item.row, item.num_rows), panel, num_panels, wide,
                      c, ldc);
    });
  }
};

}  // namespace

// t: out!, x, ids, weights, gate_up, gate_up_scales, gate_up_zeros?, gate_up_order?, down, down_scales, down_zeros?,
// down_order?, gate_up_bias?, down_bias?; i: act (ExpertAct), num_hidden I, then group and kind of gate_up and of down;
// f: alpha, limit.
void experts_codes(const Tensor* t, const int64_t* i, const double* f) {
  int64_t dim = t[1].sizes[1];
  DType dtype = t[1].dtype;
  run_experts<CodedExperts>({t[0], t[1], t[2], t[3], t[12], t[13],
                             {t[4], t[5], t[6], t[7], 2 * i[1], dim, i[2], i[3], dtype},
                             {t[8], t[9], t[10], t[11], dim, i[1], i[4], i[5], dtype},
                             t[4].sizes[0], i[0], i[1], static_cast<float>(f[0]), static_cast<float>(f[1])});
}

}  // namespace fuseline::FL_ISA
