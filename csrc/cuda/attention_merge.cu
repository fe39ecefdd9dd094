// Merges the partial results of tokens whose keys decode attention has cut into several splits.
#include "cuda/attention.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

// Grid: (head, sequence), one thread per dim of D. Partial results are merged in ascending order, `together` of them first.
template <class T, int kDim>
__global__ void __launch_bounds__(kDim) merge_kernel(const AttentionArgs a) {
  constexpr int kAtOnce = 16;  // partial results loaded concurrently, a multiple of `together`
  const int64_t head = blockIdx.x, seq = blockIdx.y;
  const int dim = threadIdx.x;
  launch_dependents();
  wait_for_prerequisites();
  const int begin = a.query_start[seq], num_tokens = a.query_start[seq + 1] - begin, length = a.seq_lens[seq];
  if (a.is_mixed && num_tokens != 1) return;
  for (int token = 0; token < num_tokens; ++token) {
    const int num_splits = Cut(length - num_tokens + token, a.window, static_cast<int>(a.num_splits)).num_splits;
    const int num_parts = (num_splits + a.run - 1) / a.run;
    if (num_parts < 2) continue;
    const int64_t row = ((a.is_mixed ? seq : begin + token) * a.num_heads + head) * a.num_splits;
    const float* states = a.workspace + a.num_slots * a.num_heads * a.num_splits * kDim + 2 * row;
    SoftmaxState whole{kNone, 0.0f}, some = whole;
    float value = 0.0f, some_value = 0.0f;
    for (int i = 0; i < num_parts; i += kAtOnce) {
      SoftmaxState parts[kAtOnce];
      float values[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const bool is_there = i + j < num_parts;
        parts[j] = is_there ? SoftmaxState{states[2 * (i + j)], states[2 * (i + j) + 1]} : SoftmaxState{kNone, 0.0f};
        values[j] = is_there ? a.workspace[(row + i + j) * kDim + dim] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        fold(some, some_value, parts[j], values[j]);
        if ((j + 1) & (a.together - 1)) continue;
        fold(whole, value, some, some_value);
        some = {kNone, 0.0f};
        some_value = 0.0f;
      }
    }
    finish<T>(a, begin + token, head, dim, whole, value);
  }
}

}  // namespace

int merge_partials(const AttentionArgs& a, const DecodeAttentionCall& c, Stream stream) {
  const dim3 rows(static_cast<unsigned>(a.num_heads), static_cast<unsigned>(c.num_seqs));
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    switch (c.dim) {
      case 64: return launch(merge_kernel<T, 64>, rows, 64, stream, a);
      case 128: return launch(merge_kernel<T, 128>, rows, 128, stream, a);
      case 256: return launch(merge_kernel<T, 256>, rows, 256, stream, a);
      default: return kBadArgument;
    }
  });
}

}  // namespace fuseline::cuda
