// What the library of CUDA kernels offers (kernels.def): each function puts its kernels on `stream` (its handle is a
// cudaStream_t; it may be under capture) and waits for nothing. Its arguments are one struct of fields of eight bytes.
// The result is 0, or the runtime's error code. Callers check shapes (compile/kernels/cuda).
#pragma once
#include <cstdint>

namespace fuseline::cuda {

// Which kernels may start while the one ahead of them on the stream still runs (programmatic dependent launch): none;
// those that touch no memory before it has ended; also those that read their weights before that.
enum class Overlap : int { kNone, kHeads, kWeights };

struct Stream {
  void* handle;
  Overlap overlap;
};

// Read before the kernel ahead has ended if the overlap is kWeights; nothing on the device may write it by then.
struct Weight { const void* data; };

#define FL_OUT(name) void* name;
#define FL_IN(name) const void* name;
#define FL_WEIGHT(name) Weight name;
#define FL_INT(name) int64_t name;
#define FL_FLOAT(name) double name;
#define FL_KERNEL(name, call, fields) \
  struct call { fields };             \
  int name(Stream stream, const call& c);
#include "cuda/kernels.def"
#include "cuda/kernels_end.h"

}  // namespace fuseline::cuda
