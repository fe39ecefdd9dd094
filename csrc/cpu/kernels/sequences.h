// Recurrences over slots of states: the sequences of a step, and the numbers that they read.
#pragma once
#include "views.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kPanelColumns = 16;  // columns of a panel of a state, on every ISA

// Tokens [begin, end) of a step; the state in `slot` is that of the tokens before, unless the sequence begins here.
struct SequencePart {
  int64_t begin, end, slot;
  bool is_first;
};

struct Sequences {
  const Tensor &slots, &seq_lens, &query_start;

  int64_t count() const { return slots.sizes[0]; }
  SequencePart at(int64_t s) const {
    const int64_t begin = index_at(query_start, s), end = index_at(query_start, s + 1);
    return {begin, end, index_at(slots, s), index_at(seq_lens, s) == end - begin};
  }
};

// Calls body(sequence, part) for `parts` independent parts of the state of each sequence that has tokens in this step.
template <class F>
void for_parts(const Sequences& sequences, const Tensor& state, int64_t parts, const F& body) {
  parallel(sequences.count() * parts, [&](int64_t task) {
    const SequencePart sequence = sequences.at(task / parts);
    if (sequence.begin < sequence.end && sequence.slot >= 0 && sequence.slot < state.sizes[0])
      body(sequence, task % parts);
  });
}

// to[k] = the number at `at + k * stride`, of any float dtype.
FL_INLINE void read_some(const Tensor& t, int64_t at, int64_t stride, int64_t n, float* to) {
  with_float(t.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(t.data) + at;
    if (stride == 1) return convert_row(from, n, to);
    for (int64_t k = 0; k < n; ++k) to[k] = to_float(from[k * stride]);
  });
}

FL_INLINE void write_some(const Tensor& t, int64_t at, int64_t stride, int64_t n, const float* from) {
  with_float(t.dtype, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(t.data) + at;
    if (stride == 1) return convert_row(from, n, to);
    for (int64_t k = 0; k < n; ++k) to[k * stride] = from_float<T>(from[k]);
  });
}

FL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace fuseline::FL_ISA
