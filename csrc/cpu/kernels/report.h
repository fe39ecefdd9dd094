// Log-probabilities of one row, reported alike by sampling and by prompt scoring.
#pragma once
#include "fuseline/codes.h"
#include "scan.h"

namespace fuseline::FL_ISA {
namespace {

// Reported value of a token: its entry less `max` and `log_denominator` if the cut keeps it, else -inf.
struct Values {
  Row row;
  Cut cut;
  float max = 0.0f, log_denominator = 0.0f;
  float of(int64_t id) const { return cut.keeps(row.x[id], id) ? row.x[id] - max - log_denominator : -kInfinity; }
};

inline Values log_softmax_of(const Row& row, const Cut& cut) {
  return {row, cut, row.max, static_cast<float>(__builtin_log(denominator(row, cut, kLargest)))};
}

struct ReportTensors {
  const Tensor &logprobs, &ranks, &top_ids, &top_logprobs;
};

// Writes the token's value and rank (1 + number of strictly greater entries), then the num_top best.
inline void write_report(const ReportTensors& t, int64_t r, const Values& values, int64_t token, int64_t num_top,
                         int64_t* ids) {
  static_cast<float*>(t.logprobs.data)[r * t.logprobs.strides[0]] = values.of(token);
  set_int(t.ranks, r * t.ranks.strides[0], 1 + count_greater(values.row, values.row.x[token]));
  best_ids(values.row, num_top, ids);
  for (int64_t j = 0; j < num_top; ++j) {
    set_int(t.top_ids, r * t.top_ids.strides[0] + j * t.top_ids.strides[1], ids[j]);
    int64_t at = r * t.top_logprobs.strides[0] + j * t.top_logprobs.strides[1];
    static_cast<float*>(t.top_logprobs.data)[at] = values.of(ids[j]);
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
