// Merges the partial results of tokens whose keys decode attention has cut into several splits.
#include "cuda/attention.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kMergeThreads = 128, kMergeDims = 4;  // of a block; of a thread

// Dims of a head, merged so far.
struct Merged {
  SoftmaxState state{kNone, 0.0f};
  float values[kMergeDims] = {};

  FL_DEVICE void fold(SoftmaxState other, const float (&others)[kMergeDims]) {
    const float2 weights = state.merge(other);
#pragma unroll
    for (int d = 0; d < kMergeDims; ++d) values[d] = fmaf(values[d], weights.x, others[d] * weights.y);
  }
};

// Grid: (group of heads, sequence). Partial results are merged in ascending order, kTogether of them first.
template <class T, int kDim, int kTogether>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const AttentionArgs a) {
  constexpr int kAtOnce = kTogether > 1 ? 16 : 8;  // partial results loaded concurrently: steps of few rows have many
  constexpr int kOfHead = kDim / kMergeDims, kHeadsOfBlock = kMergeThreads / kOfHead;
  const int thread = threadIdx.x, dim = thread % kOfHead * kMergeDims;
  const int64_t head = static_cast<int64_t>(blockIdx.x) * kHeadsOfBlock + thread / kOfHead, seq = blockIdx.y;
  launch_dependents();
  wait_for_prerequisites();
  const int begin = a.query_start[seq], num_tokens = a.query_start[seq + 1] - begin, length = a.seq_lens[seq];
  if (head >= a.num_heads || (a.is_mixed && num_tokens != 1)) return;
  for (int token = 0; token < num_tokens; ++token) {
    const int num_splits = Cut(length - num_tokens + token, a.window, static_cast<int>(a.num_splits)).num_splits;
    const int num_parts = (num_splits + a.run - 1) / a.run;
    if (num_parts < 2) continue;
    const int64_t row = ((a.is_mixed ? seq : begin + token) * a.num_heads + head) * a.num_splits;
    const float* states = a.workspace + a.num_slots * a.num_heads * a.num_splits * kDim + 2 * row;
    Merged whole, some;
    for (int i = 0; i < num_parts; i += kAtOnce) {
      float loaded[kAtOnce][2], values[kAtOnce][kMergeDims];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int part = i + j < num_parts ? i + j : i;
        load_now(loaded[j], states + 2 * part);
        load_now(values[j], a.workspace + (row + part) * kDim + dim);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j < num_parts) some.fold({loaded[j][0], loaded[j][1]}, values[j]);
        if ((j + 1) % kTogether) continue;
        whole.fold(some.state, some.values);
        some = {};
      }
    }
#pragma unroll
    for (int d = 0; d < kMergeDims; ++d) finish<T>(a, begin + token, head, dim + d, whole.state, whole.values[d]);
  }
}

template <class T, int kDim>
int launch_merge(const AttentionArgs& a, int64_t num_seqs, Stream stream) {
  constexpr int kHeadsOfBlock = kMergeThreads * kMergeDims / kDim;
  const int64_t num_groups = (a.num_heads + kHeadsOfBlock - 1) / kHeadsOfBlock;
  const dim3 grid(static_cast<unsigned>(num_groups), static_cast<unsigned>(num_seqs));
  const auto kernel = a.together == kRun ? merge_kernel<T, kDim, kRun> : merge_kernel<T, kDim, 1>;
  return launch(kernel, grid, kMergeThreads, stream, a);
}

}  // namespace

int merge_partials(const AttentionArgs& a, const DecodeAttentionCall& c, Stream stream) {
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    switch (c.dim) {
      case 64: return launch_merge<T, 64>(a, c.num_seqs, stream);
      case 128: return launch_merge<T, 128>(a, c.num_seqs, stream);
      case 256: return launch_merge<T, 256>(a, c.num_seqs, stream);
      default: return kBadArgument;
    }
  });
}

}  // namespace fuseline::cuda
