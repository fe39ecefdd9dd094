// Rotary position embedding, and the write of keys and values to the paged KV cache, separately or fused.
// Legend: H heads, K kv heads, T tokens, D key size, E value size, R rotary dim (first R of D), C table columns.
#include "cpu/rows.h"
#include "fuseline/codes.h"
#include "cache_codes.h"

namespace fuseline::FL_ISA {
namespace {

struct Rotation {
  const Tensor *cos, *sin, *rows;
  int64_t rotary_dim, layout;
};

// round(round(x * cos) + round(y * sin)), y with its sign: three roundings, as eager 16-bit code has.
template <class T>
FL_INLINE vf rotate(vf x, vf c, vf y, vf s) { return round_to<T>(x * c) + round_to<T>(y * s); }

// Numbers 2j and 2j + 1 for the first n <= kLanes j from x on.
template <class T>
FL_INLINE void load_pairs(const T* x, int64_t n, vf& even, vf& odd) {
  T tail[2 * kLanes] = {};
  if (n < kLanes) {
    for (int64_t k = 0; k < 2 * n; ++k) tail[k] = x[k];
    x = tail;
  }
  vi places;
  for (int k = 0; k < kLanes; ++k) places[k] = 2 * k;
  const vf a = load(x), b = load(x + kLanes);
  even = __builtin_shuffle(a, b, places);
  odd = __builtin_shuffle(a, b, places + 1);
}

// Rotates pairs (j, j + R/2), or with IS_SPLIT pairs (2j, 2j + 1) that are written there. Tables of R columns hold both
// halves; those of R/2 columns serve both.
template <bool IS_SPLIT, class T, class C>
void rotate_half(T* out, const T* x, const C* cos, const C* sin, int64_t half, int64_t second) {
  for_columns(half, [&](int64_t c, int64_t n) {
    vf low, high;
    if constexpr (IS_SPLIT)
      load_pairs(x + 2 * c, n, low, high);
    else
      low = load_some(x + c, n), high = load_some(x + half + c, n);
    const vf cos_low = round_to<T>(load_some(cos + c, n)), sin_low = round_to<T>(load_some(sin + c, n));
    const vf cos_high = round_to<T>(load_some(cos + second + c, n));
    const vf sin_high = round_to<T>(load_some(sin + second + c, n));
    store_some(out + c, rotate<T>(low, cos_low, -high, sin_low), n);
    store_some(out + half + c, rotate<T>(high, cos_high, low, sin_high), n);
  });
}

// `n` numbers of a line of a table for the features from c on; one of half the columns has one number for a pair.
template <class C>
FL_INLINE vf load_for_pairs(const C* line, int64_t c, int64_t n, bool is_full) {
  if (is_full) return load_some(line + c, n);
  vi places;
  for (int k = 0; k < kLanes; ++k) places[k] = k / 2;
  return __builtin_shuffle(load_n(line + c / 2, n / 2), places);
}

// Rotates pairs (2j, 2j + 1). In tables of R columns, columns 2j and 2j + 1 belong to pair j.
template <class T, class C>
void rotate_pairs(T* out, const T* x, const C* cos, const C* sin, int64_t rotary_dim, bool is_full) {
  vi partner;
  vu sign;
  for (int k = 0; k < kLanes; ++k) partner[k] = k ^ 1, sign[k] = k % 2 ? 0 : 0x80000000u;
  for_columns(rotary_dim, [&](int64_t c, int64_t n) {
    const vf own = load_some(x + c, n), other = (vf)((vu)__builtin_shuffle(own, partner) ^ sign);
    const vf by_cos = round_to<T>(load_for_pairs(cos, c, n, is_full));
    const vf by_sin = round_to<T>(load_for_pairs(sin, c, n, is_full));
    store_some(out + c, rotate<T>(own, by_cos, other, by_sin), n);
  });
}

// Rotates one head of one token. `out` may be `x` but for kRopeSplit.
template <class T>
void rotate_head(T* out, const T* x, int64_t width, const Rotation& by, int64_t token) {
  const int64_t row = index_at(*by.rows, token), half = by.rotary_dim / 2, columns = last_size(*by.cos);
  with_float(by.cos->dtype, [&](auto type) {
    using C = decltype(type);
    const C* cos = static_cast<const C*>(by.cos->data) + row * by.cos->strides[0];
    const C* sin = static_cast<const C*>(by.sin->data) + row * by.sin->strides[0];
    const bool is_full = columns >= by.rotary_dim;
    if (by.layout == kRopeInterleaved)
      rotate_pairs(out, x, cos, sin, by.rotary_dim, is_full);
    else if (by.layout == kRopeSplit)
      rotate_half<true>(out, x, cos, sin, half, is_full ? half : 0);
    else
      rotate_half<false>(out, x, cos, sin, half, is_full ? half : 0);
  });
  if (out != x) __builtin_memcpy(out + by.rotary_dim, x + by.rotary_dim, (width - by.rotary_dim) * sizeof(T));
}

template <class T>
FL_INLINE T* head_row(const Tensor& t, int64_t head, int64_t token) {
  return static_cast<T*>(t.data) + head * t.strides[1] + token * t.strides[2];
}

// Returns the block of head `head` in a cache [N, K, B, D]; keys.h gives the layout of keys.
template <class T>
FL_INLINE T* cache_block(const Tensor& cache, int64_t slot, int64_t head) {
  return static_cast<T*>(cache.data) + slot / cache.sizes[2] * cache.strides[0] + head * cache.strides[1];
}

template <class T>
FL_INLINE T* value_row(const Tensor& cache, int64_t slot, int64_t head) {
  return cache_block<T>(cache, slot, head) + slot % cache.sizes[2] * cache.strides[2];
}

// Slot -1, or one beyond the cache, writes nothing.
bool has_slot(const Tensor& cache, int64_t slot) { return slot >= 0 && slot < cache.sizes[0] * cache.sizes[2]; }

template <class T>
void rotate_token(const Tensor& out, const Tensor& x, const Rotation& by, int64_t token) {
  for (int64_t h = 0; h < x.sizes[1]; ++h)
    rotate_head(head_row<T>(out, h, token), head_row<T>(x, h, token), x.sizes[3], by, token);
}

template <class T>
void store_key(const Tensor& cache, const T* key, int64_t slot, int64_t head) {
  write_key(cache_block<T>(cache, slot, head), cache.sizes[2], cache.sizes[3], slot % cache.sizes[2], key);
}

template <class T>
void store_values(const Tensor& cache, const Tensor& v, int64_t slot, int64_t token) {
  for (int64_t h = 0; h < v.sizes[1]; ++h)
    __builtin_memcpy(value_row<T>(cache, slot, h), head_row<T>(v, h, token), v.sizes[3] * sizeof(T));
}

// A cache of codes, and what numbers are divided by where tokens have no scales of their own.
struct CodedCache {
  const Tensor& cache;
  int64_t code;
  float scale;
  int64_t row_bytes() const { return cache.sizes[3]; }
  int64_t num_codes() const { return row_bytes() - scale_bytes(code); }
};

CodedCache coded_cache(const Tensor& cache, const Tensor& scale, int64_t code) {
  return {cache, code, scale.present() ? float_at(scale, 0) : 1.0f};
}

// `codes` has room for a row.
template <class T>
void store_coded_key(const CodedCache& c, const T* key, int64_t slot, int64_t head, uint8_t* codes) {
  uint8_t* block = cache_block<uint8_t>(c.cache, slot, head);
  float scale = encode_row(c.code, key, c.num_codes(), c.scale, codes);
  if (scale_bytes(c.code)) __builtin_memcpy(codes + c.num_codes(), &scale, sizeof scale);
  for (int64_t w = 0; w < c.row_bytes() / 4; ++w)
    __builtin_memcpy(block + key_word(c.cache.sizes[2], c.row_bytes(), slot % c.cache.sizes[2], w), codes + 4 * w, 4);
}

template <class T>
void store_coded_row(const CodedCache& c, const T* x, int64_t slot, int64_t head) {
  uint8_t* row = value_row<uint8_t>(c.cache, slot, head);
  float scale = encode_row(c.code, x, c.num_codes(), c.scale, row);
  if (scale_bytes(c.code)) __builtin_memcpy(row + c.num_codes(), &scale, sizeof scale);
}

template <class T>
void store_coded_values(const CodedCache& c, const Tensor& v, int64_t slot, int64_t token) {
  for (int64_t h = 0; h < v.sizes[1]; ++h) store_coded_row(c, head_row<T>(v, h, token), slot, h);
}

// What rope_latent puts side by side: a head's first numbers, and those that are rotated.
struct Joined {
  const Tensor &first, &turned;
  int64_t width() const { return first.sizes[3] + turned.sizes[3]; }
};

template <class T>
void join_head(T* out, const Joined& x, const Rotation& by, int64_t head, int64_t token) {
  const int64_t num = x.first.sizes[3];
  __builtin_memcpy(out, head_row<T>(x.first, head, token), num * sizeof(T));
  rotate_head(out + num, head_row<T>(x.turned, head, token), x.turned.sizes[3], by, token);
}

// Calls body(T{}, token) for each token of x.
template <class F>
void for_tokens(const Tensor& x, const F& body) {
  with_float(x.dtype, [&](auto type) {
    parallel_ranges(x.sizes[2], row_grain(x.sizes[1] * x.sizes[3]), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) body(type, token);
    });
  });
}

// Writes the queries of rope_latent, and calls store(T{}, k, by, slot, head, token) for the keys of tokens with a slot.
template <class Store>
void join_heads(const Tensor* t, const int64_t* i, const Store& store) {
  const Tensor &q_out = t[0], &cache = t[1];
  const Joined q{t[2], t[3]}, k{t[4], t[5]};
  const Rotation by{&t[6], &t[7], &t[8], i[0], i[1]};
  for_tokens(q_out, [&](auto type, int64_t token) {
    using T = decltype(type);
    for (int64_t h = 0; h < q_out.sizes[1]; ++h) join_head(head_row<T>(q_out, h, token), q, by, h, token);
    const int64_t slot = index_at(t[9], token);
    if (!has_slot(cache, slot)) return;
    for (int64_t h = 0; h < cache.sizes[1]; ++h) store(type, k, by, slot, h, token);
  });
}

}  // namespace

void rope(const Tensor* t, const int64_t* i, const double*) {
  const Rotation by{&t[2], &t[3], &t[4], i[0], i[1]};
  for_tokens(t[1], [&](auto type, int64_t token) { rotate_token<decltype(type)>(t[0], t[1], by, token); });
}

void write_cache(const Tensor* t, const int64_t*, const double*) {
  for_tokens(t[2], [&](auto type, int64_t token) {
    using T = decltype(type);
    const int64_t slot = index_at(t[4], token);
    if (!has_slot(t[0], slot)) return;
    for (int64_t h = 0; h < t[2].sizes[1]; ++h) store_key(t[0], head_row<T>(t[2], h, token), slot, h);
    store_values<T>(t[1], t[3], slot, token);
  });
}

// t: latent_cache!, k, slots: keys lie as rows, as values do.
void write_latent(const Tensor* t, const int64_t*, const double*) {
  for_tokens(t[1], [&](auto type, int64_t token) {
    const int64_t slot = index_at(t[2], token);
    if (has_slot(t[0], slot)) store_values<decltype(type)>(t[0], t[1], slot, token);
  });
}

// t: latent_cache!, k, slots, latent_scale?; i: code (CacheCode).
void write_latent_codes(const Tensor* t, const int64_t* i, const double*) {
  const CodedCache keys = coded_cache(t[0], t[3], i[0]);
  for_tokens(t[1], [&](auto type, int64_t token) {
    const int64_t slot = index_at(t[2], token);
    if (has_slot(t[0], slot)) store_coded_values<decltype(type)>(keys, t[1], slot, token);
  });
}

// t: q_out!, latent_cache!, q_nope, q_pe, latent, k_pe, cos, sin, rows, slots; i: rotary_dim, layout.
void rope_latent(const Tensor* t, const int64_t* i, const double*) {
  join_heads(t, i, [&]<class T>(T, const Joined& k, const Rotation& by, int64_t slot, int64_t head, int64_t token) {
    join_head(value_row<T>(t[1], slot, head), k, by, head, token);
  });
}

// The same to a cache of codes: t: then latent_scale?; i: then code (CacheCode).
void rope_latent_codes(const Tensor* t, const int64_t* i, const double*) {
  const CodedCache keys = coded_cache(t[1], t[10], i[2]);
  join_heads(t, i, [&]<class T>(T, const Joined& k, const Rotation& by, int64_t slot, int64_t head, int64_t token) {
    T* row = static_cast<T*>(scratch(Scratch::kChunk, k.width() * sizeof(T)));
    join_head(row, k, by, head, token);
    store_coded_row(keys, row, slot, head);
  });
}

// t: k_cache!, v_cache!, k, v, slots, k_scale?, v_scale?; i: code (CacheCode).
void write_cache_codes(const Tensor* t, const int64_t* i, const double*) {
  const CodedCache keys = coded_cache(t[0], t[5], i[0]), values = coded_cache(t[1], t[6], i[0]);
  for_tokens(t[2], [&](auto type, int64_t token) {
    using T = decltype(type);
    const int64_t slot = index_at(t[4], token);
    if (!has_slot(t[0], slot)) return;
    auto* codes = static_cast<uint8_t*>(scratch(Scratch::kChunk, keys.row_bytes()));
    for (int64_t h = 0; h < t[2].sizes[1]; ++h) store_coded_key(keys, head_row<T>(t[2], h, token), slot, h, codes);
    store_coded_values<T>(values, t[3], slot, token);
  });
}

// t: q_out!, k_cache!, v_cache!, q, k, v, cos, sin, rows, slots, k_scale?, v_scale?; i: rotary_dim, layout, code.
void rope_cache_codes(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &q_out = t[0], &q = t[3], &k = t[4], &v = t[5], &slots = t[9];
  const CodedCache keys = coded_cache(t[1], t[10], i[2]), values = coded_cache(t[2], t[11], i[2]);
  const Rotation by{&t[6], &t[7], &t[8], i[0], i[1]};
  for_tokens(q, [&](auto type, int64_t token) {
    using T = decltype(type);
    rotate_token<T>(q_out, q, by, token);
    const int64_t slot = index_at(slots, token);
    if (!has_slot(t[1], slot)) return;
    T* rotated = static_cast<T*>(scratch(Scratch::kChunk, k.sizes[3] * sizeof(T) + keys.row_bytes()));
    auto* codes = reinterpret_cast<uint8_t*>(rotated + k.sizes[3]);
    for (int64_t h = 0; h < k.sizes[1]; ++h) {
      rotate_head(rotated, head_row<T>(k, h, token), k.sizes[3], by, token);
      store_coded_key(keys, rotated, slot, h, codes);
    }
    store_coded_values<T>(values, v, slot, token);
  });
}

void rope_cache(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &q_out = t[0], &k_cache = t[1], &v_cache = t[2], &q = t[3], &k = t[4], &v = t[5], &slots = t[9];
  const Rotation by{&t[6], &t[7], &t[8], i[0], i[1]};
  for_tokens(q, [&](auto type, int64_t token) {
    using T = decltype(type);
    rotate_token<T>(q_out, q, by, token);
    const int64_t slot = index_at(slots, token);
    if (!has_slot(k_cache, slot)) return;
    T* rotated = static_cast<T*>(scratch(Scratch::kChunk, k.sizes[3] * sizeof(T)));
    for (int64_t h = 0; h < k.sizes[1]; ++h) {
      rotate_head(rotated, head_row<T>(k, h, token), k.sizes[3], by, token);
      store_key(k_cache, rotated, slot, h);
    }
    store_values<T>(v_cache, v, slot, token);
  });
}

}  // namespace fuseline::FL_ISA
