// Attention over a paged KV cache: chunked prefill, prefix hits and decode take the same path.
//
// A row is one query head of one token. Its keys are read in tiles of kKeys and segments of kSegment keys, both aligned
// to absolute positions. The softmax is online within a segment; segments are merged in ascending order. A row's result
// therefore depends on its own query and keys alone, not on other rows, chunking or which thread ran which segment.
#include "cpu/parallel.h"
#include "coded_tiles.h"

namespace fuseline::FL_ISA {
namespace {

// Partial softmax result of a task over a subset of its keys: weighted value sums, row maxima, softmax denominators.
struct Partial {
  float *sum, *max, *weight;
};

Partial partial_at(const Attention& job, int64_t rows, float* p) {
  return {p, p + rows * job.padded_dim, p + rows * (job.padded_dim + 1)};
}

// Arithmetic paths. Queries are [ceil(D / kDepth)][rows][kRowSize] words, probabilities [rows][kRowSize]. A word is one
// fp32 on the fp32 path, a pair of bf16 on the bf16-dot path.
struct Fp32Path {
  using Word = float;
  using Value = float;
  static constexpr bool kIsDot = false;
  static constexpr int64_t kDepth = kKeys;
  template <class Q>
  static void pack(const Q* x, int64_t n, float* row) { convert_row(x, n, row); }
  FL_INLINE static void store_probabilities(const vf* x, float* row) {
    for (int v = 0; v < kKeys / kLanes; ++v) store(row + v * kLanes, x[v]);
  }
};

struct Bf16DotPath {
  using Word = uint32_t;
  using Value = bf16;
  static constexpr bool kIsDot = true;
  static constexpr int64_t kDepth = 2 * kKeys;
  static void pack(const bf16* x, int64_t n, uint32_t* row) {
    if (n % 2) row[n / 2] = 0;
    __builtin_memcpy(row, x, n * sizeof(bf16));
  }
  template <class V>
  FL_INLINE static void store_probabilities(const V* x, float* row) {
    for (int v = 0; v < kKeys / kLanes; v += 2) store(row + v / 2 * kLanes, (vf)narrow_pairs(x[v], x[v + 1]));
  }
};

template <class Path, class Q>
void pack_queries(const Attention& job, const Task& task, typename Path::Word* packed) {
  int64_t rows = task.rows();
  for (int64_t r = 0; r < rows; ++r) {
    const Q* x = static_cast<const Q*>(job.q.data) + (task.head + r % task.num_heads) * job.q.strides[1] +
                 (task.token + r / task.num_heads) * job.q.strides[2];
    for (int64_t d = 0; d < job.key_dim; d += Path::kDepth)
      Path::pack(x + d, job.key_dim - d < Path::kDepth ? job.key_dim - d : Path::kDepth,
                packed + (d / Path::kDepth * rows + r) * kRowSize);
  }
}

// Packs the values of `count` keys as panels [padded_dim / 16][kKeys][16].
template <class T>
void widen_values(const Attention& job, const T* const* rows, int64_t count, float* values) {
  int64_t whole = job.value_dim / kPanel * kPanel;
  for (int64_t key = 0; key < count; ++key) {
    float* to = values + key * kPanel;
    for (int64_t e = 0; e < whole; e += kPanel)
      for (int j = 0; j < kPanel; j += kLanes) store(to + e * kKeys + j, load(rows[key] + e + j));
    if (whole < job.value_dim) convert_row(rows[key] + whole, job.value_dim - whole, to + whole * kKeys);
  }
}

// Packs values in pairs of keys, [padded_dim / 16][kKeys / 2][16][2]. If `count` is odd, rows[count] must be readable.
template <class T>
void pair_values(const Attention& job, const T* const* rows, int64_t count, T* values) {
  int64_t whole = job.value_dim / (2 * kPanel) * 2 * kPanel;
  for (int64_t key = 0; key < count; key += 2) {
    T last[2][2 * kPanel] = {};
    for (int64_t e = 0; e < job.padded_dim; e += 2 * kPanel) {
      const T *a = rows[key] + e, *b = rows[key + 1] + e;
      if (e == whole) {
        __builtin_memcpy(last[0], a, (job.value_dim - whole) * sizeof(T));
        __builtin_memcpy(last[1], b, (job.value_dim - whole) * sizeof(T));
        a = last[0], b = last[1];
      }
      vu pairs[2];
      pair_rows(a, b, pairs);
      T* to = values + e * kKeys + key * kPanel;
      for (int p = 0; p < 2; ++p) __builtin_memcpy(to + p * kPanel * kKeys, &pairs[p], sizeof pairs[p]);
    }
  }
}

void fill(float* x, int64_t lo, int64_t hi, float value) {
  for (int64_t i = lo; i < hi; ++i) x[i] = value;
}

// Scales of the keys and values of a tile; absent but for int8.
struct KeyScales {
  const float *keys, *values;
};

FL_INLINE vi lanes_from(int64_t first) {
  vi lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
  return lanes + static_cast<int32_t>(first);
}

// Keys [lo, hi) of a tile that a row sees. `slope` times its distance to a key, at most 0, is added to the score; `self` is
// the place in the tile of the row's own key. bias[d] of `num_biases` is added to the score of a key at distance d.
struct SeenKeys {
  int64_t lo, hi, self;
  float slope;
  const float* bias;
  int64_t num_biases;
};

// Adds a row's biases by distance to its scores x[kKeys].
FL_INLINE void add_biases(const SeenKeys& seen, vf* x) {
  float bias[kKeys];
  for (int64_t k = 0; k < kKeys; ++k) {
    int64_t distance = seen.self - k;
    bias[k] = distance >= 0 && distance < seen.num_biases ? seen.bias[distance] : 0.0f;
  }
  for (int v = 0; v < kKeys / kLanes; ++v) x[v] += load(bias + v * kLanes);
}

// Turns a row of scores into probabilities relative to its new maximum, 0 for keys outside [lo, hi); rescales sums.
// Probabilities are multiplied by the scales of values.
template <class Path>
void softmax_row(const Attention& job, float* s, const SeenKeys& seen, const KeyScales& scales, float* sum, float& max,
                 float& weight) {
  const int64_t lo = seen.lo, hi = seen.hi;
  if (lo >= hi) return fill(s, 0, kKeys, 0.0f);
  constexpr int kVecs = kKeys / kLanes;
  vf x[kVecs], top = set1(-kInfinity), total = set1(0.0f);
  for (int v = 0; v < kVecs; ++v) {
    x[v] = load(s + v * kLanes) * job.scale;
    if (scales.keys) x[v] *= load(scales.keys + v * kLanes);
    if (job.softcap > 0) x[v] = job.softcap * vtanh(x[v] / job.softcap);
    if (seen.slope != 0.0f) x[v] += seen.slope * __builtin_convertvector(lanes_from(v * kLanes - seen.self), vf);
  }
  if (seen.bias) add_biases(seen, x);
  bool is_full = lo <= 0 && hi >= kKeys;
  vi is_seen[kVecs];
  if (!is_full) {
    const vi first = set1i(static_cast<int32_t>(lo)), end = set1i(static_cast<int32_t>(hi));
    for (int v = 0; v < kVecs; ++v) {
      const vi key = lanes_from(v * kLanes);
      is_seen[v] = (vi)(key >= first) & (vi)(key < end);
      x[v] = select(is_seen[v], x[v], set1(-kInfinity));
    }
  }
  for (int v = 0; v < kVecs; ++v) top = vmax(top, x[v]);
  float new_max = hmax(top);
  new_max = new_max > max ? new_max : max;
  for (int v = 0; v < kVecs; ++v) {
    x[v] = vexp_down(x[v] - new_max);
    if (!is_full) x[v] = select(is_seen[v], x[v], zero());
    total += x[v];
    if (scales.values) x[v] *= load(scales.values + v * kLanes);
  }
  Path::store_probabilities(x, s);
  if (max == new_max) {   // exp(0) is exactly 1
    weight += hsum(total);
    return;
  }
  bool is_first = max == -kInfinity;   // the sums are still zero
  float shrink = is_first ? 0.0f : exp_of(max - new_max);
  weight = weight * shrink + hsum(total);
  max = new_max;
  if (is_first) return;
  for (int64_t e = 0; e < job.padded_dim; e += kLanes) store(sum + e, load(sum + e) * shrink);
}

template <class Path, class T>
struct TaskScratch {
  typename Path::Word* queries;
  float *scores, *values;
  T* keys;
  const Task* next;   // the thread's next task, if known; prefetched
  Places<T>* places;  // double buffer: the current tile and the one being prefetched
  DecodedTile<T> decoded;   // of a cache of codes

  KeyScales scales(const Attention& job) const {
    return job.code == kCacheInt8 ? KeyScales{decoded.key_scales, decoded.value_scales} : KeyScales{};
  }
};

int64_t queries_size(const Attention& job) { return (job.key_dim + kKeys - 1) / kKeys * kMaxRows * kRowSize; }

// Carves one task's scratch; `extra` more floats begin at `end`.
template <class Path, class T>
TaskScratch<Path, T> task_scratch(const Attention& job, const Task* next, Places<T>* places, int64_t extra, float** end) {
  int64_t values = kKeys * job.padded_dim, keys = job.is_coded() ? decoded_size(job) : kKeys * job.key_dim;
  float* p = chunk_floats(queries_size(job) + kMaxRows * kRowSize + values + keys + extra);
  float* scores = p + queries_size(job);
  float* first = scores + kMaxRows * kRowSize;
  *end = first + values + keys;
  return {reinterpret_cast<typename Path::Word*>(p), scores, first, reinterpret_cast<T*>(first + values), next, places,
          decoded_tile<T>(job, first + values)};
}

// scores [rows][kRowSize] = queries x panels.
template <class Path, class T>
void score_tile(const Attention& job, int64_t rows, const Places<T>& tile, int num_panels,
                const TaskScratch<Path, T>& s, float* scores) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    int n = static_cast<int>(rows - r < kTileRows ? rows - r : kTileRows);
    for (int64_t d = 0; d < job.key_dim; d += Path::kDepth)
      tile_rows<kRowSize>(n, s.queries + (d / Path::kDepth * rows + r) * kRowSize,
                          ListedPanels<T>{tile.panels, d * kPanel}, num_panels,
                          static_cast<int>(job.key_dim - d < Path::kDepth ? job.key_dim - d : Path::kDepth),
                          scores + r * kRowSize, kRowSize, d > 0);
  }
}

// sums [rows][padded_dim] += probabilities x values. With few rows the values are read in place; with more they are
// packed into panels once. `first` and num_keys count words of probabilities and keys, from the tile's first on.
template <class Path, class T>
void sum_tile(const Attention& job, int64_t rows, int64_t first, const Places<T>& tile, const Places<T>& next,
              int num_keys, const TaskScratch<Path, T>& s, float* sum) {
  using Word = typename Path::Word;
  using Value = typename Path::Value;
  const Word* scores = reinterpret_cast<const Word*>(s.scores) + first / (Path::kIsDot ? 2 : 1);
  int num_panels = static_cast<int>(job.padded_dim / kPanel);
  if (rows <= kTileRows && job.padded_dim == job.value_dim)
    return key_rows<kRowSize>(static_cast<int>(rows), scores, tile.values, next.values, num_panels, num_keys, sum,
                              job.padded_dim);
  Value* values = reinterpret_cast<Value*>(s.values);
  if constexpr (Path::kIsDot)
    pair_values(job, tile.values, num_keys, values);
  else
    widen_values(job, tile.values, num_keys, values);
  // Whole pairs: an odd last key would be stored unpaired in a panel.
  int num_k = Path::kIsDot ? num_keys + num_keys % 2 : num_keys;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    int n = static_cast<int>(rows - r < kTileRows ? rows - r : kTileRows);
    tile_rows<kRowSize>(n, scores + r * kRowSize, EvenPanels<Value>{values, int64_t{kKeys} * kPanel}, num_panels, num_k,
                        sum + r * job.padded_dim, job.padded_dim, true);
  }
}

const float* biases_of(const Attention& job, const Task& task, int64_t row) {
  if (!job.relative || !job.relative->present()) return nullptr;
  const int64_t* strides = job.relative->strides;
  return static_cast<const float*>(job.relative->data) + task.head_of(row) * strides[1] +
         (task.token + row / task.num_heads) * strides[2];
}

// Scores, softmax and sum of values of keys [lo, hi) of the tile at `base`, whose addresses are in `tile`.
template <class Path, class T>
void compute_tile(const Attention& job, const Task& task, int64_t base, int64_t lo, int64_t hi, const Places<T>& tile,
                  const Places<T>* next, const TaskScratch<Path, T>& s, Partial p) {
  int64_t rows = task.rows(), first_lane = (lo - base) / kPanel * kPanel;
  Places<T> none;
  none.lo = none.hi = 0;
  Fetch<T> fetch(job, next ? *next : none, hi - lo, rows + 1);   // sum_tile prefetches the first values
  fetch();
  int num_panels = static_cast<int>((hi - base - first_lane + kPanel - 1) / kPanel);
  score_tile(job, rows, tile, num_panels, s, s.scores + first_lane);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t position = task.position_of(r), first = first_key(job, position);
    int64_t begin = first > lo ? first - base : lo - base, end = position + 1 < hi ? position + 1 - base : hi - base;
    float slope = job.slopes.present() ? float_at(job.slopes, task.head_of(r)) : 0.0f;
    const float* bias = biases_of(job, task, r);
    SeenKeys seen{begin, end, position - base, slope, bias, bias ? job.relative->sizes[3] : 0};
    fetch();
    softmax_row<Path>(job, s.scores + r * kRowSize, seen, s.scales(job),
                      p.sum + r * job.padded_dim, p.max[r], p.weight[r]);
  }
  sum_tile(job, rows, lo - base, tile, next ? *next : tile, static_cast<int>(hi - lo), s, p.sum);
}

// Processes keys [lo, hi) of the tile at `base`.
template <class Path, class T>
void run_tile(const Attention& job, const Task& task, int64_t base, int64_t lo, int64_t hi,
              const TaskScratch<Path, T>& s, Partial p) {
  if (job.is_coded()) {
    decode_tile(job, task, base, lo, hi, s.decoded, s.places[0]);
    return compute_tile<Path, T>(job, task, base, lo, hi, s.places[0], nullptr, s, p);
  }
  int turn = s.places[1].is_at(task, lo, hi);
  Places<T>&tile = s.places[turn], &next = s.places[1 - turn];
  if (!tile.is_at(task, lo, hi)) find_tile(job, task, lo, hi, tile);
  if (job.makes_panels()) {
    for (int i = 0; i < kTilePanels; ++i) tile.panels[i] = s.keys + i * kPanel * job.key_dim;
    if (job.is_latent)
      panels_of_rows(tile.values, lo % kPanel, hi - lo, job.key_dim, s.keys);
    else
      copy_panels(job, task, lo, hi, s.keys);
  }
  bool has_next = find_next_tile(job, task, s.next, hi, next);
  if (!has_next) next.lo = next.hi = 0;
  compute_tile<Path, T>(job, task, base, lo, hi, tile, has_next ? &next : nullptr, s, p);
}

// Processes the keys of [segment, segment + 1) * kSegment that any row of the task sees; s.queries must be packed.
template <class Path, class T>
void run_segment(const Attention& job, const Task& task, int64_t segment, const TaskScratch<Path, T>& s, Partial p) {
  int64_t rows = task.rows();
  fill(p.sum, 0, rows * job.padded_dim, 0.0f);
  fill(p.max, 0, rows, -kInfinity);
  fill(p.weight, 0, rows, 0.0f);
  int64_t first = first_read(job, task.position), begin = segment * kSegment, end = begin + kSegment;
  if (begin < first) begin = first / kKeys * kKeys;
  if (end > task.end()) end = task.end();
  for (int64_t base = begin; base < end; base += kKeys)
    run_tile(job, task, base, base > first ? base : first, base + kKeys < end ? base + kKeys : end, s, p);
}

// Initializes partial results: empty, or with the sinks, which are keys with a score and no value.
void start_rows(const Attention& job, const Task& task, Partial total) {
  int64_t rows = task.rows();
  fill(total.sum, 0, rows * job.padded_dim, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    total.max[r] = job.sinks.present() ? float_at(job.sinks, task.head_of(r)) : -kInfinity;
    total.weight[r] = job.sinks.present() ? 1.0f : 0.0f;
  }
}

void merge_rows(const Attention& job, int64_t rows, Partial total, Partial part) {
  for (int64_t r = 0; r < rows; ++r) {
    float *x = total.sum + r * job.padded_dim, *y = part.sum + r * job.padded_dim;
    if (part.weight[r] == 0.0f) continue;
    if (total.weight[r] == 0.0f) {
      for (int64_t e = 0; e < job.padded_dim; e += kLanes) store(x + e, load(y + e));
      total.weight[r] = part.weight[r], total.max[r] = part.max[r];
      continue;
    }
    float max = total.max[r] > part.max[r] ? total.max[r] : part.max[r];
    float a = exp_of(total.max[r] - max), b = exp_of(part.max[r] - max);
    for (int64_t e = 0; e < job.padded_dim; e += kLanes)
      store(x + e, load(x + e) * a + load(y + e) * b);
    total.weight[r] = total.weight[r] * a + part.weight[r] * b;
    total.max[r] = max;
  }
}

void write_rows(const Attention& job, const Task& task, Partial total) {
  with_float(job.out.dtype, [&](auto t) {
    for (int64_t r = 0; r < task.rows(); ++r) {
      float *x = total.sum + r * job.padded_dim, weight = total.weight[r];
      float scale = weight == 0.0f ? 0.0f : job.value_unit / weight;
      for (int64_t e = 0; e < job.padded_dim; e += kLanes) store(x + e, load(x + e) * scale);
      auto* out = static_cast<decltype(t)*>(job.out.data) + (task.token + r / task.num_heads) * job.out.strides[1] +
                  (task.head + r % task.num_heads) * job.out.strides[2];
      convert_row(x, job.value_dim, out);
    }
  });
}

template <class Path>
void pack_task(const Attention& job, const Task& task, typename Path::Word* packed) {
  with_float(job.q.dtype, [&](auto t) {
    using Q = decltype(t);
    // The bf16-dot path is chosen for bf16 queries only.
    if constexpr (__is_same(Path, Fp32Path) || __is_same(Q, bf16)) pack_queries<Path, Q>(job, task, packed);
  });
}

template <class Path, class T>
void run_whole(const Attention& job, const Task& task, const Task* next, Places<T>* places) {
  int64_t size = job.partial_size(task.rows());
  float* end;
  TaskScratch s = task_scratch<Path, T>(job, next, places, 2 * size, &end);
  Partial total = partial_at(job, task.rows(), end), part = partial_at(job, task.rows(), end + size);
  pack_task<Path>(job, task, s.queries);
  start_rows(job, task, total);
  for (int64_t g = first_key(job, task.position) / kSegment; g * kSegment < task.end(); ++g) {
    run_segment(job, task, g, s, part);
    merge_rows(job, task.rows(), total, part);
  }
  write_rows(job, task, total);
}

// Few tasks with long context: segments run in parallel, then each task merges its own in the same order as run_whole.
template <class Path, class T>
void run_split(const Attention& job, const int64_t* starts, int64_t num_tasks, int64_t num_segments, float* parts) {
  int64_t size = job.partial_size(kMaxRows);
  parallel(num_tasks * num_segments, [&](int64_t i) {
    Task task = task_at(job, starts, i / num_segments);
    float* end;
    Places<T> places[2];
    TaskScratch s = task_scratch<Path, T>(job, nullptr, places, 0, &end);
    pack_task<Path>(job, task, s.queries);
    run_segment(job, task, i % num_segments, s, partial_at(job, task.rows(), parts + i * size));
  });
  parallel(num_tasks, [&](int64_t i) {
    Task task = task_at(job, starts, i);
    Partial total = partial_at(job, task.rows(), chunk_floats(size));
    start_rows(job, task, total);
    for (int64_t g = first_key(job, task.position) / kSegment; g * kSegment < task.end(); ++g)
      merge_rows(job, task.rows(), total, partial_at(job, task.rows(), parts + (i * num_segments + g) * size));
    write_rows(job, task, total);
  });
}

// Splits the work into tasks. Heads of a group share one pass over keys and values, unless that would idle threads.
void plan_tasks(Attention& job) {
  int64_t seq_heads = job.num_seqs * job.k_cache.sizes[1];
  job.heads_per_task = job.group < kMaxRows ? job.group : kMaxRows;
  if (job.q.sizes[2] == job.num_seqs)
    while (job.heads_per_task > 1 && seq_heads * job.parts() < num_threads())
      job.heads_per_task = (job.heads_per_task + 1) / 2;
  job.tokens_per_task = kMaxRows / job.heads_per_task;
}

int64_t tokens_of(const Attention& job, int64_t seq) {
  return int_at(job.query_start, seq + 1) - int_at(job.query_start, seq);
}

template <class Path, class T>
void run_all(Attention& job) {
  constexpr int64_t kStep = Path::kIsDot ? 2 * kPanel : kPanel;
  job.padded_dim = (job.value_dim + kStep - 1) / kStep * kStep;
  plan_tasks(job);
  int64_t longest = 1, num_tasks = 0;
  for (int64_t s = 0; s < job.num_seqs; ++s) {
    num_tasks += job.tasks_of(tokens_of(job, s));
    if (int_at(job.seq_lens, s) > longest) longest = int_at(job.seq_lens, s);
  }
  int64_t num_segments = (longest + kSegment - 1) / kSegment;
  bool split = num_segments > 1 && num_threads() > 1 && num_tasks < 4 * num_threads();
  int64_t parts = split ? num_tasks * num_segments * job.partial_size(kMaxRows) : 0;
  float* shared = caller_floats(parts + 2 * job.num_seqs + 2);
  int64_t* starts = reinterpret_cast<int64_t*>(shared + parts);
  for (int64_t s = 0, next = 0; s < job.num_seqs; ++s) {
    starts[s] = next;
    next += job.tasks_of(tokens_of(job, s));
  }
  if (split) return run_split<Path, T>(job, starts, num_tasks, num_segments, shared);
  int64_t grain = num_tasks / (8 * num_threads());
  parallel_ranges(num_tasks, grain < 1 ? 1 : grain > kMaxGrain ? kMaxGrain : grain, [&](int64_t begin, int64_t end) {
    Task task = task_at(job, starts, begin), next;
    Places<T> places[2];
    for (int64_t i = begin; i < end; ++i, task = next) {
      if (i + 1 < end) next = task_at(job, starts, i + 1);
      run_whole<Path, T>(job, task, i + 1 < end ? &next : nullptr, places);
    }
  });
}

Attention with_sizes(Attention job) {
  job.num_seqs = job.seq_lens.sizes[0];
  job.group = job.q.sizes[1] / job.k_cache.sizes[1];
  job.block_size = job.k_cache.sizes[2];
  job.key_dim = job.q.sizes[3];
  job.value_dim = job.out.sizes[3];
  return job;
}

// t: as of paged_attention.
Attention attention_job(const Tensor* t, const int64_t* i, const double* f, const Tensor& relative) {
  Attention job = with_sizes({t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], i[0], i[1], static_cast<float>(f[0]),
                              static_cast<float>(f[1])});
  job.relative = &relative;
  return job;
}

constexpr Tensor kAbsent{nullptr, DType::f32, -1, {}, {}};

Attention latent_job(const Tensor* t, int64_t window, const double* f) {
  Attention job = with_sizes({t[0], t[1], t[2], t[2], t[3], t[4], t[5], t[6], kAbsent, window, 0, static_cast<float>(f[0]),
                              static_cast<float>(f[1])});
  job.is_latent = true;
  return job;
}

void run_plain(Attention job) {
  if constexpr (kHasDot)
    if (job.k_cache.dtype == DType::bf16 && job.q.dtype == DType::bf16) return run_all<Bf16DotPath, bf16>(job);
  with_float(job.k_cache.dtype, [&](auto p) { run_all<Fp32Path, decltype(p)>(job); });
}

void run_coded(Attention job, int64_t code, const Tensor& k_scale, const Tensor& v_scale) {
  job.code = code;
  job.scale *= cache_unit(code) * (k_scale.present() ? float_at(k_scale, 0) : 1.0f);
  job.value_unit = cache_unit(code) * (v_scale.present() ? float_at(v_scale, 0) : 1.0f);
  if constexpr (kHasDot)
    if (job.q.dtype == DType::bf16) return run_all<Bf16DotPath, bf16>(job);
  run_all<Fp32Path, float>(job);
}

}  // namespace

// t: out!, q, k_cache, v_cache, block_table (i32), seq_lens, query_start, sinks?, slopes? (times the distance of key and
// query, <= 0, added to scores), relative? (by its own query, added to the scores of keys at distances 0 .. R - 1; numbers
// of a query side by side); i: window, chunk (a token sees the keys of its aligned chunk; 0: none); f: scale, softcap
// (0: none). keys.h gives the layout of keys. Keys from seq_lens on, and blocks before the window or chunk, are not read.
void paged_attention(const Tensor* t, const int64_t* i, const double* f) { run_plain(attention_job(t, i, f, t[9])); }

// The same over caches of codes (cache_codes.h): t: then k_scale?, v_scale?, relative?; i: then code (CacheCode).
void paged_attention_codes(const Tensor* t, const int64_t* i, const double* f) {
  run_coded(attention_job(t, i, f, t[11]), i[2], t[9], t[10]);
}

// t: out!, q, k_cache, block_table, seq_lens, query_start, sinks?; i: value_dim, window; f as above. A token's value is
// the first value_dim numbers of its key; the cache has them as rows.
void paged_latent_attention(const Tensor* t, const int64_t* i, const double* f) {
  run_plain(latent_job(t, i[1], f));
}

// The same over a cache of codes: t: then latent_scale?; i: then code (CacheCode).
void paged_latent_attention_codes(const Tensor* t, const int64_t* i, const double* f) {
  run_coded(latent_job(t, i[1], f), i[2], t[7], t[7]);
}

}  // namespace fuseline::FL_ISA
