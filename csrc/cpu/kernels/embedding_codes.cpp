// out[R, K] = rows of a weight of codes, dequantized: of a tied embedding that stays one copy.
#include "codes.h"

namespace fuseline::FL_ISA {
namespace {

// Values of one output [num_k], scaled, in fp32.
template <class Kind>
void dequantize_row(const Kind& kind, const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t row,
                    int64_t num_k, int64_t group, bool adds_zero, float* out) {
  int64_t num_words = codes.sizes[1], panel = row / kPanel, lane = row % kPanel;
  const uint32_t* words = static_cast<const uint32_t*>(codes.data) + panel * num_words * kPanel + lane;
  constexpr bool kIsFives = __is_same(Kind, Fives);
  constexpr int kWords = kIsFives ? 5 : 1, kLow = kIsFives ? 4 : 1, kPer = Kind::kCodes / kLow;
  int64_t num_units = num_words / kWords;
  for (int64_t u = 0; u < num_units; u += kLanes) {
    int64_t count = num_units - u < kLanes ? num_units - u : kLanes;
    auto words_at = [&](int w) {
      vu some{};
      for (int64_t l = 0; l < count; ++l) some[l] = words[((u + l) * kWords + w) * kPanel];
      return some;
    };
    vu high = words_at(kWords - 1);
    for (int w = 0; w < kLow; ++w) {
      vu some = words_at(w);
      for (int j = 0; j < kPer; ++j) {
        vf values{};
        if constexpr (kIsFives) values = kind.value(some, high, w, j);
        else values = kind.value(some, j) * set1(Kind::kUnit);
        for (int64_t l = 0; l < count; ++l) {
          int64_t k = (u + l) * Kind::kCodes + w * kPer + j;
          if (k < num_k) out[k] = values[l];
        }
      }
    }
  }
  int64_t length = group ? group : num_k;
  for (int64_t k = 0; k < num_k; k += length) {
    int64_t at = (panel * scales.sizes[1] + k / length) * kPanel + lane;
    float scale = float_at(scales, at), zero = zeros.present() ? float_at(zeros, at) : 0.0f;
    for (int64_t i = k; i < k + length && i < num_k; ++i) out[i] = adds_zero ? out[i] * scale + zero : (out[i] - zero) * scale;
  }
}

}  // namespace

// t: out!, ids, codes, scales, zeros?; i: num_in, group, kind. An id outside the weight gives zeros.
void embedding_codes(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &out = t[0], &ids = t[1], &codes = t[2];
  int64_t num_ids = num_rows(out), num_k = i[0];
  with_kind(i[2], out.dtype, [&](const auto& kind) {
    parallel_ranges(num_ids, row_grain(num_k), [&](int64_t begin, int64_t end) {
      float* values = chunk_floats(num_k);
      for (int64_t r = begin; r < end; ++r) {
        int64_t id = id_at(ids, r);
        bool is_known = id >= 0 && id < codes.sizes[0] * kPanel;
        if (is_known) dequantize_row(kind, codes, t[3], t[4], id, num_k, i[1], counts_up(i[2]), values);
        for (int64_t k = 0; !is_known && k < num_k; ++k) values[k] = 0.0f;
        with_float(out.dtype, [&](auto o) { convert_row(values, num_k, row<decltype(o)>(out, r)); });
      }
    });
  });
}

}  // namespace fuseline::FL_ISA
