// What the kernels of attention.cu share: how the keys of a token are cut, and how parts of a softmax become one.
#pragma once
#include "cuda/device.h"

namespace fuseline::cuda {

constexpr int kKeys = 16;    // of a tile
constexpr int kSplit = 256;  // keys of the shortest split
constexpr float kNone = -INFINITY;

struct AttentionArgs {
  void* out;
  const void *q, *k_cache, *v_cache;
  const int32_t *block_table, *seq_lens, *query_start;
  const void* sinks;
  const float *k_scale, *v_scale;
  // Sums [slots, H, splits, D], then maxima and masses [slots, H, splits, 2], of rows of more than one split. A slot is
  // a token, or, if only sequences of one token are computed, a sequence.
  float* workspace;
  bool is_mixed;
  int64_t num_slots, num_heads, group, num_splits;
  int64_t out_token, out_head, q_head, q_token, k_block, k_head, k_token, v_block, v_head, v_token, table_stride;
  int64_t block_shift;  // log2 of B
  int window;
  float scale, softcap;  // in units of log2 e
};

// The keys of a token: those from `first` to `end`, from `start` on in splits of `split`.
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

// Softmax of a part of the keys: the maximum m of the scores, the sum of their powers of two less m.
struct Mass {
  float m, sum;

  // Takes in another part; what to multiply this one's and the other's sums of values with.
  FL_DEVICE float2 fold(Mass other) {
    const float top = fmaxf(m, other.m), finite = top == kNone ? 0.0f : top;
    const float2 weights{exp2f(m - finite), exp2f(other.m - finite)};
    m = top;
    sum = fmaf(sum, weights.x, other.sum * weights.y);
    return weights;
  }
};

template <class T>
FL_DEVICE void finish(const AttentionArgs& a, int64_t token, int64_t head, int64_t dim, Mass mass, float value) {
  if (a.sinks) {
    const float sink = to_float(static_cast<const T*>(a.sinks)[head]) * kLog2e;
    const float top = fmaxf(mass.m, sink), shrink = exp2f(mass.m - top);
    mass.sum = fmaf(mass.sum, shrink, exp2f(sink - top));
    value *= shrink;
  }
  if (a.v_scale) value *= *a.v_scale;
  value = value / (mass.sum == 0.0f ? 1.0f : mass.sum);
  static_cast<T*>(a.out)[token * a.out_token + head * a.out_head + dim] = cast<T>(value);
}

}  // namespace fuseline::cuda
