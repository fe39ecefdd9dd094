// The library's one exported name: a table of its functions with their arguments' types, read by
// compile/kernels/native_cuda.py.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

struct Entry {
  const char* name;
  const void* function;
  const char* types;  // a letter an argument: p pointer, i int64, f double
};

template <class A>
constexpr char letter() {
  if (std::is_pointer_v<A>) return 'p';
  static_assert(std::is_pointer_v<A> || std::is_same_v<A, int64_t> || std::is_same_v<A, double>);
  return std::is_same_v<A, double> ? 'f' : 'i';
}

template <class... A>
Entry entry(const char* name, int (*function)(A...)) {
  static const char types[] = {letter<A>()..., '\0'};
  return {name, reinterpret_cast<const void*>(function), types};
}

#ifdef __CUDACC__

__global__ void probe_kernel(int) {}

// What keeps the kernels from running on the present device; empty when nothing does.
const char* problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#else

const char* problem() { return ""; }
const char* describe(int) { return "the emulation takes no such arguments"; }

#endif

}  // namespace

extern "C" {

// Ends with an entry without a name.
__attribute__((visibility("default"))) const Entry* fuseline_cuda_entries() {
  static const Entry entries[] = {
      entry("linear", linear),
      entry("linear_act_mul", linear_act_mul),
      entry("norm", norm),
      entry("act_mul", act_mul),
      entry("rope", rope),
      entry("rope_cache", rope_cache),
      entry("decode_attention", decode_attention),
      {nullptr, nullptr, nullptr},
  };
  return entries;
}

__attribute__((visibility("default"))) const char* fuseline_cuda_problem() { return problem(); }
__attribute__((visibility("default"))) const char* fuseline_cuda_describe(int error) { return describe(error); }

}  // extern "C"

}  // namespace fuseline::cuda
