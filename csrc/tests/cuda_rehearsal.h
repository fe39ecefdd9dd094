// Launches that may begin before the kernels ahead of them have ended, for the tests of csrc/cuda on a CPU.
//
// A call is made twice. The first time is a rehearsal: every pointer is one to where nothing lies, but for memory that
// may be read early (Weight); each block runs until all its threads wait for the kernels ahead, and no further. A
// thread that touches other memory by then, or ends without having waited, ends the process with a line that says so.
#pragma once
#include <signal.h>
#include <sys/mman.h>

#include <cstdint>
#include <mutex>

namespace emulated {

// Hidden pointers are to the middle of these addresses.
constexpr size_t kNowhereBytes = size_t{1} << 40;
inline char* nowhere() {
  static void* const found =
      mmap(nullptr, kNowhereBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) give_up("no room for addresses where nothing lies");
  return static_cast<char*>(found);
}

inline void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  if (at >= nowhere() && at < nowhere() + kNowhereBytes)
    give_up("a thread touches memory and has not waited for the kernels ahead");
  signal(SIGSEGV, SIG_DFL);
}

// Of an argument what a rehearsal is given: of a pointer its alignment alone.
struct Hidden {
  template <class V>
  V operator()(V value) const { return value; }
  template <class P>
  P* operator()(P* pointer) const {
    const size_t offset = kNowhereBytes / 2 + reinterpret_cast<uintptr_t>(pointer) % 256;
    return pointer ? reinterpret_cast<P*>(nowhere() + offset) : nullptr;
  }
};

inline thread_local bool is_rehearsing = false;

// call(Hidden) launches kernels. SIGSEGV's handler is the process's: rehearsals take turns.
template <class F>
void rehearse(const F& call) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  struct sigaction ours{}, before{};
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &ours, &before);
  is_rehearsing = true;
  call(Hidden{});
  is_rehearsing = false;
  sigaction(SIGSEGV, &before, nullptr);
}

}  // namespace emulated
