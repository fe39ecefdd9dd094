// Entry points of the CUDA library. Each launches its kernels on `stream`, a cudaStream_t that may be capturing, and
// does not wait. Pointers are device memory, strides count elements, dtypes are codes of fuseline/op.h (of caches also
// those of fp8.h). The result is 0 or the runtime's error code. compile/kernels/native_cuda.py checks shapes and names
// the arguments.
#pragma once
#include <cstdint>

namespace fuseline::cuda {

// Which kernels may start while the one ahead of them on the stream still runs (programmatic dependent launch): none;
// those that touch no memory before it has ended; also those that read their weights before that.
enum class Overlap : int { kNone, kHeads, kWeights };

struct Stream {
  void* handle;
  Overlap overlap;
};

// Read before the kernel ahead has ended if the overlap is kWeights; nothing on the device may write it by then.
struct Weight { const void* data; };

// out[M, N] = x[M, K] weight[N, K]^T + bias[N], M up to 16, K a multiple of 8; rows of x and weight are aligned to 16
// bytes. Half precision; sums are float32, rounded once.
int linear(Stream stream, void* out, const void* x, Weight weight, const void* bias, int64_t x_stride, int64_t
           weight_stride, int64_t num_rows, int64_t num_out, int64_t num_in, int64_t dtype);

// out[M, I] = act(gate) * up, gate and up the halves of x[M, K] weight[2 I, K]^T + bias[2 I]; num_out is I.
int linear_act_mul(Stream stream, void* out, const void* x, Weight weight, const void* bias, int64_t x_stride,
                   int64_t weight_stride, int64_t num_rows, int64_t num_out, int64_t num_in, int64_t act, int64_t
                   dtype);

// RMSNorm with a mode of codes.h, or LayerNorm with mode -1, of x or, with a residual, of their sum, which is written
// to `total` (strided like `out`). Row r is at r / inner * outer stride + r % inner * inner stride of each tensor.
int norm(Stream stream, void* out, void* total, const void* x, const void* residual, const void* weight, const void*
         bias, int64_t num_rows, int64_t inner, int64_t out_outer, int64_t out_inner, int64_t x_outer, int64_t x_inner,
         int64_t residual_outer, int64_t residual_inner, int64_t dim, double eps, int64_t mode, int64_t dtype);

int act_mul(Stream stream, void* out, const void* gate, const void* up, int64_t num_rows, int64_t dim, int64_t
            out_stride, int64_t gate_stride, int64_t up_stride, int64_t act, int64_t dtype);

// Rotates the first rotary_dim features of x[H, T, D] by rows[T] (int64) of cos and sin.
int rope(Stream stream, void* out, const void* x, const void* cos, const void* sin, const void* rows, int64_t num_heads,
         int64_t num_tokens, int64_t dim, int64_t x_head, int64_t x_token, int64_t out_head, int64_t out_token, int64_t
         table_stride, int64_t rotary_dim, int64_t columns, int64_t layout, int64_t dtype, int64_t table_dtype);

// Writes rotated q to q_out, rotated k and v to slots[T] (int64, -1: none) of the caches [N, K, B, D|E], divided by
// their scales if those are fp8. Without q and with rotary_dim 0 it only writes the caches.
int rope_cache(Stream stream, void* q_out, void* k_cache, void* v_cache, const void* q, const void* k, const void* v,
               const void* cos, const void* sin, const void* rows, const void* slots, const void* k_scale, const void*
               v_scale, int64_t num_heads, int64_t num_kv_heads, int64_t num_tokens, int64_t dim, int64_t value_dim,
               int64_t q_head, int64_t q_token, int64_t k_head, int64_t k_token, int64_t v_head, int64_t v_token,
               int64_t out_head, int64_t out_token, int64_t k_cache_block, int64_t k_cache_head, int64_t k_cache_token,
               int64_t v_cache_block, int64_t v_cache_head, int64_t v_cache_token, int64_t block_size, int64_t
               table_stride, int64_t rotary_dim, int64_t columns, int64_t layout, int64_t dtype, int64_t table_dtype,
               int64_t cache_dtype);

// out[T, H, D] of q[H, T, D] over caches [N, K, B, D], B = 1 << block_shift. If a batch has more tokens than sequences,
// only sequences of one token are computed. A token's keys are cut into at most num_splits splits, shared by
// num_workers blocks. `workspace` holds min(T, num_seqs) * H * num_splits * (D + 2) float32; it may be absent if no
// sequence can have more than 256 keys. window w > 0: a token sees the last w keys, itself included.
int decode_attention(Stream stream, void* out, const void* q, const void* k_cache, const void* v_cache, const void*
                     block_table, const void* seq_lens, const void* query_start, const void* sinks, const void* k_scale,
                     const void* v_scale, void* workspace, int64_t num_tokens, int64_t num_seqs, int64_t num_heads,
                     int64_t num_kv_heads, int64_t dim, int64_t num_splits, int64_t num_workers, int64_t out_token,
                     int64_t out_head, int64_t q_head, int64_t q_token, int64_t k_block, int64_t k_head, int64_t
                     k_token, int64_t v_block, int64_t v_head, int64_t v_token, int64_t table_stride, int64_t
                     block_shift, int64_t window, double scale, double softcap, int64_t dtype, int64_t cache_dtype);

}  // namespace fuseline::cuda
