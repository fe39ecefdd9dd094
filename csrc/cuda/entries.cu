// The library's only exported symbol: a table of its functions with their argument types, read by
// compile/kernels/native_cuda.py.
#include <utility>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

#ifdef __CUDACC__

constexpr int kMinOverlapCode = 90, kMinOverlapDriver = 12030;  // sm_90; CUDA graphs support early launches since 12.3

__global__ void probe_kernel(int) {}

// Why the kernels cannot run on the current device; empty if they can.
const char* problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Depends on the compiled code, not on the device: PTX of an older target, translated for a new GPU, does not wait.
bool can_overlap() {
  cudaFuncAttributes attributes;
  int driver = 0;
  return cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess &&
         cudaDriverGetVersion(&driver) == cudaSuccess && attributes.ptxVersion >= kMinOverlapCode &&
         driver >= kMinOverlapDriver;
}

// The early-launch race check exists in the CPU emulator only (csrc/tests/cuda_emulation.h).
template <class F>
void check_race(const F&) {}

#else

const char* problem() { return ""; }
const char* describe(int) { return "the emulation takes no such arguments"; }
bool can_overlap() { return true; }
using emulated::check_race;

#endif

// A function takes the stream, an Overlap value and one array of its arguments, eight bytes each: for the caller,
// packing them is faster than passing them separately.
struct Entry {
  const char* name;
  int (*function)(void* stream, int overlap, const uint64_t* arguments);
  const char* types;  // one letter per argument as in Python's struct: q pointer or int64, d double
};

template <class A>
A argument(uint64_t bits) {
  static_assert(std::is_pointer_v<A> || std::is_same_v<A, Weight> || std::is_same_v<A, int64_t> ||
                std::is_same_v<A, double>);
  A value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <auto kFunction, class... A, size_t... kIndex>
int unpack(Stream stream, const uint64_t* arguments, int (*)(Stream, A...), std::index_sequence<kIndex...>) {
  check_race([&](const auto& hidden) { kFunction(stream, hidden(argument<A>(arguments[kIndex]))...); });
  return kFunction(stream, argument<A>(arguments[kIndex])...);
}

template <class... A>
const char* types_of(int (*)(Stream, A...)) {
  static const char types[] = {(std::is_same_v<A, double> ? 'd' : 'q')..., '\0'};
  return types;
}

template <class... A>
constexpr std::index_sequence_for<A...> indices(int (*)(Stream, A...)) { return {}; }

template <auto kFunction>
Entry entry(const char* name) {
  const auto call = [](void* stream, int overlap, const uint64_t* arguments) {
    return unpack<kFunction>(Stream{stream, static_cast<Overlap>(overlap)}, arguments, kFunction, indices(kFunction));
  };
  return {name, call, types_of(kFunction)};
}

}  // namespace

extern "C" {

// The last entry has no name.
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
__attribute__((visibility("default"))) int fuseline_cuda_can_overlap() { return can_overlap(); }
__attribute__((visibility("default"))) const char* fuseline_cuda_describe(int error) { return describe(error); }

}  // extern "C"

}  // namespace fuseline::cuda
