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

// Grid: any number of blocks up to N.
template <class T, int kSlabs, int kTiles, bool kIsGated>
__global__ void __launch_bounds__(kThreads, kSlabs == 2 ? 2 : 1) stream_rows_kernel(const StreamArgs a) {
  using Memory = Shared<kSlabs, kTiles>;
  launch_dependents();
  Memory& shared = *reinterpret_cast<Memory*>(dynamic_shared());
  const Share<kSlabs, kIsGated> share(a.num_out);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int num_depths = (a.num_in + kDepth - 1) / kDepth, num_steps = share.num_passes() * num_depths;
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

  const bool is_producer = warp >= kConsumers;
  const int own = lane * kProducers + warp % kProducers;  // the row of a stage that this thread copies
  Step at;
  int begun = 0;
  // Calls f(weights, bytes) for this thread's row of a step; without bytes if there is none.
  const auto of_row = [&](const Step& step, const auto& f) {
    if (own >= 16 * kSlabs) return;
    const int k = step.depth * kDepth, n = share.output(step.pass, own);
    const int num_bytes = 2 * (a.num_in - k < kDepth ? a.num_in - k : kDepth);
    const int64_t row = n + (kIsGated && own % 16 >= 8 ? a.num_out : 0);
    f(static_cast<const uint16_t*>(a.weight) + row * a.weight_stride + k, n < share.last ? num_bytes : 0);
  };
  const auto fetch = [&]() {
    of_row(at, [&](const uint16_t* from, int num_bytes) {
      arrive_expecting(shared.full[at.stage], num_bytes);
      if (num_bytes) copy_bulk(shared.stages[at.stage] + own * kPitch, from, num_bytes, shared.full[at.stage]);
    });
    at.next(num_depths);
    ++begun;
  };
  Step ahead;  // the next one to prefetch
  const auto prefetch_step = [&]() {
    of_row(ahead, [](const uint16_t* from, int num_bytes) {
      if (num_bytes) prefetch_bulk(from, num_bytes);
    });
  };
#pragma unroll 1
  for (int step = 0; step < kStages; ++step) {
    if (is_producer && step < num_steps) fetch();
    ahead.next(num_depths);
  }
#pragma unroll 1
  for (int step = 0; step < a.prefetched; ++step, ahead.next(num_depths))
    if (!is_producer) prefetch_step();
  wait_for_prerequisites();
  if (is_producer) {
#pragma unroll 1
    for (; begun < num_steps; ahead.next(num_depths)) {
      wait_for(shared.empty[at.stage], at.parity ^ 1);
      fetch();
      if (a.is_rolling) prefetch_step();
    }
    return;
  }

  const uint16_t* rows[kTiles];  // missing ones repeat the first; their results are not written
  const int begin = warp * kUnroll * 32 + 8 * t;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    rows[i] = static_cast<const uint16_t*>(a.x) + (8 * i + g < a.num_rows ? (8 * i + g) * a.x_stride : 0) + begin;
  uint4 next[kUnroll][kTiles];
  const auto load_x = [&](int k) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        next[u][i] = k + 32 * u + begin < a.num_in ? *reinterpret_cast<const uint4*>(rows[i] + k + 32 * u)
                                                   : uint4{0, 0, 0, 0};
  };
  float sum[kSlabs][kTiles][4] = {};
  load_x(0);
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    uint4 in[kUnroll][kTiles];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) in[u][i] = next[u][i];
    const int k = at.depth * kDepth;
    load_x(k + kDepth < a.num_in ? k + kDepth : 0);
    wait_for(shared.full[at.stage], at.parity);
    const char* stage = shared.stages[at.stage] + g * kPitch + 2 * begin;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool is_there = k + 32 * u + begin < a.num_in;
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        const uint4* from = reinterpret_cast<const uint4*>(stage + 16 * s * kPitch + 64 * u);
        const uint4 low = is_there ? from[0] : uint4{0, 0, 0, 0};
        const uint4 high = is_there ? from[8 * kPitch / 16] : uint4{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          mma(sum[s][i], {low.x, high.x, low.y, high.y}, {in[u][i].x, in[u][i].y}, T{});
          mma(sum[s][i], {low.z, high.z, low.w, high.w}, {in[u][i].z, in[u][i].w}, T{});
        }
      }
    }
    sync_warp();
    if (lane == 0) arrive(shared.empty[at.stage]);
    const int pass = at.pass;
    at.next(num_depths);
    if (at.pass == pass) continue;
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
