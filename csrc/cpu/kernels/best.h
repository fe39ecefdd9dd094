// The best experts of a token.
#pragma once
#include <cstdint>

#ifndef FL_ISA
#error "kernel sources are compiled by csrc/cpu/CMakeLists.txt, once per ISA"
#endif

namespace fuseline::FL_ISA {
namespace {

// The k largest entries of x in descending order, ties to the lowest id. NaN is larger than nothing.
inline void best_of(const float* x, int64_t n, int64_t k, int64_t* ids) {
  int64_t count = 0;
  for (int64_t e = 0; e < n; ++e) {
    if (count == k && !(x[e] > x[ids[k - 1]])) continue;
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0 && x[e] > x[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = e;
  }
}

}  // namespace
}  // namespace fuseline::FL_ISA
