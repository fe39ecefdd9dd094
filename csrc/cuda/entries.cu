// The library's one exported name: a table of its functions with their arguments' types, read by
// compile/kernels/native_cuda.py.
#include <utility>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

// A function takes the stream and its arguments in one array, eight bytes each: a caller packs them faster than it
// passes them one by one.
struct Entry {
  const char* name;
  int (*function)(void* stream, const uint64_t* arguments);
  const char* types;  // a letter an argument, as Python's struct has them: q pointer or int64, d double
};

template <class A>
A argument(uint64_t bits) {
  static_assert(std::is_pointer_v<A> || std::is_same_v<A, int64_t> || std::is_same_v<A, double>);
  A value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <auto kFunction, class... A, size_t... kIndex>
int unpack(void* stream, const uint64_t* arguments, int (*)(void*, A...), std::index_sequence<kIndex...>) {
  return kFunction(stream, argument<A>(arguments[kIndex])...);
}

template <class... A>
const char* types_of(int (*)(void*, A...)) {
  static const char types[] = {(std::is_same_v<A, double> ? 'd' : 'q')..., '\0'};
  return types;
}

template <class... A>
constexpr std::index_sequence_for<A...> indices(int (*)(void*, A...)) { return {}; }

template <auto kFunction>
Entry entry(const char* name) {
  const auto call = [](void* stream, const uint64_t* arguments) {
    return unpack<kFunction>(stream, arguments, kFunction, indices(kFunction));
  };
  return {name, call, types_of(kFunction)};
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
      entry<linear>("linear"),
      entry<linear_act_mul>("linear_act_mul"),
      entry<norm>("norm"),
      entry<act_mul>("act_mul"),
      entry<rope>("rope"),
      entry<rope_cache>("rope_cache"),
      entry<decode_attention>("decode_attention"),
      {nullptr, nullptr, nullptr},
  };
  return entries;
}

__attribute__((visibility("default"))) const char* fuseline_cuda_problem() { return problem(); }
__attribute__((visibility("default"))) const char* fuseline_cuda_describe(int error) { return describe(error); }

}  // extern "C"

}  // namespace fuseline::cuda
