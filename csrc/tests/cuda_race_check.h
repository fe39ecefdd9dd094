// Early-launch race check of the CPU emulator: finds kernels that touch memory before the kernels ahead have ended.
//
// Each call is made twice. In the first, the check, every pointer except those that may be read early (Weight) points
// to inaccessible memory, and each block runs only until all its threads wait for the kernels ahead. A thread that
// touches that memory, or ends without waiting, ends the process with a message.
#pragma once
#include <signal.h>
#include <sys/mman.h>

#include <cstdint>
#include <mutex>

namespace emulated {

// Hidden pointers point to the middle of this range of inaccessible addresses.
constexpr size_t kInaccessibleBytes = size_t{1} << 40;
inline char* inaccessible() {
  static void* const found =
      mmap(nullptr, kInaccessibleBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) fail("cannot reserve inaccessible addresses");
  return static_cast<char*>(found);
}

inline void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  if (at >= inaccessible() && at < inaccessible() + kInaccessibleBytes)
    fail("a thread touches memory and has not waited for the kernels ahead");
  signal(SIGSEGV, SIG_DFL);
}

// Replaces the arguments of a checked call; a pointer keeps only its alignment.
struct Hidden {
  template <class V>
  V operator()(V value) const { return value; }
  template <class P>
  P* operator()(P* pointer) const {
    const size_t offset = kInaccessibleBytes / 2 + reinterpret_cast<uintptr_t>(pointer) % 256;
    return pointer ? reinterpret_cast<P*>(inaccessible() + offset) : nullptr;
  }
};

// Runs call(Hidden{}), which launches kernels. The SIGSEGV handler is process-wide, so only one check runs at a time.
template <class F>
void check_race(const F& call) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  struct sigaction ours{}, before{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &ours, &before);
  is_race_check_running = true;
  call(Hidden{});
  is_race_check_running = false;
  sigaction(SIGSEGV, &before, nullptr);
}

}  // namespace emulated
