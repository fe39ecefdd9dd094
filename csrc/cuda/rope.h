// Rotary embedding and the write to the paged KV cache: what a thread does, rotating one vector of pairs of a head or
// copying one vector of v. Each product is rounded to the tables' dtype before the addition, as in Transformers.
//
// Legend: H query heads, K kv heads, T tokens, D head dim, E value dim, R rotary dim, C table columns (R or R / 2), B
// keys per block.
#pragma once
#include "cuda/fp8.h"
#include "cuda/kernels.h"
#include "cuda/vector.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {
namespace {

// One kind of heads. Head h of token t is written at h * to_head + (t * to_token, or the offset of the token's slot).
struct Heads {
  const void* from;
  void* to;
  int64_t num_heads, dim, head, token, to_head, to_token, to_block;
  const float* scale;  // an fp8 cache stores the numbers divided by it; absent: 1
};

struct RopeArgs {
  Heads q, k, v;  // num_heads 0: absent
  const void *cos, *sin;
  const int64_t *rows, *slots;
  int64_t num_tokens, table_stride, rotary_dim, columns, block_size;
  int layout;
};

template <int kCount, class T, class To>
FL_DEVICE void store_scaled(To* to, const float (&x)[kCount], const float* scale) {
  if constexpr (sizeof(To) == 1) {
    float y[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) y[k] = scale ? div_rn(x[k], *scale) : x[k];
    store(to, y);
  } else {
    store(to, x);
  }
}

// Processes vector `at` of a head: first the pairs, then the features beyond the rotary dim.
template <class T, class Table, class To, int kVector>
FL_DEVICE void rotate(const RopeArgs& a, const T* from, To* to, int64_t row, int64_t at, int64_t dim,
                      const float* scale) {
  const int64_t half = a.rotary_dim / 2;
  const bool reads_pairs = a.layout != kRopeHalf, writes_pairs = a.layout == kRopeInterleaved;
  if (at * kVector >= half) {
    const int64_t c = a.rotary_dim + at * kVector - half;
    float x[kVector];
    if (c >= dim) return;
    load(x, from + c);
    store_scaled<kVector, T>(to + c, x, scale);
    return;
  }
  // Pair j is read from two features and written to low and high.
  const int64_t j = at * kVector, low = writes_pairs ? 2 * j : j, high = writes_pairs ? 2 * j + 1 : j + half;
  const bool is_halved = a.columns != a.rotary_dim;
  const Table* cos = static_cast<const Table*>(a.cos) + row * a.table_stride;
  const Table* sin = static_cast<const Table*>(a.sin) + row * a.table_stride;
  float x[kVector], y[kVector], c0[kVector], s0[kVector], c1[kVector], s1[kVector];
  load(x, from + (reads_pairs ? 2 * j : j));
  load(y, from + (reads_pairs ? 2 * j + 1 : j + half));
  load(c0, cos + (is_halved ? j : low));
  load(s0, sin + (is_halved ? j : low));
  load(c1, cos + (is_halved ? j : high));
  load(s1, sin + (is_halved ? j : high));
  float turned_x[kVector], turned_y[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    turned_x[k] = rounded<T>(add_rn(rounded<Table>(mul_rn(x[k], c0[k])), -rounded<Table>(mul_rn(y[k], s0[k]))));
    turned_y[k] = rounded<T>(add_rn(rounded<Table>(mul_rn(y[k], c1[k])), rounded<Table>(mul_rn(x[k], s1[k]))));
  }
  store_scaled<kVector, T>(to + low, turned_x, scale);
  store_scaled<kVector, T>(to + high, turned_y, scale);
}

// Vectors of a token: those of q's pairs and further features, of k's, and of v.
inline int64_t num_vectors(const RopeArgs& a, int64_t vector) {
  const int64_t pairs = a.rotary_dim / 2;
  return (a.q.num_heads * (a.q.dim - pairs) + a.k.num_heads * (a.k.dim - pairs) + a.v.num_heads * a.v.dim) / vector;
}

// Processes vector `at` of a token.
template <class T, class Table, class Cache, int kVector>
FL_DEVICE void rope_vector(const RopeArgs& a, int64_t token, int64_t at) {
  const int64_t pairs = a.rotary_dim / 2;
  const auto vectors = [&](const Heads& heads) { return (heads.dim - pairs) / kVector; };
  const int64_t q_vectors = a.q.num_heads * vectors(a.q), k_vectors = a.k.num_heads * vectors(a.k);
  if (at < q_vectors) {
    const int64_t head = at / vectors(a.q);
    rotate<T, Table, T, kVector>(a, static_cast<const T*>(a.q.from) + head * a.q.head + token * a.q.token,
                                 static_cast<T*>(a.q.to) + head * a.q.to_head + token * a.q.to_token, a.rows[token],
                                 at % vectors(a.q), a.q.dim, nullptr);
    return;
  }
  at -= q_vectors;
  if (!a.slots) return;
  const int64_t slot = a.slots[token];
  if (slot < 0) return;
  const int64_t block = slot / a.block_size, offset = slot % a.block_size;
  const auto place = [&](const Heads& heads, int64_t head) {
    return static_cast<Cache*>(heads.to) + block * heads.to_block + head * heads.to_head + offset * heads.to_token;
  };
  if (at < k_vectors) {
    const int64_t head = at / vectors(a.k);
    rotate<T, Table, Cache, kVector>(a, static_cast<const T*>(a.k.from) + head * a.k.head + token * a.k.token,
                                     place(a.k, head), pairs ? a.rows[token] : 0, at % vectors(a.k), a.k.dim,
                                     a.k.scale);
    return;
  }
  at -= k_vectors;
  const int64_t of_head = a.v.dim / kVector, head = at / of_head, c = at % of_head * kVector;
  if (head >= a.v.num_heads) return;
  float x[kVector];
  load(x, static_cast<const T*>(a.v.from) + head * a.v.head + token * a.v.token + c);
  store_scaled<kVector, T>(place(a.v, head) + c, x, a.v.scale);
}

// Whether heads, caches and tables can be read and written in vectors of kVector numbers.
template <class T, class Table, class Cache, int kVector>
bool is_wide(const RopeArgs& a) {
  const int64_t pairs = a.rotary_dim / 2;
  const auto is_wide_of = [&](const Heads& h, int64_t to_size) {
    return !h.num_heads || (is_aligned(kVector * sizeof(T), sizeof(T), {h.from}, h.dim, h.head, h.token) &&
                            is_aligned(kVector * to_size, to_size, {h.to}, h.to_head, h.to_token, h.to_block));
  };
  return (a.layout == kRopeHalf || pairs == 0) && pairs % kVector == 0 && is_wide_of(a.q, sizeof(T)) &&
         is_wide_of(a.k, sizeof(Cache)) && is_wide_of(a.v, sizeof(Cache)) &&
         is_aligned(kVector * sizeof(Table), sizeof(Table), {a.cos, a.sin}, a.table_stride);
}

inline RopeArgs args_of(const RopeCacheCall& c) {
  RopeArgs a{};
  if (c.q) a.q = {c.q, c.q_out, c.num_heads, c.dim, c.q_head, c.q_token, c.out_head, c.out_token, 0, nullptr};
  a.k = {c.k, c.k_cache, c.num_kv_heads, c.dim, c.k_head, c.k_token, c.k_cache_head, c.k_cache_token, c.k_cache_block,
         static_cast<const float*>(c.k_scale)};
  a.v = {c.v, c.v_cache, c.num_kv_heads, c.value_dim, c.v_head, c.v_token, c.v_cache_head, c.v_cache_token,
         c.v_cache_block, static_cast<const float*>(c.v_scale)};
  a.cos = c.cos;
  a.sin = c.sin;
  a.rows = static_cast<const int64_t*>(c.rows);
  a.slots = static_cast<const int64_t*>(c.slots);
  a.num_tokens = c.num_tokens;
  a.table_stride = c.table_stride;
  a.rotary_dim = c.rotary_dim;
  a.columns = c.columns;
  a.block_size = c.block_size;
  a.layout = static_cast<int>(c.layout);
  return a;
}

}  // namespace
}  // namespace fuseline::cuda
