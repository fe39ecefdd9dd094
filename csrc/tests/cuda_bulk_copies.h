// Bulk copies of the CPU emulator and the barriers that count their bytes (BulkBarrier of cuda/device.h).
//
// Copies are made as late as the waits allow: when a thread waits for a phase whose arrivals are all there. Until then
// the destination holds NaNs.
#pragma once
#include <cstdint>
#include <cstring>

namespace fuseline::cuda {

struct BulkBarrier { int arrivals, num_pending, num_bytes; unsigned phase; };

}  // namespace fuseline::cuda

namespace emulated {

using fuseline::cuda::BulkBarrier;

inline void begin_copy(void* to, const void* from, int num_bytes, BulkBarrier& barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | num_bytes) % 16 || num_bytes <= 0)
    fail("a bulk copy off its alignment");
  static_cast<void>(static_cast<const volatile char*>(from)[0]);
  static_cast<void>(static_cast<const volatile char*>(from)[num_bytes - 1]);
  std::memset(to, 0xff, num_bytes);
  block().num_idle = 0;
  block().bulk_copies.push_back({to, from, static_cast<size_t>(num_bytes), &barrier});
}

// Begins the next phase if the present one is complete.
inline void turn(BulkBarrier& barrier) {
  block().num_idle = 0;
  if (barrier.num_pending || barrier.num_bytes) return;
  barrier.num_pending = barrier.arrivals;
  ++barrier.phase;
}

// Makes the copies that the barrier counts; returns whether there were any.
inline bool make_copies(BulkBarrier& barrier) {
  auto& copies = block().bulk_copies;
  const size_t before = copies.size();
  std::erase_if(copies, [&](const BulkCopy& copy) {
    if (copy.barrier != &barrier) return false;
    std::memcpy(copy.to, copy.from, copy.num_bytes);
    barrier.num_bytes -= static_cast<int>(copy.num_bytes);
    return true;
  });
  return copies.size() != before;
}

}  // namespace emulated

namespace fuseline::cuda {

inline void init(BulkBarrier& barrier, int arrivals) { barrier = {arrivals, arrivals, 0, 0}; }
inline void show_barriers() {}
inline void arrive_expecting(BulkBarrier& barrier, int num_bytes) {
  if (--barrier.num_pending < 0) emulated::fail("more arrivals than a barrier expects");
  barrier.num_bytes += num_bytes;
  emulated::turn(barrier);
}
inline void arrive(BulkBarrier& barrier) { arrive_expecting(barrier, 0); }
inline void wait_for(BulkBarrier& barrier, int parity) {
  while (barrier.phase % 2 == static_cast<unsigned>(parity)) {
    if (barrier.num_pending == 0 && emulated::make_copies(barrier)) emulated::turn(barrier);
    else emulated::yield_fiber();
  }
}
inline void copy_bulk_once(void* to, const void* from, int num_bytes, BulkBarrier& barrier) {
  emulated::begin_copy(to, from, num_bytes, barrier);
}

}  // namespace fuseline::cuda
