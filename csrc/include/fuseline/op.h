// The calling convention of all kernels, shared by the plan, the torch registration and the tests.
// Free of torch: kernels see strided views and numbers only.
#pragma once
#include <cstdint>

namespace fuseline {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i64 = 3, i32 = 4, u8 = 5 };

constexpr int kMaxDims = 5;

// A strided view; owns nothing. Strides count elements. An absent optional tensor has ndim == -1.
struct Tensor {
  void* data;
  DType dtype;
  int32_t ndim;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];

  bool present() const { return ndim >= 0; }
};

// An op writes its leading tensors (the ones its schema marks with '!') and reads the rest. `i` and `f` hold the
// integer and floating-point arguments in schema order. Kernels do not throw and do not allocate per call beyond
// the thread pool's scratch memory; bad arguments are caught by the checks of csrc/torch and the plan builder.
using OpFn = void (*)(const Tensor* t, const int64_t* i, const double* f);

}  // namespace fuseline
