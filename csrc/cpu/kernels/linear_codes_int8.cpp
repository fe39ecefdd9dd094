// out[M, N] = x[M, K] @ weight^T + bias, rows of x quantized to int8, with a weight of int8 or int4 codes.
#include "int8_tiles.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kBlockRows = 32 * kTileRows;   // rows quantized at a time

struct LinearCodesInt8 {
  const Tensor &out, &x, &order, &bias, &x_scale;
  CodedWeight weight;
};

// A row of x in fp32, its inputs in the weight's order, padded with zeros.
void wide_row(const LinearCodesInt8& job, int64_t row, float* wide) {
  int64_t num_k = job.weight.num_k, padded = padded_inputs(num_k);
  with_float(job.x.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x = static_cast<const T*>(job.x.data) + row_offset(job.x, row);
    if (!job.order.present()) return convert_row(x, num_k, wide);
    for (int64_t k = 0; k < num_k; ++k) wide[k] = to_float(x[index_at(job.order, k)]);
  });
  for (int64_t k = num_k; k < padded; ++k) wide[k] = 0.0f;
}

template <class Kind>
Int8Rows quantize_rows(const LinearCodesInt8& job, int64_t row0, int64_t rows) {
  int64_t step = int8_row_words<Kind>(job.weight.num_k), groups = job.weight.num_groups();
  int64_t size = (rows + kRowTile - 1) / kRowTile * kRowTile * step;
  float* space = caller_floats(size + rows * (groups + 1));
  Int8Rows block{rows, step, reinterpret_cast<uint32_t*>(space), reinterpret_cast<int32_t*>(space + size),
                 space + size + rows * groups};
  float fixed = job.x_scale.present() ? float_at(job.x_scale, 0) : 0.0f;
  pack_rows(rows, [&](int64_t r) {
    int64_t padded = padded_inputs(job.weight.num_k);
    float* wide = chunk_floats(padded + padded / 4);
    wide_row(job, row0 + r, wide);
    pack_int8_row<Kind>(job.weight, block, wide, fixed, reinterpret_cast<int8_t*>(wide + padded), r);
  });
  return block;
}

template <class Kind>
void multiply_int8(const LinearCodesInt8& job) {
  const CodedWeight& weight = job.weight;
  int64_t all = num_rows(job.x), num_blocks = (all + kBlockRows - 1) / kBlockRows, total = weight.num_panels();
  for (int64_t i = 0; i < num_blocks; ++i) {
    int64_t row0 = all * i / num_blocks, rows = all * (i + 1) / num_blocks - row0;
    Int8Rows block = quantize_rows<Kind>(job, row0, rows);
    int64_t width = chunk_width(total, weight.panel_words() * 4, rows);
    parallel((total + width - 1) / width, [&](int64_t chunk) {
      int64_t p0 = chunk * width, panels = total - p0 < width ? total - p0 : width, ldc = panels * kPanel;
      int64_t words = operand_words(weight, rows);
      float* space = chunk_floats(words + (rows + 1) * ldc);
      float* bias = space + words;
      multiply_int8_panels<Kind>(weight, block, p0, static_cast<int>(panels), reinterpret_cast<uint32_t*>(space),
                                 bias + ldc, ldc);
      store_sums(job.out, job.bias, row0, rows, p0 * kPanel, ldc, bias + ldc, bias);
    });
  }
}

}  // namespace

// t: out!, x, codes, scales, zeros?, order?, bias?, x_scale?; i: num_out, group, kind. x_scale: of all rows.
void linear_codes_int8(const Tensor* t, const int64_t* i, const double*) {
  LinearCodesInt8 job{t[0], t[1], t[5], t[6], t[7], {t[2], t[3], t[4], last_size(t[1]), i[1]}};
  if (i[2] == kCodeInt8) return multiply_int8<Int8Operands>(job);
  multiply_int8<Int4Operands>(job);
}

}  // namespace fuseline::FL_ISA
