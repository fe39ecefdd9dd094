// Inputs of an attention task: the keys and values of its tiles, wherever their blocks are in the cache.
#pragma once
#include "keys.h"
#include "latent.h"
#include "views.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int kKeys = 64;                    // keys per tile
constexpr int kTilePanels = kKeys / kPanel;
constexpr int kRowSize = kKeys + 16;         // row stride of queries and probabilities, in words
constexpr int64_t kSegment = 256;
constexpr int64_t kMaxGrain = 16;            // tasks claimed together by a thread
constexpr int64_t kMaxRows = 64;             // rows per task; they share each read of a key or value tile

struct Attention {
  const Tensor &out, &q, &k_cache, &v_cache, &block_table, &seq_lens, &query_start, &sinks, &slopes;
  int64_t window, chunk;
  float scale, softcap;
  int64_t num_seqs = 0, group = 0, block_size = 0, key_dim = 0, value_dim = 0, padded_dim = 0;
  int64_t heads_per_task = 0, tokens_per_task = 0;
  int64_t code = -1;          // CacheCode of caches of codes (cache_codes.h)
  float value_unit = 1.0f;    // of the values that are summed
  bool is_latent = false;     // keys lie as rows, of which a value is the beginning; v_cache is k_cache
  const Tensor* relative = nullptr;   // [1, H, T, R] biases of distances 0 .. R - 1

  bool is_coded() const { return code >= 0; }
  // Whether the keys of a tile are put into panels when they are read.
  bool makes_panels() const { return is_latent || key_lanes(block_size) != kPanel; }
  int64_t parts() const { return (group + heads_per_task - 1) / heads_per_task; }
  int64_t tasks_of(int64_t tokens) const {
    return k_cache.sizes[1] * parts() * ((tokens + tokens_per_task - 1) / tokens_per_task);
  }
  // Floats of a partial result of `rows` rows: sums [rows][padded_dim], then maxima and denominators [rows].
  int64_t partial_size(int64_t rows) const { return rows * (padded_dim + 2); }
};

// Tokens [token, token + num_tokens) of the batch, the first at `position` in its sequence, times heads of one kv head.
struct Task {
  int64_t seq, kv_head, head, num_heads, token, num_tokens, position;
  int64_t rows() const { return num_tokens * num_heads; }
  int64_t position_of(int64_t row) const { return position + row / num_heads; }
  int64_t head_of(int64_t row) const { return head + row % num_heads; }
  int64_t end() const { return position + num_tokens; }   // number of keys the last token sees
};

// First key that a row sees: of its window, or of its chunk.
int64_t first_key(const Attention& job, int64_t position) {
  if (job.chunk > 0) return position / job.chunk * job.chunk;
  return job.window > 0 && position >= job.window ? position - job.window + 1 : 0;
}

// First key read for a row, rounded down to an even one: pairs must not depend on the other rows.
int64_t first_read(const Attention& job, int64_t position) { return first_key(job, position) & ~int64_t{1}; }

// starts[s] is the first task of sequence s.
Task task_at(const Attention& job, const int64_t* starts, int64_t index) {
  int64_t lo = 0, hi = job.num_seqs;
  while (hi - lo > 1) {
    int64_t mid = (lo + hi) / 2;
    (starts[mid] <= index ? lo : hi) = mid;
  }
  index -= starts[lo];
  int64_t part = index % job.parts(), kv_head = index / job.parts() % job.k_cache.sizes[1];
  int64_t first = index / job.parts() / job.k_cache.sizes[1] * job.tokens_per_task;
  int64_t begin = int_at(job.query_start, lo), tokens = int_at(job.query_start, lo + 1) - begin;
  int64_t head = part * job.heads_per_task, left = tokens - first;
  return {lo, kv_head, kv_head * job.group + head,
          job.group - head < job.heads_per_task ? job.group - head : job.heads_per_task, begin + first,
          left < job.tokens_per_task ? left : job.tokens_per_task, int_at(job.seq_lens, lo) - tokens + first};
}

// Calls body(cache block, first key in it, number of keys, n) over keys [lo, hi); n counts keys from 0.
template <class T, class F>
FL_INLINE void for_blocks(const Attention& job, const Tensor& cache, const Task& task, int64_t lo, int64_t hi,
                          const F& body) {
  const int32_t* table = static_cast<const int32_t*>(job.block_table.data) + task.seq * job.block_table.strides[0];
  const T* heads = static_cast<const T*>(cache.data) + task.kv_head * cache.strides[1];
  int64_t place = lo / job.block_size, within = lo - place * job.block_size;
  for (int64_t n = 0; n < hi - lo; ++place, within = 0) {
    int64_t left = job.block_size - within, count = hi - lo - n < left ? hi - lo - n : left;
    body(heads + table[place * job.block_table.strides[1]] * cache.strides[0], within, count, n);
    n += count;
  }
}

// panels[0, ...) = the panels of keys [lo, hi), starting with the one that holds lo. Other lanes hold unspecified keys.
template <class T>
void find_panels(const Attention& job, const Task& task, int64_t lo, int64_t hi, const T** panels) {
  lo -= lo % kPanel;
  for_blocks<T>(job, job.k_cache, task, lo, hi, [&](const T* block, int64_t within, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i += kPanel) panels[(n + i) / kPanel] = block + (within + i) * job.key_dim;
  });
}

// The same, assembled from blocks whose size is no multiple of a panel.
template <class T>
void copy_panels(const Attention& job, const Task& task, int64_t lo, int64_t hi, T* panels) {
  for_blocks<T>(job, job.k_cache, task, lo, hi, [&](const T* block, int64_t within, int64_t count, int64_t n) {
    for (int64_t i = 0, key = lo % kPanel + n; i < count; ++i, ++key)
      copy_key(block, job.block_size, job.key_dim, within + i, panels + key / kPanel * kPanel * job.key_dim,
               key % kPanel);
  });
}

// rows[0, hi - lo) = addresses of the values of keys [lo, hi).
template <class T>
void find_values(const Attention& job, const Task& task, int64_t lo, int64_t hi, const T** rows) {
  for_blocks<T>(job, job.v_cache, task, lo, hi, [&](const T* block, int64_t within, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; ++i) rows[n + i] = block + (within + i) * job.v_cache.strides[2];
  });
}

// Addresses of the keys [lo, hi) of a tile and of their values; entries past the end are readable.
template <class T>
struct Places {
  int64_t seq = -1, kv_head = 0, lo = 0, hi = 0;
  const T *panels[kTilePanels], *values[kKeys];

  bool is_at(const Task& task, int64_t first, int64_t end) const {
    return seq == task.seq && kv_head == task.kv_head && lo == first && hi == end;
  }
};

template <class T>
void find_tile(const Attention& job, const Task& task, int64_t lo, int64_t hi, Places<T>& tile) {
  tile.seq = task.seq, tile.kv_head = task.kv_head, tile.lo = lo, tile.hi = hi;
  find_values(job, task, lo, hi, tile.values);
  for (int64_t i = hi - lo; i < kKeys; ++i) tile.values[i] = tile.values[0];
  if (job.makes_panels()) return;
  find_panels(job, task, lo, hi, tile.panels);
  for (int64_t p = (hi - 1) / kPanel - lo / kPanel + 1; p < kTilePanels; ++p) tile.panels[p] = tile.panels[0];
}

// Tile to prefetch while one ending at `hi` is processed: the task's next, or the first of the `next` task. Hardware
// cannot prefetch blocks at unrelated addresses. Returns false if there is none.
template <class T>
bool find_next_tile(const Attention& job, const Task& task, const Task* next, int64_t hi, Places<T>& tile) {
  if (hi >= task.end() && next == nullptr) return false;
  const Task& after = hi < task.end() ? task : *next;
  int64_t lo = hi < task.end() ? hi : first_read(job, after.position), end = (lo / kKeys + 1) * kKeys;
  find_tile(job, after, lo, end < after.end() ? end : after.end(), tile);
  return true;
}

// Prefetches a tile's keys, and its values from `first_value` on, one slice per call: more outstanding requests than a
// core supports would stall it.
template <class T>
class Fetch {
 public:
  Fetch(const Attention& job, const Places<T>& tile, int64_t first_value, int64_t num_calls) : tile_(tile), at_(0) {
    if (tile.lo == tile.hi) return;
    num_panels_ = job.makes_panels() ? 0 : (tile.hi - 1) / kPanel - tile.lo / kPanel + 1;
    panel_bytes_ = job.key_dim * kPanel * static_cast<int64_t>(sizeof(T));
    value_bytes_ = (job.is_latent ? job.key_dim : job.value_dim) * static_cast<int64_t>(sizeof(T));
    if (job.is_latent) first_value = 0;
    first_value_ = first_value;
    int64_t num_values = tile.hi - tile.lo > first_value ? tile.hi - tile.lo - first_value : 0;
    end_ = num_panels_ + num_values;
    slice_ = (num_panels_ * panel_bytes_ + num_values * value_bytes_) / num_calls + 64;
  }
  FL_INLINE void operator()() {
    for (int64_t left = slice_; at_ < end_; ++at_, done_ = 0) {
      bool is_panel = at_ < num_panels_;
      const T* from = is_panel ? tile_.panels[at_] : tile_.values[first_value_ + at_ - num_panels_];
      for (int64_t bytes = is_panel ? panel_bytes_ : value_bytes_; done_ < bytes; done_ += 64, left -= 64) {
        if (left <= 0) return;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + done_, 0, 2);
      }
    }
  }

 private:
  const Places<T>& tile_;
  int64_t at_, done_ = 0, end_ = 0, num_panels_ = 0, panel_bytes_ = 0, value_bytes_ = 0, first_value_ = 0, slice_ = 0;
};

}  // namespace
}  // namespace fuseline::FL_ISA
