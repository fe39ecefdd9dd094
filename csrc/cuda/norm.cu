// RMSNorm and LayerNorm, alone or after a residual addition. One warp or one block computes a row (norm.h).
#include "cuda/norm.h"

namespace fuseline::cuda {
namespace {

constexpr int kRowsPerBlock = 4;  // rows per block if a warp computes each
template <int kThreads>
constexpr int kBlock = kThreads == kWarp ? kRowsPerBlock * kWarp : kThreads;

// Grid: one row per block, or kRowsPerBlock with a warp each. kVector: numbers per load. 1024 threads share a
// multiprocessor's registers, 768 of rows of a warp.
template <class T, int kVector, int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kThreads == kWarp ? 6 : 1024 / kThreads)
    norm_kernel(const NormArgs a) {
  __shared__ float shared[kThreads == kWarp ? 1 : kThreads / kWarp];
  const int thread = threadIdx.x % kThreads;
  const uint32_t row = kThreads == kWarp ? blockIdx.x * kRowsPerBlock + threadIdx.x / kWarp : blockIdx.x;
  const T* weight = static_cast<const T*>(a.weight);
  launch_dependents();
  for (int64_t c = thread * kVector; weight && c < a.dim; c += kThreads * kVector) prefetch(weight + c);
  wait_for_prerequisites();
  if (row < a.num_rows) norm_row<T, kVector, kThreads>(a, row, thread, shared);
}

template <class T, int kVector>
int launch_norm(const NormArgs& a, Stream stream) {
  const auto launch_with = [&](auto kernel, unsigned blocks, int threads) {
    return launch(kernel, dim3(blocks), threads, stream, a);
  };
  const int64_t vectors = (a.dim + kVector - 1) / kVector;
  if (vectors <= kHeld * kWarp)
    return launch_with(norm_kernel<T, kVector, kWarp>, (a.num_rows + kRowsPerBlock - 1) / kRowsPerBlock, kBlock<kWarp>);
  if (vectors <= kHeld * 256) return launch_with(norm_kernel<T, kVector, 256>, a.num_rows, 256);
  if (vectors <= kHeld * 512) return launch_with(norm_kernel<T, kVector, 512>, a.num_rows, 512);
  return launch_with(norm_kernel<T, kVector, 1024>, a.num_rows, 1024);
}

}  // namespace

int norm(Stream stream, const NormCall& c) {
  const NormArgs a = args_of(c);
  return with_float(c.dtype, [&](auto type) {
    using T = decltype(type);
    return is_wide<T>(a) ? launch_norm<T, kWide<T>>(a, stream) : launch_norm<T, 1>(a, stream);
  });
}

}  // namespace fuseline::cuda
