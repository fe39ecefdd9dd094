// Experts whose weights are codes of 4 or 8 bits (codes.h), multiplied as linear_codes does.
#include "coded_experts.h"

namespace fuseline::FL_ISA {
namespace {

struct CodedExperts : ExpertCodes {
  bool is_dot() const { return kHasDot && dtype == DType::bf16 && !is_fives(kind); }
  int64_t depth_blocks() const { return (num_k + kDepth - 1) / kDepth; }
  int64_t row_floats() const { return is_dot() ? Packing<true>::step(1) : Packing<false>::step(1); }
  int64_t num_sums() const { return zeros.present() ? scales.sizes[2] : 0; }
  int64_t packed_floats(int64_t rows) const {
    return (rows * (depth_blocks() * row_floats() + num_sums()) + 15) / 16 * 16;
  }

  int64_t spare_floats() const { return order.present() ? num_k : 0; }
  int64_t wide_floats(int64_t) const { return kWideSize; }
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
      if (is_dot()) return pack_codes_row(matrix(0), rows_at<true>(packed, num_rows, 0, num_rows), row, r);
    pack_codes_row(matrix(0), rows_at<false>(packed, num_rows, 0, num_rows), row, r);
  }
  template <class Kind>
  void multiply_kind(const Kind& kind, const Item& item, const float* packed, int64_t num_rows, int64_t panel,
                     int num_panels, float* wide, float* c, int64_t ldc) const {
    CodedWeight weight = matrix(item.expert);
    if constexpr (kHasDot && !__is_same(Kind, Fives))
      if (is_dot())
        return multiply_panels(weight, kind, rows_at<true>(packed, num_rows, item.row, item.num_rows), panel,
                               num_panels, wide, c, ldc);
    multiply_panels(weight, kind, rows_at<false>(packed, num_rows, item.row, item.num_rows), panel, num_panels, wide, c,
                    ldc);
  }
  void multiply(const Item& item, const float* packed, int64_t num_rows, int64_t panel, int num_panels, float* wide,
                float* c, int64_t ldc) const {
    with_kind(kind, dtype, [&](const auto& kind) {
      multiply_kind(kind, item, packed, num_rows, panel, num_panels, wide, c, ldc);
    });
  }
};

}  // namespace

void experts_codes(const Tensor* t, const int64_t* i, const double* f) { run_coded<CodedExperts>(t, i, f); }

}  // namespace fuseline::FL_ISA
