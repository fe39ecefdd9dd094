// CPU emulator of CUDA for the tests of csrc/cuda: g++ compiles the .cu files with this instead of CUDA's headers.
//
// The threads of a block are fibers of one CPU thread, run in turn; a fiber that waits (at __syncthreads, or for its
// warp in a shuffle or a matrix instruction) yields to the next. Blocks run one after the other, so __shared__ is
// static; those of a resident launch take turns (cuda_grid.h). Bulk copies are in cuda_bulk_copies.h. A deadlock is a bug
// of the kernel: it ends the process with a message. Launches that may overlap first pass the early-launch race check
// (cuda_race_check.h).
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#if __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: its longjmp ends a process that goes on in another fiber"
#endif

#define __global__
#define __grid_constant__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 { uint32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };

namespace emulated {

constexpr int kWarp = 32, kMaxThreads = 1024, kStack = 128 << 10, kMaxShared = 227 << 10;

struct Barrier { int arrived; unsigned generation; };

struct Copy { void* to; const void* from; size_t num_bytes; int group; };

struct BulkCopy { void* to; const void* from; size_t num_bytes; const void* barrier; };

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool is_started, is_done, has_waited;
  bool has_unfenced;  // copies to shared memory that no fence orders before matrix instructions' reads
  unsigned num_exchanges;
  std::deque<Copy> copies;
  int num_groups;
};

struct Block {
  explicit Block(int most_threads) : fibers(most_threads) {}

  std::vector<Fiber> fibers;
  dim3 grid, threads, index;
  int num_threads, current, num_done, num_idle, num_waiting;
  bool is_race_check, is_resident = false;
  ucontext_t outside;
  Barrier all, warps[kMaxThreads / kWarp];
  std::deque<BulkCopy> bulk_copies;
  alignas(1024) char shared[kMaxShared];
  int num_shared;
  // Values exchanged by the lanes of a warp: this exchange's, and the previous one's that some lanes may still read.
  float shown[kMaxThreads / kWarp][2][kWarp][12];
  void (*body)(const void*);
  void (*around)() = [] {};  // called before and after each block
  const void* arguments;
};

// The block that runs: of a resident launch one of several.
inline Block*& running() {
  static Block only(kMaxThreads);
  static Block* found = &only;
  return found;
}
inline Block& block() { return *running(); }

[[noreturn]] inline void fail(const char* why) {
  const dim3 at = block().index;
  std::fprintf(stderr, "emulated: block (%u, %u, %u), thread %d: %s\n", at.x, at.y, at.z, block().current, why);
  std::abort();
}

inline void yield_fiber() {
  Block& b = block();
  if (++b.num_idle > 4 * b.num_threads) fail("threads wait for each other");
  Fiber& from = b.fibers[b.current];
  do b.current = (b.current + 1) % b.num_threads;
  while (b.fibers[b.current].is_done);
  Fiber& to = b.fibers[b.current];
  if (&to == &from || _setjmp(from.place)) return;
  if (to.is_started) _longjmp(to.place, 1);
  to.is_started = true;
  setcontext(&to.start);
}

inline void wait(Barrier& barrier, int count) {
  const unsigned mine = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    block().num_idle = 0;
    return;
  }
  while (barrier.generation == mine) yield_fiber();
}

// Publishes this lane's numbers to its warp; returns those of all lanes.
inline float (*exchange(const float* mine, int count))[12] {
  Block& b = block();
  const int warp = b.current / kWarp;
  const unsigned parity = b.fibers[b.current].num_exchanges++ % 2;
  std::memcpy(b.shown[warp][parity][b.current % kWarp], mine, count * sizeof(float));
  wait(b.warps[warp], kWarp);
  return b.shown[warp][parity];
}

inline thread_local bool is_race_check_running = false;

inline void thread_main() {
  Block& b = block();
  b.body(b.arguments);
  if (!b.fibers[b.current].copies.empty()) fail("copies were not waited for");
  if (!b.fibers[b.current].has_waited) fail("a thread ends and has not waited for the kernels ahead");
  b.fibers[b.current].is_done = true;
  b.num_idle = 0;
  if (++b.num_done == b.num_threads && !b.bulk_copies.empty()) fail("bulk copies were not waited for");
  if (b.num_done == b.num_threads) setcontext(&b.outside);
  yield_fiber();
}

// Runs the block until its threads have ended or, in a resident launch, wait for the grid.
inline void run_block(dim3 index) {
  Block& b = block();
  b.index = index;
  b.current = b.num_done = b.num_idle = b.num_waiting = 0;
  b.all = {};
  b.bulk_copies.clear();
  std::memset(b.shared, 0xff, b.num_shared);
  for (Barrier& warp : b.warps) warp = {};
  for (int k = 0; k < b.num_threads; ++k) {
    Fiber& fiber = b.fibers[k];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, thread_main, 0);
    fiber.is_started = fiber.is_done = fiber.has_waited = fiber.has_unfenced = false;
    fiber.num_exchanges = fiber.num_groups = 0;
    fiber.copies.clear();
  }
  b.around();
  b.fibers[0].is_started = true;
  swapcontext(&b.outside, &b.fibers[0].start);
  b.around();
}

template <class Args>
struct Call { void (*kernel)(Args); const Args& args; };

inline std::mutex& one_launch_at_a_time() {
  static std::mutex only;
  return only;
}

// Has a block run the call; `call` must outlive it.
template <class Args>
void prepare(Block& b, dim3 grid, int threads, int shared_bytes, const Call<Args>& call) {
  b.grid = grid;
  b.threads = dim3(threads);
  b.num_threads = threads;
  b.num_shared = shared_bytes;
  b.is_race_check = is_race_check_running;
  b.arguments = &call;
  b.body = [](const void* given) {
    const auto& call = *static_cast<const Call<Args>*>(given);
    call.kernel(call.args);
  };
}

inline dim3 thread_index() { return dim3(block().current); }

}  // namespace emulated

#include "tests/cuda_bulk_copies.h"
#include "tests/cuda_grid.h"
#include "tests/cuda_race_check.h"

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block().index)
#define blockDim (emulated::block().threads)
#define gridDim (emulated::block().grid)

inline void __syncthreads() { emulated::wait(emulated::block().all, emulated::block().num_threads); }

namespace fuseline::cuda {

constexpr int kBadArgument = 1;

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float to_float(Bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
  _Float16 number;
  std::memcpy(&number, &x, 2);
  return number;
}
inline void from_float(float x, Bf16& to) {
  const uint32_t bits = float_bits(x);
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Half& to) {
  const _Float16 number = static_cast<_Float16>(x);
  std::memcpy(&to, &number, 2);
}

inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float div_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline void launch_dependents() {}
inline void prefetch(const void*) {}
inline void wait_for_prerequisites() {
  emulated::Block& b = emulated::block();
  b.fibers[b.current].has_waited = true;
  if (!b.is_race_check) return;
  b.num_idle = 0;
  if (++b.num_waiting == b.num_threads) setcontext(&b.outside);
  for (;;) emulated::yield_fiber();
}

// Copies are made as late as the waits allow; until then the destination holds NaNs.
template <class V>
void copy_async(V* to, const void* from, bool is_there) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % sizeof(V))
    emulated::fail("a copy off its alignment");
  emulated::Fiber& fiber = emulated::block().fibers[emulated::block().current];
  if (emulated::block().is_race_check && is_there) static_cast<void>(*static_cast<const volatile char*>(from));
  std::memset(to, 0xff, sizeof(V));
  fiber.copies.push_back({to, is_there ? from : nullptr, sizeof(V), fiber.num_groups});
}
inline void close_group() { ++emulated::block().fibers[emulated::block().current].num_groups; }
template <int kGroups>
void wait_groups() {
  emulated::Fiber& fiber = emulated::block().fibers[emulated::block().current];
  while (!fiber.copies.empty() && fiber.copies.front().group + kGroups < fiber.num_groups) {
    const emulated::Copy copy = fiber.copies.front();
    fiber.copies.pop_front();
    if (copy.from) std::memcpy(copy.to, copy.from, copy.num_bytes);
    else std::memset(copy.to, 0, copy.num_bytes);
    fiber.has_unfenced = true;
  }
}

template <int kCount>
void load_now(float (&to)[kCount], const float* from) { std::memcpy(to, from, sizeof(to)); }

inline void sync_warp() {
  emulated::Block& b = emulated::block();
  emulated::wait(b.warps[b.current / emulated::kWarp], emulated::kWarp);
}
inline char* dynamic_shared() { return emulated::block().shared; }
inline void sync_grid() { emulated::wait_for_grid(); }
inline int num_processors() { return emulated::kProcessors; }
inline int atomicAdd(int* at, int x) { return (*at += x) - x; }
inline int clear(Stream, void* at, size_t num_bytes) {
  if (!emulated::is_race_check_running) std::memset(at, 0, num_bytes);
  return 0;
}

template <class V>
V shuffle(V x, int lane) {
  static_assert(sizeof(V) == 4);
  float word;
  std::memcpy(&word, &x, 4);
  std::memcpy(&x, emulated::exchange(&word, 1)[lane], 4);
  return x;
}
template <class V>
V shuffle_xor(V x, int mask) { return shuffle(x, emulated::block().current % emulated::kWarp ^ mask); }

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

inline uint32_t first_bytes(uint32_t four) { return (four & 0xff) << 8 | (four & 0xff00) << 16; }
inline uint32_t last_bytes(uint32_t four) { return first_bytes(four >> 16); }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t to = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t selector = selectors >> (4 * k) & 15, byte = bytes >> (8 * (selector & 7)) & 0xff;
    to |= (selector < 8 ? byte : byte & 0x80 ? 0xff : 0) << (8 * k);
  }
  return to;
}
template <class T>
uint32_t minus(uint32_t a, uint32_t b, T) {
  uint32_t to = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const T x{static_cast<uint16_t>(a >> shift)}, y{static_cast<uint16_t>(b >> shift)};
    T difference;
    from_float(to_float(x) - to_float(y), difference);
    to |= static_cast<uint32_t>(difference.bits) << shift;
  }
  return to;
}
template <class T>
uint32_t times(uint32_t two, float factor, T) {
  T low{static_cast<uint16_t>(two)}, high{static_cast<uint16_t>(two >> 16)};
  from_float(to_float(low) * factor, low);
  from_float(to_float(high) * factor, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  float mine[12];
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (int k = 0; k < 12; ++k) mine[k] = to_float(T{static_cast<uint16_t>(words[k / 2] >> 16 * (k % 2))});
  const auto shown = emulated::exchange(mine, 12);
  const int lane = emulated::block().current % emulated::kWarp;
  for (int k = 0; k < 4; ++k) {
    const int upper = k / 2, column = 2 * (lane % 4) + k % 2;
    for (int t = 0; t < 4; ++t) {
      const float* row = shown[lane / 4 * 4 + t];
      const float* other = shown[column * 4 + t] + 8;
      for (int j = 0; j < 4; ++j) d[k] += row[4 * (j / 2) + 2 * upper + j % 2] * other[j];
    }
  }
}

template <class Args>
int launch(void (*kernel)(Args), dim3 grid, int threads, Stream stream, const Args& args,
           Overlap needs = Overlap::kHeads, int shared_bytes = 0) {
  if (emulated::is_race_check_running && stream.overlap < needs) return 0;
  const std::lock_guard<std::mutex> lock(emulated::one_launch_at_a_time());
  const emulated::Call<Args> call{kernel, args};
  if (threads % emulated::kWarp || threads > emulated::kMaxThreads || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > emulated::kMaxShared)
    return kBadArgument;
  emulated::prepare(emulated::block(), grid, threads, shared_bytes, call);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) emulated::run_block(dim3(x, y, z));
  return 0;
}

template <class Args>
int launch_resident(void (*kernel)(Args), int threads, Stream, const Args& args, int shared_bytes) {
  if (emulated::is_race_check_running) return 0;  // such a launch is never early
  const std::lock_guard<std::mutex> lock(emulated::one_launch_at_a_time());
  const emulated::Call<Args> call{kernel, args};
  if (threads % emulated::kWarp || threads > emulated::kMostResident || shared_bytes > emulated::kMaxShared)
    return kBadArgument;
  emulated::run_grid([&](emulated::Block& b) {
    emulated::prepare(b, dim3(emulated::kProcessors), threads, shared_bytes, call);
  });
  return 0;
}

}  // namespace fuseline::cuda
