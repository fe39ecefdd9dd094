// Resident launches of the CPU emulator: blocks that all run at once and wait for each other (sync_grid).
//
// Each block runs until its threads wait for the grid or end, then the next one does. From one such wait to the next
// blocks run in ascending or in descending order, by turns, and the next launch begins with the other one: a block that
// reads what another has not written yet, or writes what another still reads, gives other numbers in one of two launches.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <vector>

namespace emulated {

constexpr int kProcessors = 5, kMostResident = 256;  // blocks of a resident launch; their threads at most

// Suspends the running block; the same thread goes on when it is resumed.
inline void leave_block() {
  Block& b = block();
  b.num_idle = 0;
  if (!_setjmp(b.fibers[b.current].place)) setcontext(&b.outside);
}

inline void resume_block() {
  Block& b = block();
  volatile bool is_back = false;
  getcontext(&b.outside);
  if (is_back) return;
  is_back = true;
  _longjmp(b.fibers[b.current].place, 1);
}

inline void wait_for_grid() {
  Block& b = block();
  if (!b.is_resident) fail("a launch that is not resident waits for its grid");
  wait(b.all, b.num_threads);
  if (b.current == 0) leave_block();
  wait(b.all, b.num_threads);
}

inline std::vector<std::unique_ptr<Block>>& resident_blocks() {
  static std::vector<std::unique_ptr<Block>> found;
  while (found.size() < kProcessors) {
    found.push_back(std::make_unique<Block>(kMostResident));
    found.back()->is_resident = true;
  }
  return found;
}

// Runs a block for each processor, prepared by `prepare(block)`.
template <class Prepare>
void run_grid(const Prepare& prepare_block) {
  static bool begins_descending = true;
  begins_descending = !begins_descending;
  bool is_descending = begins_descending, is_first = true;
  Block* const before = running();
  int num_done = 0;
  while (num_done == 0) {
    for (int turn = 0; turn < kProcessors; ++turn) {
      const int k = is_descending ? kProcessors - 1 - turn : turn;
      running() = resident_blocks()[k].get();
      if (is_first) prepare_block(block());
      if (is_first) run_block(dim3(k));
      else resume_block();
      num_done += block().num_done == block().num_threads;
    }
    if (num_done % kProcessors) fail("a block has ended and others wait for it");
    is_descending = !is_descending;
    is_first = false;
  }
  running() = before;
}

}  // namespace emulated
