// Rotary embedding and the write to the paged KV cache in one launch, by rope.h.
#include "cuda/rope.h"

namespace fuseline::cuda {
namespace {

constexpr int kThreads = 128;

// Grid: (token, vectors of all heads).
template <class T, class Table, class Cache, int kVector>
__global__ void __launch_bounds__(kThreads) rope_kernel(const RopeArgs a) {
  const int64_t at = blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x;
  launch_dependents();
  wait_for_prerequisites();
  rope_vector<T, Table, Cache, kVector>(a, blockIdx.x, at);
}

template <class T, class Table, class Cache>
int launch_rope(const RopeArgs& a, Stream stream) {
  constexpr int64_t kVector = 4;
  const auto grid = [&](int64_t vector) {
    const int64_t vectors = num_vectors(a, vector);
    return dim3(static_cast<unsigned>(a.num_tokens), static_cast<unsigned>((vectors + kThreads - 1) / kThreads));
  };
  if (is_wide<T, Table, Cache, kVector>(a))
    return launch(rope_kernel<T, Table, Cache, kVector>, grid(kVector), kThreads, stream, a);
  return launch(rope_kernel<T, Table, Cache, 1>, grid(1), kThreads, stream, a);
}

int dispatch(const RopeArgs& a, int64_t dtype, int64_t table_dtype, int64_t cache_dtype, Stream stream) {
  return with_float(dtype, [&](auto type) {
    using T = decltype(type);
    const auto with_table = [&](auto table) {
      using Table = decltype(table);
      return with_cache<T>(cache_dtype, dtype, [&](auto cache) {
        return launch_rope<T, Table, decltype(cache)>(a, stream);
      });
    };
    if (table_dtype == dtype) return with_table(T{});
    return table_dtype == static_cast<int64_t>(DType::f32) ? with_table(float{}) : kBadArgument;
  });
}

}  // namespace

int rope(Stream stream, const RopeCall& c) {
  RopeArgs a{};
  a.q = {c.x, c.out, c.num_heads, c.dim, c.x_head, c.x_token, c.out_head, c.out_token, 0, nullptr};
  a.cos = c.cos;
  a.sin = c.sin;
  a.rows = static_cast<const int64_t*>(c.rows);
  a.num_tokens = c.num_tokens;
  a.table_stride = c.table_stride;
  a.rotary_dim = c.rotary_dim;
  a.columns = c.columns;
  a.layout = static_cast<int>(c.layout);
  return dispatch(a, c.dtype, c.table_dtype, c.dtype, stream);
}

int rope_cache(Stream stream, const RopeCacheCall& c) {
  return dispatch(args_of(c), c.dtype, c.table_dtype, c.cache_dtype, stream);
}

}  // namespace fuseline::cuda
