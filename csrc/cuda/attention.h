// Shared by the kernels of decode attention: how a token's keys are split, and how partial softmax results are merged.
#pragma once
#include "cuda/device.h"
#include "cuda/fp8.h"

namespace fuseline::cuda {

constexpr int kKeys = 16;    // per tile
constexpr int kSplit = 256;  // keys of the smallest split
constexpr int kRun = 4;      // splits that bulk copies' kernel merges first
constexpr int kHeads = 8;    // per tile
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
  int run, together;  // splits of a partial result in the workspace; partial results that are merged before all others
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
    const int length = end - start;
    split = length <= kSplit * most ? kSplit : kSplit * ((length + kSplit * most - 1) / (kSplit * most));
    num_splits = length <= 0 ? 0 : split == kSplit ? (length + kSplit - 1) / kSplit : (length + split - 1) / split;
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

// Adds a tile's scores to a head's state, whose sum is this lane's share: the lane has those of keys `key` + 8 n + j.
// Gives exp2(score - maximum) as operands p, and returns the factor that earlier sums shrink by.
template <class T, class IsSeen>
FL_DEVICE float soften(SoftmaxState& state, float scale, float softcap, int key, float (&scores)[2][4],
                       const IsSeen& is_seen, uint32_t (&p)[2]) {
  float top = kNone;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float x = scores[n][j] * scale;
      if (softcap > 0.0f) x = softcap * tanhf(x / softcap);
      scores[n][j] = is_seen(key + 8 * n + j) ? x : kNone;
      top = fmaxf(top, scores[n][j]);
    }
  top = fmaxf(top, shuffle_xor(top, 1));
  top = fmaxf(fmaxf(top, shuffle_xor(top, 2)), state.max);
  const float finite = top == kNone ? 0.0f : top, shrink = exp2f(state.max - finite);
  state.max = top;
  state.sum *= shrink;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float x = exp2f(scores[n][0] - finite), y = exp2f(scores[n][1] - finite);
    state.sum += x + y;
    p[n] = pack<T>(x, y);
  }
  return shrink;
}

// Merges another partial result, of one dim, into `state` and `value`.
FL_DEVICE void fold(SoftmaxState& state, float& value, SoftmaxState other, float other_value) {
  const float2 weights = state.merge(other);
  value = fmaf(value, weights.x, other_value * weights.y);
}

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

// Keeps one dim of a slot's partial result of number `part`.
template <int kDim>
FL_DEVICE void keep_partial(const AttentionArgs& a, int64_t slot, int64_t head, int part, int dim, SoftmaxState state,
                            float value) {
  const int64_t row = (slot * a.num_heads + head) * a.num_splits + part;
  a.workspace[row * kDim + dim] = value;
  if (dim) return;
  float* states = a.workspace + a.num_slots * a.num_heads * a.num_splits * kDim + 2 * row;
  states[0] = state.max;
  states[1] = state.sum;
}

// Eight numbers as the cache stores them; operand() converts them to a product's operand.
template <class Cache> struct Raw { using Type = uint4; };
template <int kExponent, int kFraction> struct Raw<Fp8<kExponent, kFraction>> { using Type = uint2; };

template <class T, class Cache>
FL_DEVICE uint4 operand(uint4 raw) { return raw; }
template <class T, class Cache>
FL_DEVICE uint4 operand(uint2 raw) {
  const uint2 low = widen(raw.x, Cache{}, T{}), high = widen(raw.y, Cache{}, T{});
  return {low.x, low.y, high.x, high.y};
}

// The kernel that copies in bulk (attention_bulk.cu), and the merge of rows with several partial results.
int decode_by_bulk(const AttentionArgs& a, const DecodeAttentionCall& c, Stream stream);
int merge_partials(const AttentionArgs& a, const DecodeAttentionCall& c, Stream stream);

}  // namespace fuseline::cuda
