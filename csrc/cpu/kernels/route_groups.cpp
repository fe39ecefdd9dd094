// Router of DeepSeek's kind: experts are chosen by score plus bias, only among the best groups, and weighted by score.
#include "cpu/parallel.h"
#include "best.h"
#include "fuseline/codes.h"
#include "views.h"

namespace fuseline::FL_ISA {
namespace {

struct Groups {
  int64_t num_experts, k, score, num_groups, top_groups, group_best, renormalize;
  float epsilon, scale;
  int64_t size() const { return num_experts / num_groups; }
};

// x[n] = scores of logits x[n].
void score_row(float* x, int64_t n, int64_t score) {
  if (score == kRouteSigmoid) {
    return for_columns(n, [&](int64_t c, int64_t count) { store_some(x + c, vsigmoid(load_some(x + c, count)), count); });
  }
  float max = -kInfinity, total = 0.0f;
  for (int64_t e = 0; e < n; ++e) max = x[e] > max ? x[e] : max;
  for (int64_t e = 0; e < n; ++e) total += x[e] = exp_of(x[e] - max);
  for (int64_t e = 0; e < n; ++e) x[e] /= total;
}

// Experts outside the best groups get a choice of -infinity. `groups`: scratch of num_groups; `ids`: of as many, and at
// least of group_best.
void keep_best_groups(const Groups& job, float* choice, float* groups, int64_t* ids) {
  for (int64_t g = 0; g < job.num_groups; ++g) {
    const float* group = choice + g * job.size();
    best_of(group, job.size(), job.group_best, ids);
    groups[g] = 0.0f;
    for (int64_t j = 0; j < job.group_best; ++j) groups[g] += group[ids[j]];
  }
  best_of(groups, job.num_groups, job.top_groups, ids);
  for (int64_t g = 0; g < job.num_groups; ++g) {
    bool is_kept = false;
    for (int64_t j = 0; j < job.top_groups; ++j) is_kept |= ids[j] == g;
    for (int64_t e = 0; !is_kept && e < job.size(); ++e) choice[g * job.size() + e] = -kInfinity;
  }
}

void weigh(const Groups& job, const float* scores, const int64_t* ids, float* weights) {
  float total = 0.0f;
  for (int64_t j = 0; j < job.k; ++j) total += weights[j] = scores[ids[j]];
  for (int64_t j = 0; j < job.k; ++j) {
    if (job.renormalize) weights[j] /= total + job.epsilon;
    weights[j] *= job.scale;
  }
}

}  // namespace

// t: weights!, ids!, logits, bias?; i: score (RouteScore), num_groups, top_groups, group_best, renormalize; f: epsilon,
// scale. Computed in fp32, one rounding to the dtype of weights.
void route_groups(const Tensor* t, const int64_t* i, const double* f) {
  const Tensor &weights = t[0], &ids = t[1], &logits = t[2], &bias = t[3];
  const int64_t n = logits.sizes[1], k = ids.sizes[1];
  const Groups job{n, k, i[0], i[1], i[2], i[3], i[4], static_cast<float>(f[0]), static_cast<float>(f[1])};
  const int64_t num_ids = n > k ? n : k;
  parallel(logits.sizes[0], [&](int64_t r) {
    float* x = chunk_floats(2 * num_ids + 3 * n + k);
    auto* best = reinterpret_cast<int64_t*>(x);
    float *scores = x + 2 * num_ids, *choice = scores + n, *groups = choice + n, *w = groups + n;
    with_float(logits.dtype, [&](auto type) {
      convert_row(static_cast<decltype(type)*>(logits.data) + r * logits.strides[0], n, scores);
    });
    score_row(scores, n, job.score);
    for (int64_t e = 0; e < n; ++e) choice[e] = 0.0f;
    if (bias.present())
      with_float(bias.dtype, [&](auto type) { convert_row(static_cast<const decltype(type)*>(bias.data), n, choice); });
    for (int64_t e = 0; e < n; ++e) choice[e] += scores[e];
    if (job.num_groups > 1) keep_best_groups(job, choice, groups, best);
    best_of(choice, n, k, best);
    weigh(job, scores, best, w);
    for (int64_t j = 0; j < k; ++j) set_int(ids, r * ids.strides[0] + j * ids.strides[1], best[j]);
    with_float(weights.dtype, [&](auto type) {
      convert_row(w, k, static_cast<decltype(type)*>(weights.data) + r * weights.strides[0]);
    });
  });
}

}  // namespace fuseline::FL_ISA
