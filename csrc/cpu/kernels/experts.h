// Mixture-of-experts layer: each token runs through its k experts; results are summed by routing weight.
//
// Rounds where Transformers' grouped_mm experts round (integrations/moe.py): after each projection, bias addition, step
// of the activation, and the product with the routing weight if that has the same dtype. The sum over k is fp32 in the
// order of k, rounded once. Projections and outputs of experts are stored as fp32. A token's result depends on that
// token alone.
//
// A Weight holds the matrices of all experts. It packs rows and multiplies them:
//   num_out(), packed_floats(rows)                    outputs; size of packed rows
//   spare_floats()                                    room that pack() needs
//   pack(expert, const T* row, float* spare, packed, num_rows, r)   as row r of num_rows
//   wide_floats(rows)                                 room that multiply() needs
//   multiply(item, packed, num_rows, panel, num_panels, wide, c, ldc)   c[item.num_rows][ldc], fp32
#pragma once
#include "cpu/parallel.h"
#include "cpu/vec_math.h"
#include "fuseline/codes.h"
#include "product.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kScratchFloats = 16 << 20;    // bounds the pairs of one block
constexpr int64_t kItemRows = 16 * kTileRows;   // rows of one expert per work item

template <class Weight>
struct Experts {
  const Tensor &out, &x, &ids, &weights, &gate_up_bias, &down_bias;
  Weight gate_up, down;
  int64_t num_experts, act, num_hidden;
  float alpha, limit;
  int64_t num_tokens() const { return x.sizes[0]; }
  int64_t dim() const { return x.sizes[1]; }
  int64_t top_k() const { return ids.sizes[1]; }
};

// A (token, choice) pair is one row; rows are sorted by expert, then by pair. An item is a range of rows of one expert.
struct Item {
  int64_t expert, row, num_rows;
};

struct Block {
  int64_t token, num_tokens, num_rows, num_items;
  int64_t* pair_of;   // [num_rows] pair of each row, relative to the block's first pair
  int64_t* row_of;    // [pairs] row of each pair, -1 if its expert id is invalid
  Item* items;
  float *x, *gate_up, *hidden, *y;   // packed, [rows][2 I], packed, [rows][D]
};

// One projection of packed rows: out[row] = round(round(rows @ weight) + bias).
template <class Weight>
struct Projection {
  const Weight& weight;
  const Tensor& bias;
  const float* packed;
  float* out;
};

template <class Weight>
int64_t expert_of(const Experts<Weight>& job, const Block& b, int64_t pair) {
  return int_at(job.ids, (b.token + pair / job.top_k()) * job.ids.strides[0] + pair % job.top_k() * job.ids.strides[1]);
}

template <class Weight>
void sort_pairs(const Experts<Weight>& job, Block& b, int64_t* starts) {
  int64_t pairs = b.num_tokens * job.top_k();
  for (int64_t e = 0; e <= job.num_experts; ++e) starts[e] = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    int64_t e = expert_of(job, b, p);
    if (e >= 0 && e < job.num_experts) ++starts[e + 1];
  }
  b.num_items = 0;
  for (int64_t e = 0; e < job.num_experts; ++e) {
    for (int64_t r = 0; r < starts[e + 1]; r += kItemRows)
      b.items[b.num_items++] = {e, starts[e] + r, starts[e + 1] - r < kItemRows ? starts[e + 1] - r : kItemRows};
    starts[e + 1] += starts[e];
  }
  b.num_rows = starts[job.num_experts];
  for (int64_t p = 0; p < pairs; ++p) {
    int64_t e = expert_of(job, b, p);
    b.row_of[p] = e >= 0 && e < job.num_experts ? starts[e]++ : -1;
    if (b.row_of[p] >= 0) b.pair_of[b.row_of[p]] = p;
  }
}

template <class Weight>
void gather_rows(const Experts<Weight>& job, const Block& b) {
  parallel(b.num_rows, [&](int64_t r) {
    int64_t token = b.token + b.pair_of[r] / job.top_k();
    with_float(job.x.dtype, [&](auto t) {
      using T = decltype(t);
      const T* row = static_cast<const T*>(job.x.data) + token * job.x.strides[0];
      float* spare = chunk_floats(job.gate_up.spare_floats());
      job.gate_up.pack(expert_of(job, b, b.pair_of[r]), row, spare, b.x, b.num_rows, r);
    });
  });
}

// Stores sums c[rows][ldc] of n outputs from n0 on.
template <class T, class Weight>
void finish_rows(const Projection<Weight>& p, const Item& item, int64_t n0, int64_t n, float* c, int64_t ldc,
                 const float* bias) {
  for (int64_t r = 0; r < item.num_rows; ++r) {
    float* y = c + r * ldc;
    for (int64_t j = 0; j < ldc; j += kLanes) {
      vf v = round_to<T>(load(y + j));
      store(y + j, p.bias.present() ? round_to<T>(v + load(bias + j)) : v);
    }
    convert_row(y, n, p.out + (item.row + r) * p.weight.num_out() + n0);
  }
}

template <class Weight>
void project_chunk(const Experts<Weight>& job, const Projection<Weight>& p, const Block& b, const Item& item,
                   int64_t panel, int num_panels) {
  int64_t width = int64_t{num_panels} * kPanel;
  int64_t space = p.weight.wide_floats(item.num_rows);
  float* wide = chunk_floats(space + (item.num_rows + 1) * width);
  float *bias = wide + space, *c = bias + width;
  int64_t n0 = panel * kPanel, n = p.weight.num_out() - n0 < width ? p.weight.num_out() - n0 : width;
  p.weight.multiply(item, p.packed, b.num_rows, panel, num_panels, wide, c, width);
  if (p.bias.present())
    with_float(p.bias.dtype, [&](auto t) {
      convert_row(static_cast<decltype(t)*>(p.bias.data) + item.expert * p.bias.strides[0] + n0, n, bias);
    });
  with_float(job.x.dtype, [&](auto t) { finish_rows<decltype(t)>(p, item, n0, n, c, width, bias); });
}

template <class Weight>
void project(const Experts<Weight>& job, const Projection<Weight>& p, const Block& b) {
  int64_t panels = (p.weight.num_out() + kPanel - 1) / kPanel, chunks = (panels + kMaxPanels - 1) / kMaxPanels;
  parallel(b.num_items * chunks, [&](int64_t i) {
    int64_t panel = i % chunks * kMaxPanels, left = panels - panel;
    project_chunk(job, p, b, b.items[i / chunks], panel, static_cast<int>(left < kMaxPanels ? left : kMaxPanels));
  });
}

FL_INLINE vf activate(int64_t act, vf x) {
  if (act == kExpertSilu) return vsilu(x);
  if (act == kExpertGelu) return vgelu(x);
  return act == kExpertGeluTanh ? vgelu_tanh(x) : vrelu(x);
}

// Activation of one vector of gates and ups; alpha and limit are used by gpt-oss only.
template <class T, class Weight>
vf gated(const Experts<Weight>& job, vf gate, vf up) {
  if (job.act != kGluOss) return round_to<T>(round_to<T>(activate(job.act, gate)) * up);
  gate = vmin(gate, set1(job.limit));
  up = vmax(vmin(up, set1(job.limit)), set1(-job.limit));
  vf glu = round_to<T>(gate * round_to<T>(vsigmoid(round_to<T>(gate * job.alpha))));
  return round_to<T>(round_to<T>(up + 1.0f) * glu);
}

template <class T, class Weight>
void activate_row(const Experts<Weight>& job, const Block& b, int64_t r) {
  const float* row = b.gate_up + r * 2 * job.num_hidden;
  bool interleaved = job.act == kGluOss;
  float gate[kDepth + kLanes], up[kDepth + kLanes];
  float* spare = chunk_floats(job.down.spare_floats() + job.num_hidden);
  T* hidden = reinterpret_cast<T*>(spare + job.down.spare_floats());
  for (int64_t k = 0; k < job.num_hidden; k += kDepth) {
    int64_t n = job.num_hidden - k < kDepth ? job.num_hidden - k : kDepth;
    for (int64_t j = 0; j < n; ++j) gate[j] = row[interleaved ? 2 * (k + j) : k + j];
    for (int64_t j = 0; j < n; ++j) up[j] = row[interleaved ? 2 * (k + j) + 1 : job.num_hidden + k + j];
    for (int64_t j = n; j % kLanes != 0; ++j) gate[j] = up[j] = 0.0f;
    for (int64_t j = 0; j < n; j += kLanes) store(gate + j, gated<T>(job, load(gate + j), load(up + j)));
    convert_row(gate, n, hidden + k);
  }
  job.down.pack(expert_of(job, b, b.pair_of[r]), hidden, spare, b.hidden, b.num_rows, r);
}

template <class Weight>
void activate_rows(const Experts<Weight>& job, const Block& b) {
  with_float(job.x.dtype, [&](auto t) {
    parallel(b.num_rows, [&](int64_t r) { activate_row<decltype(t)>(job, b, r); });
  });
}

// T is the dtype to which the product with the routing weight is rounded.
template <class T, class Weight>
void sum_token(const Experts<Weight>& job, const Block& b, int64_t token, float* sum) {
  for (int64_t d = 0; d < job.dim(); ++d) sum[d] = 0.0f;
  for (int64_t k = 0; k < job.top_k(); ++k) {
    int64_t row = b.row_of[token * job.top_k() + k];
    if (row < 0) continue;
    float weight = float_at(job.weights, (b.token + token) * job.weights.strides[0] + k * job.weights.strides[1]);
    const float* y = b.y + row * job.dim();
    int64_t d = 0;
    for (; d + kLanes <= job.dim(); d += kLanes) store(sum + d, load(sum + d) + round_to<T>(load(y + d) * weight));
    if (d < job.dim()) {
      vf v = round_to<T>(load_n(y + d, job.dim() - d) * weight);
      store_n(sum + d, load_n(sum + d, job.dim() - d) + v, job.dim() - d);
    }
  }
}

template <class Weight>
void sum_tokens(const Experts<Weight>& job, const Block& b) {
  DType product = job.weights.dtype == job.x.dtype ? job.x.dtype : DType::f32;
  parallel(b.num_tokens, [&](int64_t token) {
    float* sum = chunk_floats(job.dim());
    with_float(product, [&](auto t) { sum_token<decltype(t)>(job, b, token, sum); });
    with_float(job.out.dtype, [&](auto t) {
      convert_row(sum, job.dim(), static_cast<decltype(t)*>(job.out.data) + (b.token + token) * job.out.strides[0]);
    });
  });
}

template <class Weight>
int64_t floats_per_pair(const Experts<Weight>& job) {
  return job.gate_up.packed_floats(1) + 2 * job.num_hidden + job.down.packed_floats(1) + job.dim();
}

// Allocates a block of up to `tokens` tokens in shared scratch.
template <class Weight>
Block make_block(const Experts<Weight>& job, int64_t tokens, int64_t** starts) {
  int64_t pairs = tokens * job.top_k(), items = job.num_experts + pairs / kItemRows + 1;
  int64_t integers = 2 * pairs + 3 * items + job.num_experts + 1;
  float* p = caller_floats(pairs * floats_per_pair(job) + 2 * integers);
  Block b{};
  b.x = p;
  b.gate_up = b.x + job.gate_up.packed_floats(pairs);
  b.hidden = b.gate_up + pairs * 2 * job.num_hidden;
  b.y = b.hidden + job.down.packed_floats(pairs);
  b.pair_of = reinterpret_cast<int64_t*>(b.y + (pairs * job.dim() + 1) / 2 * 2);
  b.row_of = b.pair_of + pairs;
  b.items = reinterpret_cast<Item*>(b.row_of + pairs);
  *starts = reinterpret_cast<int64_t*>(b.items + items);
  return b;
}

template <class Weight>
void run_block(const Experts<Weight>& job, const Block& b) {
  gather_rows(job, b);
  project<Weight>(job, {job.gate_up, job.gate_up_bias, b.x, b.gate_up}, b);
  activate_rows(job, b);
  project<Weight>(job, {job.down, job.down_bias, b.hidden, b.y}, b);
  sum_tokens(job, b);
}

// Sorts the pairs of one block of tokens after the other and calls run(block).
template <class Weight, class Run>
void for_sorted_blocks(const Experts<Weight>& job, const Run& run) {
  int64_t fit = kScratchFloats / (floats_per_pair(job) * job.top_k()), tokens = fit < 1 ? 1 : fit;
  if (tokens > job.num_tokens()) tokens = job.num_tokens();
  int64_t* starts;
  Block block = make_block(job, tokens, &starts);
  for (block.token = 0; block.token < job.num_tokens(); block.token += tokens) {
    block.num_tokens = job.num_tokens() - block.token < tokens ? job.num_tokens() - block.token : tokens;
    sort_pairs(job, block, starts);
    run(block);
  }
}

template <class Weight>
void run_experts(const Experts<Weight>& job) {
  for_sorted_blocks(job, [&](const Block& b) { run_block(job, b); });
}

}  // namespace
}  // namespace fuseline::FL_ISA
