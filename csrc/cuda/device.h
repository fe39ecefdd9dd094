// Device functions that the kernels of this folder use. They are few, so that a CPU compiler can stand in for nvcc: the
// tests run the same sources as fibers on a CPU (csrc/tests/cuda_emulation.h). Needs only the CUDA runtime, not torch.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "cuda/kernels.h"
#include "fuseline/op.h"

namespace fuseline::cuda {

// Storage types.
struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

}  // namespace fuseline::cuda

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "tests/cuda_emulation.h"
#endif

#define FL_DEVICE __device__ __forceinline__

namespace fuseline::cuda {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f;

#ifdef __CUDACC__

constexpr int kBadArgument = cudaErrorInvalidValue;

FL_DEVICE float to_float(Bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
FL_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FL_DEVICE void from_float(float x, Bf16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FL_DEVICE void from_float(float x, Half& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
FL_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FL_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FL_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
FL_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }

// Starts a copy of one V (8 or 16 bytes) from global to shared memory; writes zeros unless `is_there`. It is visible to
// the issuing thread once wait_groups leaves no more than the given number of its groups pending. 16 bytes bypass L1.
FL_DEVICE void copy_async(uint4* to, const void* from, bool is_there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address), "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
}
FL_DEVICE void copy_async(uint2* to, const void* from, bool is_there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" :: "r"(address), "l"(from), "r"(is_there ? 8 : 0)
               : "memory");
}
FL_DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
FL_DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;" :: "n"(kGroups) : "memory"); }

// Barrier in shared memory that counts arrivals of threads and bytes of bulk copies (mbarrier). Its phases alternate in
// parity, 0 first; one is complete when all expected arrivals and bytes are there, and the next begins.
struct BulkBarrier { uint64_t state; };

FL_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Instructions of sm_90 and later; kernels that use them are not offered before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FL_SM90(...) __trap()
#else
#define FL_SM90(...) asm volatile(__VA_ARGS__)
#endif

// By one thread, before show_barriers and a barrier of the block.
FL_DEVICE void init(BulkBarrier& barrier, int arrivals) {
  FL_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// Lets bulk copies see barriers that this thread has initialized.
FL_DEVICE void show_barriers() { FL_SM90("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FL_DEVICE void arrive(BulkBarrier& barrier) {
  FL_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(&barrier)) : "memory");
}
// Arrives, and has the phase wait for so many bytes more.
FL_DEVICE void arrive_expecting(BulkBarrier& barrier, int num_bytes) {
  FL_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
          :: "r"(shared_address(&barrier)), "r"(num_bytes) : "memory");
}
// Waits until the phase of this parity is complete; the phase before the first counts as complete.
FL_DEVICE void wait_for(BulkBarrier& barrier, int parity) {
  uint32_t is_complete = 0;
  while (!is_complete)
    FL_SM90("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(is_complete) : "r"(shared_address(&barrier)), "r"(parity) : "memory");
}
constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // the policy of createpolicy.fractional.L2::evict_first
// Starts a copy of a multiple of 16 bytes, aligned to 16, from global to shared memory; the barrier counts its bytes.
// Of numbers that are read once: L2 drops them before all others.
FL_DEVICE void copy_bulk_once(void* to, const void* from, int num_bytes, BulkBarrier& barrier) {
  FL_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
          :: "r"(shared_address(to)), "l"(from), "r"(num_bytes), "r"(shared_address(&barrier)), "l"(kEvictFirst)
          : "memory");
}

// Loads that begin where they stand: of many in a row a compiler would put each next to the use of its result.
FL_DEVICE void load_now(float (&to)[2], const float* from) {
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "l"(from));
}
FL_DEVICE void load_now(float (&to)[4], const float* from) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "l"(from));
}

// Orders accesses of a warp's lanes to shared memory.
FL_DEVICE void sync_warp() { __syncwarp(); }

// The block's dynamic shared memory, aligned as swizzled matrix operands need it.
FL_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(1024) char dynamic[];
  return dynamic;
}

template <class V>
FL_DEVICE V shuffle(V x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
template <class V>
FL_DEVICE V shuffle_xor(V x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Bytes (a3 a2 a1 a0), (b3 b2 b1 b0) -> (b1 b0 a1 a0) and (b3 b2 a3 a2).
FL_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
FL_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// Bytes (b3 b2 b1 b0) -> (b1 0 b0 0) and (b3 0 b2 0).
FL_DEVICE uint32_t first_bytes(uint32_t four) { return __byte_perm(four, 0, 0x1404); }
FL_DEVICE uint32_t last_bytes(uint32_t four) { return __byte_perm(four, 0, 0x3424); }

// Bytes of (b, a), a's lowest first, picked by four selectors of four bits; from 8 on a byte's sign is repeated instead.
FL_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t to;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(to) : "r"(a), "r"(b), "r"(selectors));
  return to;
}

// Subtracts both numbers of a register.
FL_DEVICE __half2 as_two(uint32_t two, Half) { return *reinterpret_cast<const __half2*>(&two); }
FL_DEVICE __nv_bfloat162 as_two(uint32_t two, Bf16) { return *reinterpret_cast<const __nv_bfloat162*>(&two); }
template <class T>
FL_DEVICE uint32_t minus(uint32_t a, uint32_t b, T) {
  const auto difference = __hsub2(as_two(a, T{}), as_two(b, T{}));
  return *reinterpret_cast<const uint32_t*>(&difference);
}

// Multiplies both numbers of a register by a number their type represents exactly.
FL_DEVICE __half2 both(float x, Half) { return __float2half2_rn(x); }
FL_DEVICE __nv_bfloat162 both(float x, Bf16) { return __float2bfloat162_rn(x); }
template <class T>
FL_DEVICE uint32_t times(uint32_t two, float factor, T) {
  const auto by = both(factor, T{});
  auto x = by;
  memcpy(&x, &two, 4);
  x = __hmul2(x, by);
  memcpy(&two, &x, 4);
  return two;
}

// Warp-wide d[16, 8] += a[16, 16] b[16, 8]. Lane (g = lane / 4, t = lane % 4) holds, two neighbouring k per register:
// a: rows g and g + 8 at k = 2t, then at k = 2t + 8; b: column g at k = 2t and 2t + 8; d: (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
FL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FL_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// With overlap (programmatic dependent launch) a grid may start before the kernel ahead of it has ended: once all
// blocks of that kernel have called launch_dependents or ended, and resources are free. Until wait_for_prerequisites it
// must not read what kernels ahead write, nor write what they read or write. Therefore every thread of every kernel
// waits before it touches memory, which also makes kernels end in order. Without overlap, and before sm_90, both calls
// do nothing.
FL_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
FL_DEVICE void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Prefetches a cache line to L2, which is never stale: allowed before the wait.
FL_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" :: "l"(from)); }

// Multiprocessors of the current device; 0 if it cannot be asked.
inline int num_processors() {
  int device = 0, count = 0;
  const bool is_known = cudaGetDevice(&device) == cudaSuccess &&
                        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return is_known ? count : 0;
}

// Waits until every thread of the grid has come here; what any of them has written is visible to all then. For kernels
// that launch_resident starts.
FL_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

// Puts a write of zeros on the stream; returns 0 or the runtime's error code.
inline int clear(Stream stream, void* at, size_t num_bytes) {
  return cudaMemsetAsync(at, 0, num_bytes, static_cast<cudaStream_t>(stream.handle));
}

// Launches the kernel; returns 0 or the runtime's error code. `needs`: the least overlap at which it may start early;
// `shared_bytes`: size of its dynamic shared memory.
template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, Stream stream, const Args& args,
           Overlap needs = Overlap::kHeads, int shared_bytes = 0) {
  if (shared_bytes) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, most, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &early;
  config.numAttrs = stream.overlap >= needs ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Launches the kernel with a block on every multiprocessor, all of which run at once (a cooperative launch), behind all
// that is ahead of it on the stream.
template <class Args>
int launch_resident(void (*kernel)(Args), int threads, Stream stream, const Args& args, int shared_bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_processors()));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

#endif

FL_DEVICE float to_float(float x) { return x; }
FL_DEVICE void from_float(float x, float& to) { to = x; }

template <class T>
FL_DEVICE T cast(float x) {
  T to;
  from_float(x, to);
  return to;
}

// float32 x rounded to T.
template <class T>
FL_DEVICE float rounded(float x) { return to_float(cast<T>(x)); }

// Packs two numbers into a register, the first in its low half.
template <class T>
FL_DEVICE uint32_t pack(float first, float second) {
  return cast<T>(first).bits | static_cast<uint32_t>(cast<T>(second).bits) << 16;
}

// Sum over all lanes; every lane gets the same bits.
template <class V>
FL_DEVICE V warp_sum(V x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Calls f with a value of the dtype's type and returns its result; kBadArgument for other dtypes.
template <class F>
int with_half(int64_t dtype, const F& f) {
  if (dtype == static_cast<int64_t>(DType::bf16)) return f(Bf16{});
  if (dtype == static_cast<int64_t>(DType::f16)) return f(Half{});
  return kBadArgument;
}
template <class F>
int with_float(int64_t dtype, const F& f) {
  return dtype == static_cast<int64_t>(DType::f32) ? f(float{}) : with_half(dtype, f);
}

}  // namespace fuseline::cuda
