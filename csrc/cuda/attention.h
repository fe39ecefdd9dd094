// Shared by the kernels of attention.cu: how a token's keys are split, and how partial softmax results are merged.
#pragma once
#include "cuda/device.h"

namespace fuseline::cuda {

constexpr int kKeys = 16;    // per tile
constexpr int kSplit = 256;  // keys of the smallest split
constexpr float kNone = -INFINITY;

struct AttentionArgs {
  void* out;
  const void *q, *k_cache, *v_cache;
  const int32_t *block_table, *seq_lens, *query_start;
  const void* sinks;
  const float *k_scale, *v_scale;
  // For rows with several splits: value sums [slots, H, splits, D], then maxima and denominators [slots, H, splits, 2].
  // A slot is a token; in mixed batches, where only sequences of one token are computed, it is a sequence.
  float* workspace;
  bool is_mixed;
  int64_t num_slots, num_heads, group, num_splits;
  int64_t out_token, out_head, q_head, q_token, k_block, k_head, k_token, v_block, v_head, v_token, table_stride;
  int64_t block_shift;  // log2 of B
  int window;
  float scale, softcap;  // times log2(e), so that exp2 can be used
};

// A token sees keys [first, end), cut from `start` on into splits of `split` keys.
struct Cut {
  int first, start, end, split, num_splits;

  FL_DEVICE Cut(int position, int window, int most) {
    first = position - window + 1 > 0 ? position - window + 1 : 0;
    start = first / kKeys * kKeys;
    end = position + 1;
    const int longest = (end - start + kSplit * most - 1) / (kSplit * most);
    split = kSplit * (longest > 1 ? longest : 1);
    num_splits = end > start ? (end - start + split - 1) / split : 0;
  }
};

// Partial softmax: the maximum score and the sum of exp2(score - max), the denominator.
struct SoftmaxState {
  float max, sum;

  // Merges another partial result; returns the factors for this one's and the other's value sums.
  FL_DEVICE float2 merge(SoftmaxState other) {
    const float top = fmaxf(max, other.max), finite = top == kNone ? 0.0f : top;
    const float2 weights{exp2f(max - finite), exp2f(other.max - finite)};
    max = top;
    sum = fmaf(sum, weights.x, other.sum * weights.y);
    return weights;
  }
};

template <class T>
FL_DEVICE void finish(const AttentionArgs& a, int64_t token, int64_t head, int64_t dim, SoftmaxState state,
                      float value) {
  if (a.sinks) {
    const float sink = to_float(static_cast<const T*>(a.sinks)[head]) * kLog2e;
    const float top = fmaxf(state.max, sink), shrink = exp2f(state.max - top);
    state.sum = fmaf(state.sum, shrink, exp2f(sink - top));
    value *= shrink;
  }
  if (a.v_scale) value *= *a.v_scale;
  value = value / (state.sum == 0.0f ? 1.0f : state.sum);
  static_cast<T*>(a.out)[token * a.out_token + head * a.out_head + dim] = cast<T>(value);
}

}  // namespace fuseline::cuda
