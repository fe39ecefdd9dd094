// Gated activations: act(gate) * up, act(gate) rounded to the dtype first.
#include "cuda/activate.h"
#include "cuda/kernels.h"
#include "cuda/vector.h"

namespace fuseline::cuda {
namespace {

constexpr int kThreads = 256;

struct ActArgs {
  void* out;
  const void *gate, *up;
  int64_t num_lines, dim, out_stride, gate_stride, up_stride;
  int act;
};

// Thread: a vector of a line.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) act_mul_kernel(const ActArgs a) {
  const int64_t vectors = a.dim / kVector, at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  launch_dependents();
  wait_for_prerequisites();
  if (at >= a.num_lines * vectors) return;
  const int64_t line = at / vectors, c = at % vectors * kVector;
  float gate[kVector], up[kVector];
  load(gate, static_cast<const T*>(a.gate) + line * a.gate_stride + c);
  load(up, static_cast<const T*>(a.up) + line * a.up_stride + c);
#pragma unroll
  for (int k = 0; k < kVector; ++k) gate[k] = rounded<T>(activate(gate[k], a.act)) * up[k];
  store(static_cast<T*>(a.out) + line * a.out_stride + c, gate);
}

}  // namespace

int act_mul(Stream stream, const ActMulCall& c) {
  const ActArgs a{c.out,        c.gate,        c.up,        c.num_lines,             c.dim,
                  c.out_stride, c.gate_stride, c.up_stride, static_cast<int>(c.act)};
  const auto blocks = [&](int64_t vector) {
    return dim3(static_cast<unsigned>((c.num_lines * (c.dim / vector) + kThreads - 1) / kThreads));
  };
  return with_float(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_aligned(16, sizeof(T), {c.out, c.gate, c.up}, c.dim, c.out_stride, c.gate_stride, c.up_stride))
      return launch(act_mul_kernel<T, kWide<T>>, blocks(kWide<T>), kThreads, stream, a);
    return launch(act_mul_kernel<T, 1>, blocks(1), kThreads, stream, a);
  });
}

}  // namespace fuseline::cuda
