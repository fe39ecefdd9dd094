// MoE router: the k best experts of each token and their weights.
#include "cpu/parallel.h"
#include "best.h"
#include "views.h"
#include "fuseline/codes.h"

namespace fuseline::FL_ISA {
namespace {

float sum_of_exp(const float* x, int64_t n, float max) {
  float total = 0.0f;
  for (int64_t e = 0; e < n; ++e) total += exp_of(x[e] - max);
  return total;
}

void route_row(const float* x, int64_t n, int64_t k, int64_t order, bool renormalize, int64_t* ids, float* weights) {
  best_of(x, n, k, ids);
  float max = x[ids[0]], total = 0.0f;
  for (int64_t j = 0; j < k; ++j) total += weights[j] = exp_of(x[ids[j]] - max);
  if (order == kSoftmaxThenTopk) {
    float all = sum_of_exp(x, n, max);
    total = 0.0f;
    for (int64_t j = 0; j < k; ++j) total += weights[j] = weights[j] / all;
    if (!renormalize) return;
  }
  for (int64_t j = 0; j < k; ++j) weights[j] = weights[j] / total;
}

}  // namespace

// t: weights!, ids!, logits; i: order, renormalize. Softmax in fp32, one rounding to the dtype of weights.
void route_topk(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &weights = t[0], &ids = t[1], &logits = t[2];
  int64_t n = logits.sizes[1], k = ids.sizes[1];
  parallel(logits.sizes[0], [&](int64_t r) {
    float* x = chunk_floats(n + k + 2 * k + 2);
    int64_t* best = reinterpret_cast<int64_t*>(x);
    float *row = x + 2 * k, *w = row + n;
    with_float(logits.dtype, [&](auto p) {
      convert_row(static_cast<decltype(p)*>(logits.data) + r * logits.strides[0], n, row);
    });
    route_row(row, n, k, i[0], i[1] != 0, best, w);
    for (int64_t j = 0; j < k; ++j) set_int(ids, r * ids.strides[0] + j * ids.strides[1], best[j]);
    with_float(weights.dtype, [&](auto p) {
      convert_row(w, k, static_cast<decltype(p)*>(weights.data) + r * weights.strides[0]);
    });
  });
}

}  // namespace fuseline::FL_ISA
