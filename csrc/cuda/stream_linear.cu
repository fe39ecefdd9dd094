// Linears of up to 16 rows from sm_90 on: one persistent block a multiprocessor streams its share of the weight rows.
//
// A block owns a range of outputs, which it takes in passes of 16 kSlabs weight rows, and a pass in steps of kDepth k.
// Producer warps copy the weights of each step by bulk copies into a ring of stages in shared memory; consumer warps
// share a step's k and multiply with matrix instructions as in linear.cu. The ring is filled, and what follows it
// prefetched to L2, before the kernels ahead have ended, so that their ends and small kernels between two products cost
// no bandwidth; blocks of two launches fit a multiprocessor if kSlabs is 2. A warp's sums run over k, and those of the
// warps are added in order: a row's bits depend neither on the other rows nor on the number of multiprocessors.
//
// Legend: M rows, N outputs, K inputs; lane = (g = lane / 4, t = lane % 4).
#include "cuda/activate.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kConsumers = 4, kProducers = 4;  // warps; a bulk copy takes a warp some 40 cycles to issue
constexpr int kThreads = (kConsumers + kProducers) * kWarp;
constexpr int kStages = 5;               // of the ring
constexpr int kDepth = 256;              // k of a stage
constexpr int kPitch = 2 * kDepth + 64;  // bytes from a stage's row to the next: lanes of two rows read different banks
constexpr int kUnroll = kDepth / (32 * kConsumers);  // loads of 32 k that a consumer makes of a stage's row

struct StreamArgs {
  void* out;
  const void *x, *weight, *bias;
  int64_t x_stride, weight_stride;
  int num_rows, num_out, num_in;
  int prefetched;   // steps that are prefetched to L2 behind those in the ring
  bool is_rolling;  // keeps so many prefetched to the end, not only at the start
  int act;
};

template <int kSlabs, int kTiles>
struct Shared {
  float sums[kConsumers][kSlabs][kTiles][4][kWarp];
  char stages[kStages][16 * kSlabs * kPitch];
  BulkBarrier full[kStages], empty[kStages], summed, taken;
};

// A step of a block: the pass and step of k, and its place in the ring.
struct Step {
  int pass = 0, depth = 0, stage = 0, parity = 0;
  FL_DEVICE void next(int num_depths) {
    if (++depth == num_depths) depth = 0, ++pass;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Outputs [first, last) of a block, and how their weight rows follow each other in a stage.
template <int kSlabs, bool kIsGated>
struct Share {
  static constexpr int kOutputs = kIsGated ? 8 * kSlabs : 16 * kSlabs;  // of a pass
  int first, last;
  FL_DEVICE explicit Share(int num_out) {
    const int block = blockIdx.x, whole = num_out / static_cast<int>(gridDim.x);
    const int rest = num_out - whole * static_cast<int>(gridDim.x);
    first = block * whole + (block < rest ? block : rest);
    last = first + whole + (block < rest);
  }
  FL_DEVICE int num_passes() const { return (last - first + kOutputs - 1) / kOutputs; }
  // The output whose weights a stage's row holds; of a gated product those of its upper half follow num_out rows later.
  FL_DEVICE int output(int pass, int row) const {
    return first + pass * kOutputs + (kIsGated ? row / 16 * 8 + row % 8 : row);
  }
};

template <class T, int kSlabs, int kTiles, bool kIsGated>
FL_DEVICE void store_pass(const StreamArgs& a, const Shared<kSlabs, kTiles>& shared,
                          const Share<kSlabs, kIsGated>& share, int pass) {
  T* out = static_cast<T*>(a.out);
  const T* bias = static_cast<const T*>(a.bias);
  // Each entry is row 8 i + 2 t + j of the outputs of lane (g, t), lower and upper half.
#pragma unroll 1
  for (int entry = threadIdx.x; entry < kSlabs * kTiles * 2 * kWarp; entry += kConsumers * kWarp) {
    const int of = entry % kWarp, j = entry / kWarp % 2, i = entry / (2 * kWarp) % kTiles;
    const int slab = entry / (2 * kWarp * kTiles);
    const int row = 8 * i + 2 * (of % 4) + j, n = share.output(pass, 16 * slab + of / 4);
    if (row >= a.num_rows || n >= share.last) continue;
    float lower = 0.0f, upper = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      lower += shared.sums[w][slab][i][j][of];
      upper += shared.sums[w][slab][i][j + 2][of];
    }
    const bool has_upper = kIsGated || n + 8 < share.last;
    const int upper_n = n + (kIsGated ? a.num_out : 8);
    if (bias) lower += to_float(bias[n]);
    if (bias && has_upper) upper += to_float(bias[upper_n]);
    if (kIsGated) lower = rounded<T>(activate(rounded<T>(lower), a.act)) * rounded<T>(upper);
    T* to = out + int64_t{row} * a.num_out;
    to[n] = cast<T>(lower);
    if (!kIsGated && has_upper) to[upper_n] = cast<T>(upper);
  }
}

template <int kSlabs, int kTiles>
FL_DEVICE void init_barriers(Shared<kSlabs, kTiles>& shared) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init(shared.full[s], 16 * kSlabs);
      init(shared.empty[s], kConsumers);
    }
    init(shared.summed, kConsumers);
    init(shared.taken, kConsumers);
    show_barriers();
  }
  __syncthreads();
}

// Reads one row of the stages, that of this thread; of its warp only the first 4 kSlabs threads have one.
template <int kSlabs, int kTiles, bool kIsGated>
struct Reader {
  const StreamArgs& a;
  const Share<kSlabs, kIsGated>& share;
  Shared<kSlabs, kTiles>& shared;
  int row;

  // Calls f(weights, bytes); without bytes where the row has no output.
  template <class F>
  FL_DEVICE void read(const Step& step, const F& f) const {
    if (row >= 16 * kSlabs) return;
    const int k = step.depth * kDepth, n = share.output(step.pass, row);
    const int num_bytes = 2 * (a.num_in - k < kDepth ? a.num_in - k : kDepth);
    const int64_t line = n + (kIsGated && row % 16 >= 8 ? a.num_out : 0);
    f(static_cast<const uint16_t*>(a.weight) + line * a.weight_stride + k, n < share.last ? num_bytes : 0);
  }
  FL_DEVICE void copy(const Step& step) const {
    read(step, [&](const uint16_t* from, int num_bytes) {
      BulkBarrier& full = shared.full[step.stage];
      arrive_expecting(full, num_bytes);
      if (num_bytes) copy_bulk(shared.stages[step.stage] + row * kPitch, from, num_bytes, full);
    });
  }
  FL_DEVICE void prefetch(const Step& step) const {
    read(step, [](const uint16_t* from, int num_bytes) {
      if (num_bytes) prefetch_bulk(from, num_bytes);
    });
  }
};

// A consumer's 32 kUnroll k of each step.
template <int kTiles>
struct Rows {
  const uint16_t* rows[kTiles];  // missing ones repeat the first; their results are not written
  int num_in, begin;             // of x, and this thread's first k of a step

  FL_DEVICE explicit Rows(const StreamArgs& a) : num_in(a.num_in) {
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    begin = warp * kUnroll * 32 + 8 * t;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      rows[i] = static_cast<const uint16_t*>(a.x) + (8 * i + g < a.num_rows ? (8 * i + g) * a.x_stride : 0);
  }
  FL_DEVICE bool has(int k, int u) const { return k + 32 * u + begin < num_in; }
  FL_DEVICE void load(uint4 (&to)[kUnroll][kTiles], int k) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        to[u][i] = has(k, u) ? *reinterpret_cast<const uint4*>(rows[i] + k + 32 * u + begin) : uint4{0, 0, 0, 0};
  }
};

// Adds a stage's products with x, `in`, at its step of k; `stage` is this thread's first number there.
template <class T, int kSlabs, int kTiles>
FL_DEVICE void multiply(float (&sum)[kSlabs][kTiles][4], const char* stage, const uint4 (&in)[kUnroll][kTiles],
                        const Rows<kTiles>& x, int k) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u)
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const uint4* from = reinterpret_cast<const uint4*>(stage + 16 * s * kPitch + 64 * u);
      const uint4 low = x.has(k, u) ? from[0] : uint4{0, 0, 0, 0};
      const uint4 high = x.has(k, u) ? from[8 * kPitch / 16] : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma(sum[s][i], {low.x, high.x, low.y, high.y}, {in[u][i].x, in[u][i].y}, T{});
        mma(sum[s][i], {low.z, high.z, low.w, high.w}, {in[u][i].z, in[u][i].w}, T{});
      }
    }
}

// Ends a pass: adds the consumers' sums, which become zero, and stores the outputs.
template <class T, int kSlabs, int kTiles, bool kIsGated>
FL_DEVICE void end_pass(const StreamArgs& a, const Share<kSlabs, kIsGated>& share, Shared<kSlabs, kTiles>& shared,
                        int pass, float (&sum)[kSlabs][kTiles][4]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  wait_for(shared.taken, pass % 2 ^ 1);
#pragma unroll
  for (int s = 0; s < kSlabs; ++s)
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        shared.sums[warp][s][i][j][lane] = sum[s][i][j];
        sum[s][i][j] = 0.0f;
      }
  sync_warp();
  if (lane == 0) arrive(shared.summed);
  wait_for(shared.summed, pass % 2);
  store_pass<T>(a, shared, share, pass);
  sync_warp();
  if (lane == 0) arrive(shared.taken);
}

// x of the next step is on its way while a step is multiplied.
template <class T, int kSlabs, int kTiles, bool kIsGated>
FL_DEVICE void consume(const StreamArgs& a, const Share<kSlabs, kIsGated>& share, Shared<kSlabs, kTiles>& shared,
                       int num_depths) {
  const int lane = threadIdx.x % kWarp, num_steps = share.num_passes() * num_depths;
  const Rows<kTiles> x(a);
  float sum[kSlabs][kTiles][4] = {};
  uint4 in[kUnroll][kTiles], next[kUnroll][kTiles];
  x.load(next, 0);
  Step at;
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) in[u][i] = next[u][i];
    const int k = at.depth * kDepth, pass = at.pass;
    x.load(next, k + kDepth < a.num_in ? k + kDepth : 0);
    wait_for(shared.full[at.stage], at.parity);
    multiply<T>(sum, shared.stages[at.stage] + lane / 4 * kPitch + 2 * x.begin, in, x, k);
    sync_warp();
    if (lane == 0) arrive(shared.empty[at.stage]);
    at.next(num_depths);
    if (at.pass != pass) end_pass<T>(a, share, shared, pass, sum);
  }
}

// Grid: any number of blocks up to N.
template <class T, int kSlabs, int kTiles, bool kIsGated>
__global__ void __launch_bounds__(kThreads, kSlabs == 2 ? 2 : 1) stream_rows_kernel(const StreamArgs a) {
  launch_dependents();
  auto& shared = *reinterpret_cast<Shared<kSlabs, kTiles>*>(dynamic_shared());
  init_barriers(shared);
  const Share<kSlabs, kIsGated> share(a.num_out);
  const int num_depths = (a.num_in + kDepth - 1) / kDepth, num_steps = share.num_passes() * num_depths;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool is_producer = warp >= kConsumers;
  const Reader<kSlabs, kTiles, kIsGated> reader{a, share, shared, lane * kProducers + warp % kProducers};
  Step at, ahead;
  int step = 0;
#pragma unroll 1
  for (; step < kStages; ++step, at.next(num_depths))
    if (is_producer && step < num_steps) reader.copy(at);
  ahead = at;
#pragma unroll 1
  for (int k = 0; k < a.prefetched; ++k, ahead.next(num_depths))
    if (!is_producer) reader.prefetch(ahead);
  wait_for_prerequisites();
  if (!is_producer) return consume<T>(a, share, shared, num_depths);
#pragma unroll 1
  for (; step < num_steps; ++step, at.next(num_depths), ahead.next(num_depths)) {
    wait_for(shared.empty[at.stage], at.parity ^ 1);
    reader.copy(at);
    if (a.is_rolling) reader.prefetch(ahead);
  }
}

template <class T, int kSlabs, bool kIsGated>
int launch_tiles(const StreamArgs& a, Stream stream) {
  const int processors = num_processors();
  const dim3 grid(a.num_out < processors ? a.num_out : processors);
  const auto run = [&](auto kernel, size_t shared_bytes) {
    return launch(kernel, grid, kThreads, stream, a, Overlap::kWeights, static_cast<int>(shared_bytes));
  };
  return a.num_rows > 8 ? run(stream_rows_kernel<T, kSlabs, 2, kIsGated>, sizeof(Shared<kSlabs, 2>))
                        : run(stream_rows_kernel<T, kSlabs, 1, kIsGated>, sizeof(Shared<kSlabs, 1>));
}

template <bool kIsGated, class Call>
int launch_slabs(Stream stream, const Call& c, int act) {
  const StreamArgs a{c.out,
                     c.x,
                     c.weight.data,
                     c.bias,
                     c.x_stride,
                     c.weight_stride,
                     static_cast<int>(c.num_rows),
                     static_cast<int>(c.num_out),
                     static_cast<int>(c.num_in),
                     static_cast<int>(c.prefetched),
                     c.is_rolling != 0,
                     act};
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    return c.slabs == 2 ? launch_tiles<T, 2, kIsGated>(a, stream) : launch_tiles<T, 4, kIsGated>(a, stream);
  });
}

}  // namespace

int stream_linear(Stream stream, const StreamLinearCall& c) { return launch_slabs<false>(stream, c, 0); }

int stream_linear_act_mul(Stream stream, const StreamLinearActMulCall& c) {
  return launch_slabs<true>(stream, c, static_cast<int>(c.act));
}

}  // namespace fuseline::cuda
