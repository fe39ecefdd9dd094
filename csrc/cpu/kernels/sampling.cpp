// One sampling step over rows of fp32 logits, in this order: checks, masks, bias, penalties; argmax at temperature 0,
// else temperature, min_p, top_k, top_p and one draw; log-probabilities of the raw or the processed row.
//
// One thread computes a row in one order, so a row's token depends on that row alone.
#include "cpu/parallel.h"
#include "report.h"

namespace fuseline::FL_ISA {
namespace {

struct Sampling {
  const Tensor &tokens, &logprobs, &ranks, &top_ids, &top_logprobs, &ok, &logits, &temperature, &top_k, &top_p, &min_p,
      &repetition, &frequency, &presence, &seed, &counter, &num_logprobs, &history_start, &history, &prompt_len,
      &bias_start, &bias_ids, &bias_values, &banned_start, &banned_ids, &allowed_start, &allowed_ids, &bitmask;
  int64_t mode;
  int64_t vocab() const { return logits.sizes[1]; }
  const float* row(int64_t r) const { return static_cast<const float*>(logits.data) + r * logits.strides[0]; }
};

// A row's range of a ragged list.
struct Span {
  const Tensor& list;
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

Span span_of(const Tensor& starts, const Tensor& list, int64_t r) {
  return {list, int_at(starts, r), int_at(starts, r + 1)};
}

// Calls fn(id, index) for each id of the span that is in the vocabulary.
template <class F>
void each_id(const Sampling& job, const Span& span, const F& fn) {
  for (int64_t j = span.begin; j < span.end; ++j) {
    int64_t id = int_at(span.list, j);
    if (id >= 0 && id < job.vocab()) fn(id, j);
  }
}

bool has_penalty(const Sampling& job, int64_t r) {
  bool is_on = float_at(job.repetition, r) != 1.0f || float_at(job.frequency, r) != 0.0f ||
               float_at(job.presence, r) != 0.0f;
  return is_on && !span_of(job.history_start, job.history, r).empty();
}

bool has_edits(const Sampling& job, int64_t r) {
  return job.bitmask.present() || !span_of(job.bias_start, job.bias_ids, r).empty() ||
         !span_of(job.banned_start, job.banned_ids, r).empty() ||
         !span_of(job.allowed_start, job.allowed_ids, r).empty() || has_penalty(job, r);
}

void copy_allowed(const Sampling& job, int64_t r, float* z) {
  const float* x = job.row(r);
  Span allowed = span_of(job.allowed_start, job.allowed_ids, r);
  if (allowed.empty()) return convert_row(x, job.vocab(), z);
  for (int64_t i = 0; i < job.vocab(); ++i) z[i] = -kInfinity;
  each_id(job, allowed, [&](int64_t id, int64_t) { z[id] = x[id]; });
}

void mask_bits(const Sampling& job, int64_t r, float* z) {
  const int32_t* words = static_cast<const int32_t*>(job.bitmask.data) + r * job.bitmask.strides[0];
  for (int64_t w = 0; w * 32 < job.vocab(); ++w) {
    uint32_t bits = static_cast<uint32_t>(words[w]);
    if (bits == 0xffffffffu) continue;
    int64_t left = job.vocab() - w * 32;
    for (int64_t b = 0; b < (left < 32 ? left : 32); ++b)
      if (!(bits >> b & 1)) z[w * 32 + b] = -kInfinity;
  }
}

// `counts` is [vocab], zero before and after: bit 0 marks ids seen anywhere, each output occurrence adds 2.
void penalize(const Sampling& job, int64_t r, float* z, int32_t* counts) {
  float repetition = float_at(job.repetition, r);
  float frequency = float_at(job.frequency, r), presence = float_at(job.presence, r);
  Span history = span_of(job.history_start, job.history, r);
  int64_t first_output = history.begin + int_at(job.prompt_len, r);
  each_id(job, history, [&](int64_t id, int64_t j) { counts[id] = (counts[id] | 1) + (j >= first_output ? 2 : 0); });
  each_id(job, history, [&](int64_t id, int64_t) {
    if (counts[id] == 0) return;
    float count = static_cast<float>(counts[id] >> 1);
    z[id] = z[id] > 0 ? z[id] / repetition : z[id] * repetition;
    z[id] -= frequency * count;
    z[id] -= count > 0 ? presence : 0.0f;
    counts[id] = 0;
  });
}

void edit_row(const Sampling& job, int64_t r, float* z, int32_t* counts) {
  copy_allowed(job, r, z);
  if (job.bitmask.present()) mask_bits(job, r, z);
  each_id(job, span_of(job.banned_start, job.banned_ids, r), [&](int64_t id, int64_t) { z[id] = -kInfinity; });
  each_id(job, span_of(job.bias_start, job.bias_ids, r),
          [&](int64_t id, int64_t j) { z[id] += float_at(job.bias_values, j); });
  if (!has_penalty(job, r)) return;
  for (int64_t i = 0; i < job.vocab(); ++i) counts[i] = 0;
  penalize(job, r, z, counts);
}

// Smallest prefix, by value then id, of the kept entries whose probability reaches p of theirs.
Cut nucleus(const Row& row, const Cut& cut, double p) {
  double wanted = p * denominator(row, cut, kLargest);
  Cut result{greatest_threshold(row, cut.value, [&](float t) { return denominator(row, {t}, wanted) >= wanted; })};
  double have = denominator(row, {result.value, -1}, kLargest);
  double each = exp_of(result.value - row.max);
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (row.block_max[b] < result.value) continue;
    for (int64_t i = b * kScanBlock; i < row.end_of(b); ++i) {
      if (row.x[i] != result.value) continue;
      result.last_id = i;
      if ((have += each) >= wanted) return result;
    }
  }
  return result;
}

Cut truncate(const Sampling& job, int64_t r, const Row& z) {
  Cut cut;
  float min_p = float_at(job.min_p, r), top_p = float_at(job.top_p, r);
  int64_t top_k = int_at(job.top_k, r);
  if (min_p > 0) cut.value = z.max + (min_p < 1 ? static_cast<float>(__builtin_log(min_p)) : 0.0f);
  if (top_k > 0 && top_k < z.size) {
    float least = kth_largest(z, top_k);
    cut.value = least > cut.value ? least : cut.value;
  }
  return top_p < 1 ? nucleus(z, cut, top_p) : cut;
}

// Philox4x32-10 (Salmon et al., SC'11), key = seed, counter = (counter, 0), as a double in [0, 1) with 53 random bits.
double uniform(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    for (int j = 0; j < 4; ++j) c[j] = next[j];
  }
  return ((c[0] >> 5) * 67108864.0 + (c[1] >> 6)) / 9007199254740992.0;
}

// First kept id, in ascending order, whose cumulative probability exceeds u of the total.
int64_t draw(const Row& z, const Cut& cut, double u) {
  double target = u * denominator(z, cut, kLargest), before = 0.0;
  int64_t block = -1;
  for (int64_t b = 0; b < z.num_blocks(); ++b) {
    if (z.block_max[b] < cut.value) continue;
    float here = block_denominator(z, b, cut);
    if (here == 0.0f) continue;
    block = b;
    if (before + here > target) break;
    before += here;
  }
  int64_t last = argmax(z);
  for (int64_t i = block * kScanBlock; i < z.end_of(block); ++i) {
    float e = cut.keeps(z.x[i], i) ? exp_of(z.x[i] - z.max) : 0.0f;
    if (e == 0.0f) continue;
    last = i;
    if ((before += e) > target) break;
  }
  return last;
}

struct RowScratch {
  float *z, *raw_max, *z_max;
  int32_t* counts;
  int64_t* ids;
};

RowScratch row_scratch(int64_t vocab) {
  int64_t blocks = (vocab + kScanBlock - 1) / kScanBlock, padded = (vocab + 15) / 16 * 16;
  float* p = chunk_floats(4 * padded + 2 * blocks);
  return {p, p + 4 * padded, p + 4 * padded + blocks, reinterpret_cast<int32_t*>(p + padded),
          reinterpret_cast<int64_t*>(p + 2 * padded)};
}

Values values_of(const Sampling& job, const Row& raw, const Row& z, const Cut& cut) {
  bool processed = job.mode == kProcessedLogprobs || job.mode == kProcessedLogits;
  if (job.mode == kRawLogits || job.mode == kProcessedLogits) return {processed ? z : raw, processed ? cut : Cut{}};
  return processed ? log_softmax_of(z, cut) : log_softmax_of(raw, {});
}

// Status of a row, its `ok`: its logits are NaN, +inf or all -inf; it has a token; its logits are finite, but bias,
// masks, penalties and temperature leave no token.
enum Status : int64_t { kNotFinite = 0, kSampled = 1, kNothingLeft = 2 };

Status sample_row(const Sampling& job, int64_t r) {
  RowScratch s = row_scratch(job.vocab());
  Row raw = scan_row(job.row(r), job.vocab(), s.raw_max), z = raw;
  float temperature = float_at(job.temperature, r);
  bool edits = has_edits(job, r);
  if (!raw.is_ok) return kNotFinite;
  if (edits || temperature > 0) {
    if (edits) edit_row(job, r, s.z, s.counts);
    else convert_row(raw.x, job.vocab(), s.z);
    if (temperature > 0)
      for (int64_t i = 0; i < job.vocab(); ++i) s.z[i] /= temperature;
    z = scan_row(s.z, job.vocab(), s.z_max);
    if (!z.is_ok) return kNothingLeft;
  }
  Cut cut = temperature > 0 ? truncate(job, r, z) : Cut{};
  int64_t token = temperature > 0 ? draw(z, cut, uniform(static_cast<uint64_t>(int_at(job.seed, r)),
                                                         static_cast<uint64_t>(int_at(job.counter, r))))
                                  : argmax(z);
  set_int(job.tokens, r * job.tokens.strides[0], token);
  int64_t num_top = int_at(job.num_logprobs, r);
  if (num_top >= 0)
    write_report({job.logprobs, job.ranks, job.top_ids, job.top_logprobs}, r, values_of(job, raw, z, cut), token,
                 num_top, s.ids);
  return kSampled;
}

}  // namespace

// Tensors as in ops.def. Integer arrays may be i32 or i64. num_logprobs[r] is -1 for none (logprobs and ranks are not
// written), else at most L and V. An empty allowed list allows all; top_k 0, top_p 1, min_p 0 are off. ok[r] is a
// Status; unless it is kSampled, the row's other outputs are not written.
void sample(const Tensor* t, const int64_t* i, const double*) {
  Sampling job{t[0],  t[1],  t[2],  t[3],  t[4],  t[5],  t[6],  t[7],  t[8],  t[9],  t[10], t[11], t[12], t[13],
               t[14], t[15], t[16], t[17], t[18], t[19], t[20], t[21], t[22], t[23], t[24], t[25], t[26], t[27], i[0]};
  parallel(job.logits.sizes[0], [&](int64_t r) { set_int(job.ok, r * job.ok.strides[0], sample_row(job, r)); });
}

// t: logprobs!, ranks!, top_ids!, top_logprobs!, logits, targets. Log-softmax of each row at its target, and the L best.
void row_logprobs(const Tensor* t, const int64_t*, const double*) {
  const Tensor& logits = t[4];
  int64_t vocab = logits.sizes[1], num_top = t[2].sizes[1];
  parallel(logits.sizes[0], [&](int64_t r) {
    RowScratch s = row_scratch(vocab);
    Row row = scan_row(static_cast<const float*>(logits.data) + r * logits.strides[0], vocab, s.raw_max);
    write_report({t[0], t[1], t[2], t[3]}, r, log_softmax_of(row, {}), int_at(t[5], r), num_top, s.ids);
  });
}

}  // namespace fuseline::FL_ISA
