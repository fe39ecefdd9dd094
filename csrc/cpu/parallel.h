// parallel_for over a lambda, for kernel sources. Internal linkage, like everything compiled per ISA.
#pragma once
#include "cpu/pool.h"

#ifndef FL_ISA
#error "kernel sources are compiled by csrc/cpu/CMakeLists.txt, once per ISA"
#endif

namespace fuseline::FL_ISA {
namespace {

template <class F>
inline void parallel(int64_t num_chunks, const F& body) {
  parallel_for(
      num_chunks, [](void* ctx, int64_t chunk) { (*static_cast<const F*>(ctx))(chunk); }, const_cast<F*>(&body));
}

// Splits [0, n) into nearly equal ranges of about `grain` items and calls body(begin, end) for each.
template <class F>
inline void parallel_ranges(int64_t n, int64_t grain, const F& body) {
  int64_t chunks = (n + grain - 1) / grain;
  if (chunks <= 1) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  parallel(chunks, [&](int64_t chunk) { body(n * chunk / chunks, n * (chunk + 1) / chunks); });
}

}  // namespace
}  // namespace fuseline::FL_ISA
