// Warp-group instructions of sm_90a that prefill.cu uses, as thin functions; csrc/tests/hopper_emulation.h defines the
// same functions for the CPU. A warp group is four consecutive warps that start at a multiple of four.
#pragma once
#include "cuda/device.h"

namespace fuseline::cuda {

constexpr int kGroup = 128;  // threads of a warp group

// Whether this compilation has the instructions. Code under `if constexpr` of it is not compiled for other GPUs.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpGroups = true;
#else
constexpr bool kHasWarpGroups = false;
#endif

// Descriptor of a matrix operand of half precision in shared memory, swizzled over rows of 128 bytes: the 16 bytes at
// (row, unit) lie at unit ^ row % 8. `start`: of the operand in its 1024-aligned tile. `stride`: bytes from eight rows
// to the next eight. `leading`: of operands whose rows are along k, bytes from 64 columns to the next 64; else unused.
FL_DEVICE uint64_t operand_descriptor(uint32_t start, uint32_t stride, uint32_t leading) {
  return (start & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         uint64_t{1} << 62;
}

}  // namespace fuseline::cuda

#ifndef __CUDACC__
#include "tests/hopper_emulation.h"
#else

#include <cuda.h>

namespace fuseline::cuda {

// A tensor of half precision in device memory, of which boxes are copied to shared memory, in lines of 128 bytes that
// are swizzled as operand_descriptor says. Sizes, strides (of all but the first, whose stride is 1) and boxes count
// numbers, the first dimension first. Given to kernels in an argument that is __grid_constant__.
constexpr int kBoxDims = 4;
using TensorMap = CUtensorMap;

// The driver's function that describes tensors, which only the driver's library has; null where there is none.
inline decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Returns 0 or the runtime's error code.
inline int describe_tensor(TensorMap& to, const void* from, const int64_t (&sizes)[kBoxDims],
                           const int64_t (&strides)[kBoxDims - 1], const int64_t (&box)[kBoxDims]) {
  static const auto encode = find_encoder();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t whole[kBoxDims], bytes[kBoxDims - 1];
  cuuint32_t part[kBoxDims], steps[kBoxDims];
  for (int d = 0; d < kBoxDims; ++d) {
    whole[d] = static_cast<cuuint64_t>(sizes[d]);
    part[d] = static_cast<cuuint32_t>(box[d]);
    steps[d] = 1;
    if (d > 0) bytes[d - 1] = static_cast<cuuint64_t>(strides[d - 1]) * 2;
  }
  const CUresult done = encode(
      &to, CU_TENSOR_MAP_DATA_TYPE_UINT16, kBoxDims, const_cast<void*>(from), whole, bytes, part, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? 0 : kBadArgument;
}

// Starts the copy of the box at these places of the tensor, zeros outside it; the barrier counts its bytes.
FL_DEVICE void copy_box(void* to, const TensorMap& from, int x, int y, int z, int w, BulkBarrier& barrier) {
  FL_SM90("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
          "[%1, {%2, %3, %4, %5}], [%6];"
          :: "r"(shared_address(to)), "l"(&from), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(&barrier))
          : "memory");
}

// Ends the kernel with an error.
FL_DEVICE void trap() { __trap(); }

// Orders this thread's ordinary writes to shared memory, copies included, before reads by matrix instructions.
FL_DEVICE void fence_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `count` threads, by number (0 is that of __syncthreads).
FL_DEVICE void sync_some(int id, int count) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(count) : "memory"); }
FL_DEVICE void arrive_some(int id, int count) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(count) : "memory"); }

// Registers of a thread from here on; by a whole warp group.
template <int kCount>
FL_DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kCount)); }
template <int kCount>
FL_DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kCount)); }

// Matrix instructions run asynchronously: begin_products before the first that uses registers written since, then the
// products, close_products, and wait_products before their registers are used. settle() keeps the compiler from moving
// uses of accumulators across the wait.
FL_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FL_DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
FL_DEVICE void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kPending) : "memory"); }
template <int kCount>
FL_DEVICE void settle(float (&d)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) asm volatile("" : "+f"(d[k]) :: "memory");
}

#define FL_R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FL_R64 FL_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
               "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FL_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FL_D16(i) FL_D4(i), FL_D4(i + 4), FL_D4(i + 8), FL_D4(i + 12)
#define FL_D32 FL_D16(0), FL_D16(16)
#define FL_D64 FL_D32, FL_D16(32), FL_D16(48)

// product(d, a, b, adds): d[64, N] = a[64, 16] b[16, N], added to d if `adds`. Warp w, lane (g = lane / 4,
// t = lane % 4) holds d[4 j + 2 u + i] at row 16 w + 8 u + g, column 8 j + 2 t + i. `a` is a descriptor, its rows and those of b^T
// along k; or registers, as `a` of mma() for the rows of each warp, with b stored [16, N].
#define FL_PRODUCTS(T, type, count, n, registers, outputs, a0, a1, a2, a3, a4, a5)                                     \
  FL_DEVICE void product(float (&d)[count], uint64_t a, uint64_t b, bool adds, T) {                                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" a2 ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, %" a0 ", %" a1      \
                 ", p, 1, 1, 0, 0;\n}"                                                                                 \
                 : outputs : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                                             \
  }                                                                                                                    \
  FL_DEVICE void product(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool adds, T) {                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" a5 ", 0;\n"                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {%" a0 ", %" a1     \
                 ", %" a2 ", %" a3 "}, %" a4 ", p, 1, 1, 1;\n}"                                                        \
                 : outputs : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));         \
  }
FL_PRODUCTS(Bf16, "bf16", 32, "64", FL_R32, FL_D32, "32", "33", "34", "35", "36", "37")
FL_PRODUCTS(Half, "f16", 32, "64", FL_R32, FL_D32, "32", "33", "34", "35", "36", "37")
FL_PRODUCTS(Bf16, "bf16", 64, "128", FL_R64, FL_D64, "64", "65", "66", "67", "68", "69")
FL_PRODUCTS(Half, "f16", 64, "128", FL_R64, FL_D64, "64", "65", "66", "67", "68", "69")
#undef FL_PRODUCTS
#undef FL_D64
#undef FL_D32
#undef FL_D16
#undef FL_D4
#undef FL_R64
#undef FL_R32

// 2^x to about two units in the last place; results below 2^-126 are 0.
FL_DEVICE float fast_exp2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

FL_DEVICE uint32_t pack_two(float first, float second, Bf16) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
  return two;
}
FL_DEVICE uint32_t pack_two(float first, float second, Half) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
  return two;
}

}  // namespace fuseline::cuda

#endif
