// Scans over one row of fp32 logits with the maximum of each block. Most queries (argmax, top k, rank, threshold) then
// read only the blocks whose maximum can matter.
#pragma once
#include "views.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kScanBlock = 64;

struct Row {
  const float* x;
  float* block_max;   // [num_blocks()]
  int64_t size;
  float max;
  bool is_ok;         // no NaN, no +inf, not all -inf

  int64_t num_blocks() const { return (size + kScanBlock - 1) / kScanBlock; }
  int64_t end_of(int64_t b) const { return (b + 1) * kScanBlock < size ? (b + 1) * kScanBlock : size; }
};

inline Row scan_row(const float* x, int64_t size, float* block_max) {
  Row row{x, block_max, size, -kInfinity, true};
  vf nan = set1(0.0f);
  bool has_nan = false;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    int64_t i = b * kScanBlock, end = row.end_of(b);
    float top = -kInfinity;
    if (end - i == kScanBlock) {
      vf most = load(x + i);
      for (int64_t j = 0; j < kScanBlock; j += kLanes) {
        vf v = load(x + i + j);
        nan = fma(vmax(set1(-kLargest), v), zero(), nan);   // vmax returns a NaN second operand; NaN and inf become NaN
        most = vmax(most, v);
      }
      top = hmax(most);
    } else {
      for (; i < end; ++i) {
        has_nan |= !(x[i] <= kLargest);
        top = x[i] > top ? x[i] : top;
      }
    }
    row.block_max[b] = top;
    row.max = top > row.max ? top : row.max;
  }
  row.is_ok = !has_nan && hsum(nan) == 0.0f && row.max > -kInfinity;
  return row;
}

// Index of the greatest entry, ties to the lowest id.
inline int64_t argmax(const Row& row) {
  int64_t b = 0;
  while (row.block_max[b] != row.max) ++b;
  int64_t i = b * kScanBlock;
  while (row.x[i] != row.max) ++i;
  return i;
}

// A token is kept if its logit is above `value`, or equal to it with an id of at most `last_id`.
struct Cut {
  float value = -kInfinity;
  int64_t last_id = INT64_MAX;
  bool keeps(float x, int64_t id) const { return x > value || (x == value && id <= last_id); }
};

// Softmax denominator of one block: sum of exp(x - max) over its kept entries.
inline float block_denominator(const Row& row, int64_t b, const Cut& cut) {
  float e[kScanBlock];
  int64_t i = b * kScanBlock, n = row.end_of(b) - i;
  for (int64_t j = 0; j < kScanBlock; ++j) e[j] = j < n && cut.keeps(row.x[i + j], i + j) ? row.x[i + j] : -kInfinity;
  vf total = set1(0.0f);
  for (int64_t j = 0; j < kScanBlock; j += kLanes) total += vexp(load(e + j) - row.max);
  return hsum(total);
}

// Softmax denominator of the row: sum of exp(x - max) over kept entries; stops once it reaches `enough`.
inline double denominator(const Row& row, const Cut& cut, double enough) {
  double total = 0.0;
  for (int64_t b = 0; b < row.num_blocks() && total < enough; ++b)
    if (row.block_max[b] >= cut.value) total += block_denominator(row, b, cut);
  return total;
}

inline int64_t count_greater(const Row& row, float value) {
  int64_t total = 0;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (!(row.block_max[b] > value)) continue;
    int32_t count = 0;
    for (int64_t i = b * kScanBlock; i < row.end_of(b); ++i) count += row.x[i] > value;
    total += count;
  }
  return total;
}

// Maps floats to integers of the same order, so that a threshold can be bisected exactly in 32 steps.
inline int32_t order_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

inline float float_of(int32_t order) {
  int32_t bits = order >= 0 ? order : order ^ 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Greatest threshold in [floor, row.max] for which is_enough(threshold); floor if there is none.
template <class F>
inline float greatest_threshold(const Row& row, float floor, const F& is_enough) {
  int64_t lo = order_of(floor), hi = order_of(row.max);
  while (lo < hi) {
    int64_t mid = lo + (hi - lo + 1) / 2;
    if (is_enough(float_of(static_cast<int32_t>(mid)))) lo = mid;
    else hi = mid - 1;
  }
  return float_of(static_cast<int32_t>(lo));
}

// The k-th largest entry, 1 <= k <= size.
inline float kth_largest(const Row& row, int64_t k) {
  return greatest_threshold(row, -kInfinity, [&](float t) {
    int64_t count = 0;
    for (int64_t b = 0; b < row.num_blocks() && count < k; ++b) {
      if (row.block_max[b] < t) continue;
      int32_t here = 0;
      for (int64_t i = b * kScanBlock; i < row.end_of(b); ++i) here += row.x[i] >= t;
      count += here;
    }
    return count >= k;
  });
}

// Heap sort by descending value, then ascending id.
inline void sort_best(int64_t* ids, const float* x, int64_t n) {
  auto after = [x](int64_t a, int64_t b) { return x[a] < x[b] || (x[a] == x[b] && a > b); };
  auto sink = [&](int64_t root, int64_t end) {
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      if (child + 1 < end && after(ids[child + 1], ids[child])) ++child;
      if (!after(ids[child], ids[root])) return;
      int64_t swap = ids[root];
      ids[root] = ids[child];
      ids[child] = swap;
    }
  };
  for (int64_t i = n / 2 - 1; i >= 0; --i) sink(i, n);
  for (int64_t end = n - 1; end > 0; --end) {
    int64_t swap = ids[0];
    ids[0] = ids[end];
    ids[end] = swap;
    sink(0, end);
  }
}

// The k best ids in order, ties to the lowest id.
inline void best_ids(const Row& row, int64_t k, int64_t* ids) {
  if (k == 0) return;
  float least = kth_largest(row, k);
  int64_t above = 0, ties = k - count_greater(row, least);
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.block_max[b] < least) continue;
    for (int64_t i = b * kScanBlock; i < row.end_of(b); ++i) {
      if (row.x[i] > least || (row.x[i] == least && ties-- > 0)) ids[above++] = i;
    }
  }
  sort_best(ids, row.x, k);
}

}  // namespace
}  // namespace fuseline::FL_ISA
