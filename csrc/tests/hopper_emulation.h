// The warp-group functions of cuda/hopper.h on the CPU emulator (cuda_emulation.h).
//
// Matrix operands are found as the hardware finds them, from the bits of their descriptors (PTX ISA, "Matrix Descriptor
// Format" and "Shared Memory Matrix Layout"), so that a wrong descriptor gives wrong numbers. Products are computed as
// late as the waits allow, from what registers and shared memory hold then.
#pragma once
#include "tests/cuda_emulation.h"

namespace emulated {

constexpr int kGroupThreads = 128, kMaxColumns = 256;
constexpr uint32_t kSharedBase = 1024;  // where a block's dynamic shared memory begins, as on the hardware

// One matrix operand of half precision, k = 16. A descriptor: start, leading and stride offset in 16 bytes from bits 0,
// 16 and 32, 14 bits each; the base offset, which is to be 0, from bit 49; from bit 62 the swizzle: 1, 2, 3 for rows of
// 128, 64, 32 bytes, 0 for none.
struct Operand {
  uint32_t start, leading, stride;
  int width, bits;  // bytes of a swizzled row, bits of the address that the swizzle changes

  explicit Operand(uint64_t descriptor) {
    const auto field = [&](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3fff) << 4; };
    start = field(0);
    leading = field(16);
    stride = field(32);
    const int swizzle = static_cast<int>(descriptor >> 62);
    bits = swizzle == 0 ? 0 : 4 - swizzle;
    width = 16 << bits;
    if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset");
  }

  // Address of (row, k), the row one of A or a column of B; `is_across`: the rows are neighbours, else the k are.
  uint32_t address(int row, int k, bool is_across) const {
    const int per_line = width / 2, per_unit = 8;
    uint32_t at = start;
    if (is_across && bits == 0) at += row / 8 * stride + row % 8 * 2 + k / 8 * leading + k % 8 * 16;
    else if (is_across) at += row / per_line * leading + row % per_line * 2 + k / 8 * stride + k % 8 * width;
    else at += row / 8 * stride + row % 8 * width + (bits == 0 ? k / per_unit * leading + k % per_unit * 2 : k * 2);
    return at ^ ((at >> 7 & ((1u << bits) - 1)) << 4);
  }

  template <class T>
  float at(int row, int k, bool is_across) const {
    const uint32_t address = this->address(row, k, is_across);
    if (address < kSharedBase || address + 2 > kSharedBase + kMaxShared) fail("a matrix descriptor off shared memory");
    T number;
    std::memcpy(&number, block().shared + (address - kSharedBase), 2);
    return fuseline::cuda::to_float(number);
  }
};

// A product that a thread has issued: its accumulators, its registers of A if those are no descriptor's.
struct Product {
  float* d;
  const uint32_t* registers;
  uint64_t a, b;
  int num_columns;
  bool adds;
  int group;
  void (*compute)(int first_thread, size_t index);
};

struct GroupThread {
  std::deque<Product> products;
  int num_groups;
  bool is_fenced;  // since registers were last waited for
};

struct HopperBlock {
  GroupThread threads[kMaxThreads];
  Barrier groups[kMaxThreads / kGroupThreads], named[16];
  bool has_products;
};
inline HopperBlock& hopper_block() {
  static HopperBlock only;
  return only;
}
inline GroupThread& group_thread() { return hopper_block().threads[block().current]; }

inline void reset_hopper_block() {
  HopperBlock& b = hopper_block();
  for (int k = 0; k < kMaxThreads; ++k) {
    GroupThread& thread = b.threads[k];
    if (!thread.products.empty()) fail("products were not waited for");
    const bool is_unfenced = k < block().num_threads && block().fibers[k].has_unfenced;
    if (b.has_products && is_unfenced) fail("copies that no fence orders before products");
    thread.num_groups = 0;
    thread.is_fenced = false;
  }
  b.has_products = false;
  for (Barrier& barrier : b.groups) barrier = {};
  for (Barrier& barrier : b.named) barrier = {};
}
inline const bool is_hopper_ready = (block().around = reset_hopper_block, true);

inline void wait_group_of_threads() { wait(hopper_block().groups[block().current / kGroupThreads], kGroupThreads); }

// The product at `index` of the queues of a warp group's threads.
template <class T>
void compute_product(int first, size_t index) {
  GroupThread* threads = hopper_block().threads + first;
  const Product one = threads[0].products[index];
  static float a[64][16], b[16][kMaxColumns], d[64][kMaxColumns];
  for (int k = 0; k < kGroupThreads; ++k) {
    const Product& other = threads[k].products[index];
    if (other.b != one.b || other.a != one.a || other.adds != one.adds || other.num_columns != one.num_columns ||
        !other.registers != !one.registers)
      fail("the threads of a warp group issue different products");
  }
  const Operand right(one.b);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < one.num_columns; ++n) b[k][n] = right.at<T>(n, k, one.registers != nullptr);
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      if (!one.registers) {
        a[row][k] = Operand(one.a).at<T>(row, k, false);
        continue;
      }
      const int thread = row / 16 * kWarp + row % 8 * 4 + k % 8 / 2, number = k / 8 * 2 + row / 8 % 2;
      const uint32_t two = threads[thread].products[index].registers[number];
      a[row][k] = fuseline::cuda::to_float(T{static_cast<uint16_t>(two >> 16 * (k % 2))});
    }
  const auto place = [&](int row, int n) -> float& {
    const int thread = row / 16 * kWarp + row % 8 * 4 + n % 8 / 2;
    return threads[thread].products[index].d[n / 8 * 4 + row / 8 % 2 * 2 + n % 2];
  };
  for (int row = 0; row < 64; ++row) {
    for (int n = 0; n < one.num_columns; ++n) d[row][n] = one.adds ? place(row, n) : 0.0f;
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < one.num_columns; ++n) d[row][n] += a[row][k] * b[k][n];
    for (int n = 0; n < one.num_columns; ++n) place(row, n) = d[row][n];
  }
}

inline void settle_products(int pending) {
  Block& b = block();
  const int first = b.current / kGroupThreads * kGroupThreads;
  wait_group_of_threads();
  GroupThread* threads = hopper_block().threads + first;
  // The first to come computes for all; the others find nothing left to do.
  while (!threads[0].products.empty() && threads[0].products[0].group + pending < threads[0].num_groups) {
    for (int k = 0; k < kGroupThreads; ++k)
      if (threads[k].products.size() != threads[0].products.size()) fail("a warp group issues products apart");
    threads[0].products[0].compute(first, 0);
    for (int k = 0; k < kGroupThreads; ++k) threads[k].products.pop_front();
  }
  wait_group_of_threads();
}

template <class T>
void issue(float* d, int count, const uint32_t* registers, uint64_t a, uint64_t descriptor_b, bool adds) {
  GroupThread& thread = group_thread();
  if (!thread.is_fenced) fail("a product without a fence of its registers");
  hopper_block().has_products = true;
  thread.products.push_back({d, registers, a, descriptor_b, 2 * count, adds, thread.num_groups, &compute_product<T>});
}

}  // namespace emulated

namespace fuseline::cuda {

inline uint32_t shared_address(const void* at) {
  return emulated::kSharedBase + static_cast<uint32_t>(static_cast<const char*>(at) - dynamic_shared());
}

constexpr int kBoxDims = 4;
struct TensorMap {
  const char* from;
  int64_t sizes[kBoxDims], strides[kBoxDims], box[kBoxDims];
};

inline int describe_tensor(TensorMap& to, const void* from, const int64_t (&sizes)[kBoxDims],
                           const int64_t (&strides)[kBoxDims - 1], const int64_t (&box)[kBoxDims]) {
  to = {static_cast<const char*>(from), {}, {1}, {}};
  if (reinterpret_cast<uintptr_t>(from) % 16 || box[0] != 64) return kBadArgument;
  for (int d = 0; d < kBoxDims; ++d) {
    to.sizes[d] = sizes[d];
    to.box[d] = box[d];
    if (d > 0) to.strides[d] = strides[d - 1];
    if (sizes[d] < 1 || sizes[d] > int64_t{1} << 32 || box[d] < 1 || box[d] > 256 ||
        (d > 0 && (strides[d - 1] % 8 || strides[d - 1] < 0 || strides[d - 1] >= int64_t{1} << 39)))
      return kBadArgument;
  }
  return 0;
}

// Line by line, 16 bytes at a time.
inline void copy_box(void* to, const TensorMap& map, int x, int y, int z, int w, BulkBarrier& barrier) {
  alignas(16) static const char zeros[16] = {};
  if (shared_address(to) % 128) emulated::fail("a box off its alignment");
  const int64_t at[kBoxDims] = {x, y, z, w};
  const int num_lines = static_cast<int>(map.box[1] * map.box[2] * map.box[3]);
  for (int line = 0; line < num_lines; ++line) {
    const int64_t within[kBoxDims] = {0, line % map.box[1], line / map.box[1] % map.box[2],
                                      line / (map.box[1] * map.box[2])};
    for (int unit = 0; unit < 8; ++unit) {
      const char* from = map.from;
      bool is_there = true;
      for (int d = 0; d < kBoxDims; ++d) {
        const int64_t place = at[d] + within[d] + (d == 0 ? 8 * unit : 0);
        is_there = is_there && place >= 0 && place < map.sizes[d];
        from += 2 * place * map.strides[d];
      }
      const uint32_t address = shared_address(to) + line * 128 + unit * 16;
      char* place = dynamic_shared() + ((address ^ (address >> 7 & 7) << 4) - emulated::kSharedBase);
      emulated::begin_copy(place, is_there ? from : zeros, 16, barrier);
    }
  }
}

[[noreturn]] inline void trap() { emulated::fail("a trap"); }

inline void fence_shared_writes() {
  emulated::Block& b = emulated::block();
  b.fibers[b.current].has_unfenced = false;
}

inline void sync_some(int id, int count) {
  emulated::wait(emulated::hopper_block().named[id], count);
}
inline void arrive_some(int id, int count) {
  emulated::Barrier& barrier = emulated::hopper_block().named[id];
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  emulated::block().num_idle = 0;
}

template <int kCount> void fewer_registers() {}
template <int kCount> void more_registers() {}

inline void begin_products() { emulated::group_thread().is_fenced = true; }
inline void close_products() { ++emulated::group_thread().num_groups; }
template <int kPending>
void wait_products() {
  emulated::group_thread().is_fenced = false;
  emulated::settle_products(kPending);
}
template <int kCount>
void settle(float (&)[kCount]) {}

template <class T, int kCount>
void product(float (&d)[kCount], uint64_t a, uint64_t b, bool adds, T) {
  emulated::issue<T>(d, kCount, nullptr, a, b, adds);
}
template <class T, int kCount>
void product(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool adds, T) {
  emulated::issue<T>(d, kCount, a, 0, b, adds);
}

inline float fast_exp2(float x) { return std::exp2(x); }
template <class T>
uint32_t pack_two(float first, float second, T) {
  T low, high;
  from_float(first, low);
  from_float(second, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

}  // namespace fuseline::cuda
