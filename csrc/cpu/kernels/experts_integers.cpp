// Experts of integer codes with inputs of bf16, multiplied as integers where the instruction set has fast ones
// (int8_product.h).
#include "coded_experts.h"
#include "int8_tiles.h"

#if defined(FL_BASE)
namespace fuseline::FL_BASE {
void experts_codes(const Tensor* t, const int64_t* i, const double* f);
}

namespace fuseline::FL_ISA {
namespace {

struct IntegerExperts : ExpertCodes {
  int64_t padded() const { return padded_inputs(num_k); }
  int64_t step() const { return int8_row_words<Int8Operands>(num_k); }
  int64_t block() const { return block_inputs<2>(matrix(0)); }
  int64_t num_blocks() const { return (num_k + block() - 1) / block(); }
  int64_t packed_floats(int64_t rows) const { return (rows * 2 * (step() + num_blocks()) + 15) / 16 * 16; }
  int64_t spare_floats() const { return padded() + padded() / 2; }
  int64_t wide_floats(int64_t rows) const { return operand_words<2>(matrix(0), rows); }

  // `num` of the packed rows, from `first` on.
  IntegerRows<2> rows_at(const float* packed, int64_t num_rows, int64_t first, int64_t num) const {
    auto* words = reinterpret_cast<uint32_t*>(const_cast<float*>(packed));
    int64_t plane = num_rows * step(), blocks = num_blocks();
    auto* sums = reinterpret_cast<int32_t*>(words + 2 * plane);
    auto* factors = reinterpret_cast<float*>(sums + num_rows * blocks);
    return {num, step(), plane, block(), blocks, words + first * step(), sums + first * blocks, factors + first * blocks};
  }
  template <class T>
  void pack(int64_t expert, const T* row, float* spare, float* packed, int64_t num_rows, int64_t r) const {
    for (int64_t k = num_k; k < padded(); ++k) spare[k] = 0.0f;
    if (!order.present()) convert_row(row, num_k, spare);
    for (int64_t k = 0; order.present() && k < num_k; ++k)
      spare[k] = to_float(row[int_at(order, expert * order.strides[0] + k)]);
    auto* split = reinterpret_cast<int8_t*>(spare + padded());
    with_operands(kind, [&](auto operands) {
      pack_integers<decltype(operands)>(matrix(0), rows_at(packed, num_rows, 0, num_rows), spare, 0.0f, split, r);
    });
  }
  void multiply(const Item& item, const float* packed, int64_t num_rows, int64_t panel, int num_panels, float* wide,
                float* c, int64_t ldc) const {
    IntegerRows<2> rows = rows_at(packed, num_rows, item.row, item.num_rows);
    with_operands(kind, [&](auto operands) {
      multiply_int8_panels<decltype(operands)>(matrix(item.expert), rows, panel, num_panels,
                                               reinterpret_cast<uint32_t*>(wide), c, ldc);
    });
  }
};

}  // namespace

// experts_codes of bf16 if both weights are integers, with its arguments; else as the instruction set computes it that this
// one extends. Numbers of float16 have more bits than those of 15 keep, and a rounding more would show.
void experts_codes_integers(const Tensor* t, const int64_t* i, const double* f) {
  if (t[1].dtype != DType::bf16 || !is_integer(i[3]) || !is_integer(i[5])) return FL_BASE::experts_codes(t, i, f);
  run_coded<IntegerExperts>(t, i, f);
}

}  // namespace fuseline::FL_ISA
#endif
