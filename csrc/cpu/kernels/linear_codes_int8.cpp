// out[M, N] = x[M, K] @ weight^T + bias with a weight of integer codes, rows of x as integers: quantized to int8, or of half
// precision as they are (int8_product.h).
#include "int8_tiles.h"

#if defined(FL_BASE)
namespace fuseline::FL_BASE {
void linear_codes(const Tensor* t, const int64_t* i, const double* f);
}
#endif

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kBlockRows = 32 * kTileRows;   // rows quantized at a time

struct IntegerLinear {
  const Tensor &out, &x, &order, &bias;
  float fixed;   // scale of all rows, or 0
  CodedWeight weight;
};

// A row of x in fp32, its inputs in the weight's order, padded with zeros.
void wide_row(const IntegerLinear& job, int64_t row, float* wide) {
  int64_t num_k = job.weight.num_k, padded = padded_inputs(num_k);
  with_float(job.x.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x = static_cast<const T*>(job.x.data) + row_offset(job.x, row);
    if (!job.order.present()) return convert_row(x, num_k, wide);
    for (int64_t k = 0; k < num_k; ++k) wide[k] = to_float(x[index_at(job.order, k)]);
  });
  for (int64_t k = num_k; k < padded; ++k) wide[k] = 0.0f;
}

template <class Kind, int PLANES>
IntegerRows<PLANES> quantize_rows(const IntegerLinear& job, int64_t row0, int64_t rows) {
  int64_t step = int8_row_words<Kind>(job.weight.num_k), block = block_inputs<PLANES>(job.weight);
  int64_t blocks = (job.weight.num_k + block - 1) / block, plane = (rows + kRowTile - 1) / kRowTile * kRowTile * step;
  float* space = caller_floats(PLANES * plane + 2 * rows * blocks + rows);
  auto* sums = reinterpret_cast<int32_t*>(space + PLANES * plane);
  IntegerRows<PLANES> packed{rows, step, plane, block, blocks, reinterpret_cast<uint32_t*>(space), sums,
                             reinterpret_cast<float*>(sums + rows * blocks)};
  pack_rows(rows, [&](int64_t r) {
    int64_t padded = padded_inputs(job.weight.num_k);
    float* wide = chunk_floats(padded + PLANES * padded / 4);
    wide_row(job, row0 + r, wide);
    pack_integers<Kind>(job.weight, packed, wide, job.fixed, reinterpret_cast<int8_t*>(wide + padded), r);
  });
  return packed;
}

template <class Kind, int PLANES>
void multiply_integers(const IntegerLinear& job) {
  const CodedWeight& weight = job.weight;
  int64_t all = num_rows(job.x), num_blocks = (all + kBlockRows - 1) / kBlockRows, total = weight.num_panels();
  for (int64_t i = 0; i < num_blocks; ++i) {
    int64_t row0 = all * i / num_blocks, num = all * (i + 1) / num_blocks - row0;
    IntegerRows<PLANES> rows = quantize_rows<Kind, PLANES>(job, row0, num);
    int64_t width = chunk_width(total, weight.panel_words() * 4, num);
    parallel((total + width - 1) / width, [&](int64_t chunk) {
      int64_t p0 = chunk * width, panels = total - p0 < width ? total - p0 : width, ldc = panels * kPanel;
      int64_t words = operand_words<PLANES>(weight, num);
      float* space = chunk_floats(words + (num + 1) * ldc);
      float* bias = space + words;
      multiply_int8_panels<Kind>(weight, rows, p0, static_cast<int>(panels), reinterpret_cast<uint32_t*>(space),
                                 bias + ldc, ldc);
      store_sums(job.out, job.bias, row0, num, p0 * kPanel, ldc, bias + ldc, bias);
    });
  }
}

}  // namespace

// t: out!, x, codes, scales, zeros?, order?, bias?, x_scale?; i: num_out, group, kind. x_scale: of all rows.
void linear_codes_int8(const Tensor* t, const int64_t* i, const double*) {
  float fixed = t[7].present() ? float_at(t[7], 0) : 0.0f;
  IntegerLinear job{t[0], t[1], t[5], t[6], fixed, {t[2], t[3], t[4], last_size(t[1]), i[1]}};
  if (i[2] == kCodeInt8) return multiply_integers<Int8Operands, 1>(job);
  multiply_integers<Int4Operands, 1>(job);
}

#if defined(FL_BASE)
// linear_codes with inputs of half precision as integers where codes are; else as the instruction set computes it that this
// one extends. t: out!, x, codes, scales, zeros?, order?, bias?; i: num_out, group, kind.
void linear_codes_integers(const Tensor* t, const int64_t* i, const double* f) {
  if (t[1].dtype == DType::f32 || !is_integer(i[2])) return FL_BASE::linear_codes(t, i, f);
  IntegerLinear job{t[0], t[1], t[5], t[6], 0.0f, {t[2], t[3], t[4], last_size(t[1]), i[1], counts_up(i[2])}};
  with_operands(i[2], [&](auto operands) { multiply_integers<decltype(operands), 2>(job); });
}
#endif

}  // namespace fuseline::FL_ISA
