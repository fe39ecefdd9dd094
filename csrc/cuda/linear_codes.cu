// Linears of up to 16 rows whose weights are codes of 4 or 8 bits (compile/ops/code_rows.py): one pass over the codes.
//
// Tiles, the ring of weights and the order of sums are those of linear.cu. A lane copies 16 bytes of codes of two
// outputs, decodes eight inputs at a time in registers, exactly, and multiplies them; the sum of a unit (32 inputs of 4
// bits, 64 of 8 bits: part of one group) is scaled as it is added. Scales and zeros pass through the ring beside their
// codes, copied by any lane of the warp. Codes less a zero are summed as codes, less the zero times the sum of x.
//
// Legend: M rows, N outputs, K inputs; lane = (g = lane / 4, t = lane % 4).
#include "cuda/codes.h"
#include "cuda/kernels.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {
namespace {

constexpr int kStages = 4, kWarps = 8, kOutputs = 16;
constexpr uint32_t kOnes[2] = {0x3f803f80, 0x3c003c00};  // two ones of bf16 and of fp16

struct CodesArgs {
  void* out;
  const void *x, *codes, *scales, *zeros, *table, *bias;
  int64_t x_stride, code_stride, scale_stride;  // of codes in bytes
  int64_t num_rows, num_out, num_in;
  int group_shift, num_groups, scale_dtype;  // 1 << group_shift inputs share a scale; below 0: all of a row
};

// What a warp has under way for one turn of its loop.
struct Stage {
  uint4 codes[2][kWarp];
  uint4 scales[kWarp / 2], zeros[kWarp / 2];
};

FL_DEVICE int size_shift(int dtype) { return dtype == static_cast<int>(DType::f32) ? 2 : 1; }
FL_DEVICE float number_at(const void* from, int64_t index, int dtype) {
  if (dtype == static_cast<int>(DType::f32)) return static_cast<const float*>(from)[index];
  if (dtype == static_cast<int>(DType::bf16)) return to_float(static_cast<const Bf16*>(from)[index]);
  return to_float(static_cast<const Half*>(from)[index]);
}

template <class T, class Kind>
FL_DEVICE Pairs eight_inputs(const uint4& codes, int nth, const Kind& kind) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  if constexpr (Kind::kSpan == 128) return decode(words[nth], kind, T{});
  else return decode(words[2 * nth], words[2 * nth + 1], kind, T{});
}

// Starts the copies of a stage: codes of the lane's outputs, and 16 bytes of scales or zeros.
template <int kSpan>
FL_DEVICE void fetch(Stage& to, const CodesArgs& a, const char* const (&rows)[2], int64_t k, int lane) {
  const bool is_there = k < a.num_in && (kSpan == 128 || k + 16 * (lane % 4) < a.num_in);
#pragma unroll
  for (int h = 0; h < 2; ++h) copy_async(&to.codes[h][lane], rows[h] + (is_there ? k / kSpan * 64 : 0), is_there);
  if (a.group_shift >= 0) {
    const int shift = size_shift(a.scale_dtype), nth = lane % 16;  // 1 << shift copies make the 16 numbers of a group
    const int64_t of_group = (k >> a.group_shift) + (nth >> shift);
    const bool is_ahead = nth >> shift && (nth >> shift) << a.group_shift >= kSpan;  // another stage's
    const char* from = static_cast<const char*>(lane < 16 ? a.scales : a.zeros);
    const bool is_ours = from && k < a.num_in && !is_ahead && of_group < a.num_groups;
    const int64_t at = (of_group * a.scale_stride + static_cast<int64_t>(blockIdx.x) * kOutputs) << shift;
    copy_async(lane < 16 ? &to.scales[nth] : &to.zeros[nth],
               is_ours ? from + at + (nth & ((1 << shift) - 1)) * 16 : static_cast<const char*>(a.codes), is_ours);
  }
  close_group();
}

// Grid: tiles of 16 outputs. kTiles: rows / 8.
template <class T, class Kind, int kTiles>
__global__ void __launch_bounds__(kWarps* kWarp) few_codes_kernel(const CodesArgs a) {
  constexpr int kSpan = Kind::kSpan, kUnits = kSpan == 128 ? 4 : 1, kSteps = kSpan == 128 ? 1 : 2;
  __shared__ Stage ring[kStages][kWarps];
  launch_dependents();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kOutputs;
  // Missing rows repeat the first one; their results are not written.
  const auto code_row = [&](int64_t n) {
    return static_cast<const char*>(a.codes) + (n < a.num_out ? n * a.code_stride : 0) + 16 * t;
  };
  const char* const code_rows[2] = {code_row(base + g), code_row(base + g + 8)};
  const int64_t begin = warp * kSpan, stride = kWarps * kSpan;
#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch<kSpan>(ring[s][warp], a, code_rows, begin + s * stride, lane);
  wait_for_prerequisites();

  Kind kind;
  prepare(kind, static_cast<const float*>(a.table), T{});
  const uint16_t* rows[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    rows[i] = static_cast<const uint16_t*>(a.x) + (8 * i + g < a.num_rows ? (8 * i + g) * a.x_stride : 0);
  float scale[2] = {1.0f, 1.0f}, zero[2] = {};
  if (a.group_shift < 0 && a.zeros) {
#pragma unroll
    for (int h = 0; h < 2; ++h) zero[h] = number_at(a.zeros, base + g + 8 * h, a.scale_dtype);
  }

  float sum[kTiles][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int64_t k = begin; k < a.num_in; k += stride) {
    wait_groups<kStages - 1>();
    sync_warp();
    const Stage& now = ring[stage][warp];
    const uint4 codes[2] = {now.codes[0][lane], now.codes[1][lane]};
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float part[kTiles][4] = {}, total[kTiles][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t at = kSpan == 128 ? k + 32 * u + 8 * t : k + 16 * t + 8 * s;
        const Pairs low = eight_inputs<T>(codes[0], u + s, kind), high = eight_inputs<T>(codes[1], u + s, kind);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint4 in = at < a.num_in ? *reinterpret_cast<const uint4*>(rows[i] + at) : uint4{0, 0, 0, 0};
          mma(part[i], {low.at[0], high.at[0], low.at[1], high.at[1]}, {in.x, in.y}, T{});
          mma(part[i], {low.at[2], high.at[2], low.at[3], high.at[3]}, {in.z, in.w}, T{});
          if (a.zeros) {
            constexpr uint32_t one = kOnes[std::is_same_v<T, Half>];
            mma(total[i], {one, one, one, one}, {in.x, in.y}, T{});
            mma(total[i], {one, one, one, one}, {in.z, in.w}, T{});
          }
        }
      }
      if (a.group_shift >= 0) {
        const int of_group = 32 * u >> a.group_shift;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale[h] = number_at(now.scales, of_group * kOutputs + g + 8 * h, a.scale_dtype);
          if (a.zeros) zero[h] = number_at(now.zeros, of_group * kOutputs + g + 8 * h, a.scale_dtype);
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += (part[i][j] - zero[j / 2] * total[i][j]) * scale[j / 2];
    }
    sync_warp();  // the stage's scales have been read by all lanes
    fetch<kSpan>(ring[stage][warp], a, code_rows, k + kStages * stride, lane);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  wait_groups<0>();
  __syncthreads();
  auto sums = reinterpret_cast<float(*)[kTiles][4][kWarp]>(ring);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][i][j][lane] = sum[i][j];
  __syncthreads();

  // Each entry is row 8 i + 2 t + j % 2 of output g, lower or upper half.
  for (int entry = threadIdx.x; entry < kTiles * 4 * kWarp; entry += kWarps * kWarp) {
    const int of = entry % kWarp, j = entry / kWarp % 4, i = entry / kWarp / 4;
    const int64_t row = 8 * i + 2 * (of % 4) + j % 2, n = base + of / 4 + 8 * (j / 2);
    if (row >= a.num_rows || n >= a.num_out) continue;
    float y = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) y += sums[w][i][j][of];
    if (a.group_shift < 0) y *= number_at(a.scales, n, a.scale_dtype);
    if (a.bias) y += to_float(static_cast<const T*>(a.bias)[n]);
    static_cast<T*>(a.out)[row * a.num_out + n] = cast<T>(y);
  }
}

template <class T, class Kind>
int launch_codes(const CodesArgs& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>((a.num_out + kOutputs - 1) / kOutputs));
  const auto kernel = a.num_rows > 8 ? few_codes_kernel<T, Kind, 2> : few_codes_kernel<T, Kind, 1>;
  return launch(kernel, grid, kWarps * kWarp, stream, a, Overlap::kWeights);
}

}  // namespace

int linear_codes(Stream stream, const LinearCodesCall& c) {
  int group_shift = -1;
  for (int64_t group = c.group; group; group >>= 1) ++group_shift;
  const CodesArgs a{c.out, c.x, c.codes.data, c.scales.data, c.zeros.data, c.table, c.bias, c.x_stride, c.code_stride,
                    c.scale_stride, c.num_rows, c.num_out, c.num_in, group_shift,
                    static_cast<int>(c.num_groups), static_cast<int>(c.scale_dtype)};
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (c.table) return launch_codes<T, Lut4Codes>(a, stream);
    if (c.kind == kCodeInt4) return launch_codes<T, Int4Codes>(a, stream);
    return c.kind == kCodeFp8 ? launch_codes<T, Fp8Codes>(a, stream) : launch_codes<T, Int8Codes>(a, stream);
  });
}

}  // namespace fuseline::cuda
