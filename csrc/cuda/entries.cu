// The library's table of functions with their arguments' names and types, read by compile/kernels/cuda/library.py.
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

#ifdef __CUDACC__

constexpr int kMinOverlapCode = 90, kMinOverlapDriver = 12030;  // sm_90; graphs keep early launches from CUDA 12.3 on

__global__ void probe_kernel(int) {}

// What keeps the kernels from running on the present device; empty when nothing does.
const char* problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// It is the code that counts, not the card: what a new card translates from code for an old one does not wait.
bool can_overlap() {
  cudaFuncAttributes attributes;
  int driver = 0;
  return cudaFuncGetAttributes(&attributes, probe_kernel) == cudaSuccess &&
         cudaDriverGetVersion(&driver) == cudaSuccess && attributes.ptxVersion >= kMinOverlapCode &&
         driver >= kMinOverlapDriver;
}

// For tests without a card (csrc/tests/cuda_emulation.h).
template <class F>
void rehearse(const F&) {}

#else

const char* problem() { return ""; }
const char* describe(int) { return "the emulation takes no such arguments"; }
bool can_overlap() { return true; }
using emulated::rehearse;

#endif

// A function takes the stream, a value of Overlap, and its call: the struct's fields, eight bytes each.
struct Entry {
  const char* name;
  int (*function)(void* stream, int overlap, const void* call);
  const char* fields;  // in order: a letter as Python's struct has it (q pointer or int64, d double), the name, a space
};

// A call with f(field) for each field.
#define FL_OUT(name) c.name = f(c.name);
#define FL_IN(name) c.name = f(c.name);
#define FL_WEIGHT(name) c.name = f(c.name);
#define FL_INT(name) c.name = f(c.name);
#define FL_FLOAT(name) c.name = f(c.name);
#define FL_KERNEL(name, call, fields) \
  template <class F>                  \
  call mapped(call c, const F& f) {   \
    fields return c;                  \
  }
#include "cuda/kernels.def"
#include "cuda/kernels_end.h"

template <class Call, int (*kFunction)(Stream, const Call&)>
Entry entry(const char* name, const char* fields) {
  static_assert(std::is_trivially_copyable_v<Call> && alignof(Call) == 8);
  const auto call = [](void* handle, int overlap, const void* packed) {
    Call given;
    memcpy(&given, packed, sizeof(given));
    const Stream stream{handle, static_cast<Overlap>(overlap)};
    rehearse([&](const auto& hidden) { kFunction(stream, mapped(given, hidden)); });
    return kFunction(stream, given);
  };
  return {name, call, fields};
}

}  // namespace

extern "C" {

// Ends with an entry without a name.
__attribute__((visibility("default"))) const Entry* fuseline_cuda_entries() {
  static const Entry entries[] = {
#define FL_OUT(name) "q" #name " "
#define FL_IN(name) "q" #name " "
#define FL_WEIGHT(name) "q" #name " "
#define FL_INT(name) "q" #name " "
#define FL_FLOAT(name) "d" #name " "
#define FL_KERNEL(name, call, fields) entry<call, name>(#name, fields),
#include "cuda/kernels.def"
#include "cuda/kernels_end.h"
      {nullptr, nullptr, nullptr},
  };
  return entries;
}

__attribute__((visibility("default"))) const char* fuseline_cuda_problem() { return problem(); }
__attribute__((visibility("default"))) int fuseline_cuda_can_overlap() { return can_overlap(); }
__attribute__((visibility("default"))) const char* fuseline_cuda_describe(int error) { return describe(error); }

}  // extern "C"

}  // namespace fuseline::cuda
