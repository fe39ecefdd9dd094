// Linears of up to 16 rows from sm_90 on: one persistent block a multiprocessor streams its share of the weight rows.
//
// Blocks take passes of 16 kSlabs weight rows in turn, so that all of them read one stretch of memory at a time (many
// distant ones would keep opening other pages of it); what is left for the last turn they share evenly. A pass goes in
// steps of kDepth k. Producer warps copy the weights of each step by bulk copies into a ring of stages in shared memory;
// consumer warps share a step's k and multiply with matrix instructions as in linear.cu, with x in shared memory where
// it fits. The ring is filled, and what follows it prefetched to L2, before the kernels ahead have ended, so that their
// ends and small kernels between two products cost little bandwidth. The next kernels are let in near the end: sooner,
// what they prefetch would have left L2 when they use it. A warp's sums run over k, and those of the warps are added in
// order: a row's bits depend neither on the other rows nor on the number of multiprocessors.
//
// Legend: M rows, N outputs, K inputs; lane = (g = lane / 4, t = lane % 4).
#include "cuda/activate.h"
#include "cuda/kernels.h"

namespace fuseline::cuda {
namespace {

constexpr int kConsumers = 4, kProducers = 4;  // warps; a bulk copy takes a warp some 40 cycles to issue
constexpr int kThreads = (kConsumers + kProducers) * kWarp;
constexpr int kDepth = 512;              // k of a stage
constexpr int kPad = 64;                 // bytes after a row of a stage or of x: lanes of two rows read different banks
constexpr int kPitch = 2 * kDepth + kPad;
constexpr int kUnroll = kDepth / (32 * kConsumers);  // loads of 32 k that a consumer makes of a stage's row
constexpr int kMaxShared = 227 << 10;                // bytes of a block

struct StreamArgs {
  void* out;
  const void *x, *weight, *bias;
  int64_t x_stride, weight_stride;
  int num_rows, num_out, num_in;
  int prefetched;     // steps that are prefetched to L2 behind those in the ring
  int waves;          // blocks a multiprocessor
  int lead;           // steps before its last one at which a block lets the next kernels in
  bool is_x_shared;   // whether x is copied to shared memory
  int act;
};

template <int kSlabs, int kTiles>
struct Shared {
  static constexpr int kStages = kSlabs == 1 ? 5 : 3;
  float sums[kConsumers][kSlabs][kTiles][4][kWarp];
  char stages[kStages][16 * kSlabs * kPitch];
  BulkBarrier full[kStages], empty[kStages], summed, taken, has_x;
  alignas(16) char x[1];  // rows of 2 K + kPad bytes, to the end
};

// A step of a block: the pass and step of k, and its place in the ring.
template <int kStages>
struct Step {
  int pass = 0, depth = 0, stage = 0, parity = 0;
  FL_DEVICE void next(int num_depths) {
    if (++depth == num_depths) depth = 0, ++pass;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The outputs of a block, and how their weight rows follow each other in a stage. Before the last turn, pass p of block
// b takes the outputs from (p gridDim + b) kOutputs on.
template <int kSlabs, bool kIsGated>
struct Share {
  static constexpr int kOutputs = kIsGated ? 8 * kSlabs : 16 * kSlabs;  // of a pass
  int num_whole, first, last;  // whole passes; outputs [first, last) of the last pass, perhaps none

  FL_DEVICE explicit Share(int num_out) {
    const int blocks = gridDim.x, block = blockIdx.x, turn = blocks * kOutputs;
    num_whole = num_out / turn;
    const int left = num_out - num_whole * turn, each = left / blocks, rest = left - each * blocks;
    first = num_whole * turn + block * each + (block < rest ? block : rest);
    last = first + each + (block < rest);
  }
  FL_DEVICE int num_passes() const { return num_whole + (first < last); }
  FL_DEVICE int begin(int pass) const {
    return pass < num_whole ? (pass * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * kOutputs : first;
  }
  FL_DEVICE int end(int pass) const { return pass < num_whole ? begin(pass) + kOutputs : last; }
  // The output whose weights a stage's row holds; of a gated product those of its upper half follow num_out rows later.
  FL_DEVICE int output(int pass, int row) const {
    return begin(pass) + (kIsGated ? row / 16 * 8 + row % 8 : row);
  }
};

template <class T, int kSlabs, int kTiles, bool kIsGated>
FL_DEVICE void store_pass(const StreamArgs& a, const Shared<kSlabs, kTiles>& shared,
                          const Share<kSlabs, kIsGated>& share, int pass) {
  T* out = static_cast<T*>(a.out);
  const T* bias = static_cast<const T*>(a.bias);
  const int end = share.end(pass);
  // Each entry is row 8 i + 2 t + j of the outputs of lane (g, t), lower and upper half.
#pragma unroll 1
  for (int entry = threadIdx.x; entry < kSlabs * kTiles * 2 * kWarp; entry += kConsumers * kWarp) {
    const int of = entry % kWarp, j = entry / kWarp % 2, i = entry / (2 * kWarp) % kTiles;
    const int slab = entry / (2 * kWarp * kTiles);
    const int row = 8 * i + 2 * (of % 4) + j, n = share.output(pass, 16 * slab + of / 4);
    if (row >= a.num_rows || n >= end) continue;
    float lower = 0.0f, upper = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      lower += shared.sums[w][slab][i][j][of];
      upper += shared.sums[w][slab][i][j + 2][of];
    }
    const bool has_upper = kIsGated || n + 8 < end;
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
FL_DEVICE void init_barriers(Shared<kSlabs, kTiles>& shared, int num_rows) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shared<kSlabs, kTiles>::kStages; ++s) {
      init(shared.full[s], 16 * kSlabs);
      init(shared.empty[s], kConsumers);
    }
    init(shared.summed, kConsumers);
    init(shared.taken, kConsumers);
    init(shared.has_x, num_rows);
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
  using At = Step<Shared<kSlabs, kTiles>::kStages>;

  // Calls f(weights, bytes); without bytes where the row has no output.
  template <class F>
  FL_DEVICE void read(const At& step, const F& f) const {
    if (row >= 16 * kSlabs) return;
    const int k = step.depth * kDepth, n = share.output(step.pass, row);
    const int num_bytes = 2 * (a.num_in - k < kDepth ? a.num_in - k : kDepth);
    const int64_t line = n + (kIsGated && row % 16 >= 8 ? a.num_out : 0);
    f(static_cast<const uint16_t*>(a.weight) + line * a.weight_stride + k, n < share.end(step.pass) ? num_bytes : 0);
  }
  FL_DEVICE void copy(const At& step) const {
    read(step, [&](const uint16_t* from, int num_bytes) {
      BulkBarrier& full = shared.full[step.stage];
      arrive_expecting(full, num_bytes);
      if (num_bytes) copy_bulk(shared.stages[step.stage] + row * kPitch, from, num_bytes, full);
    });
  }
  FL_DEVICE void prefetch(const At& step) const {
    read(step, [](const uint16_t* from, int num_bytes) {
      if (num_bytes) prefetch_bulk(from, num_bytes);
    });
  }
};

// By one warp.
template <int kSlabs, int kTiles>
FL_DEVICE void copy_x(const StreamArgs& a, Shared<kSlabs, kTiles>& shared) {
  const int row = threadIdx.x % kWarp, num_bytes = 2 * a.num_in;
  if (row >= a.num_rows) return;
  arrive_expecting(shared.has_x, num_bytes);
  copy_bulk(shared.x + row * (num_bytes + kPad), static_cast<const uint16_t*>(a.x) + row * a.x_stride, num_bytes,
            shared.has_x);
}

// A consumer's 32 kUnroll k of each step, in shared or global memory.
template <int kTiles>
struct Rows {
  const char* rows[kTiles];  // missing ones repeat the first; their results are not written
  int num_in, begin;         // of x, and this thread's first k of a step

  FL_DEVICE Rows(const StreamArgs& a, const char* shared) : num_in(a.num_in) {
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    begin = warp * kUnroll * 32 + 8 * t;
    const char* first = a.is_x_shared ? shared : static_cast<const char*>(a.x);
    const int64_t pitch = a.is_x_shared ? 2 * num_in + kPad : 2 * a.x_stride;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) rows[i] = first + (8 * i + g < a.num_rows ? (8 * i + g) * pitch : 0) + 2 * begin;
  }
  FL_DEVICE bool has(int k, int u) const { return k + 32 * u + begin < num_in; }
  FL_DEVICE void load(uint4 (&to)[kUnroll][kTiles], int k) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        to[u][i] = has(k, u) ? *reinterpret_cast<const uint4*>(rows[i] + 2 * (k + 32 * u)) : uint4{0, 0, 0, 0};
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
  const Rows<kTiles> x(a, shared.x);
  if (a.is_x_shared) wait_for(shared.has_x, 0);
  float sum[kSlabs][kTiles][4] = {};
  uint4 in[kUnroll][kTiles], next[kUnroll][kTiles];
  x.load(next, 0);
  Step<Shared<kSlabs, kTiles>::kStages> at;
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
__global__ void __launch_bounds__(kThreads, 2) stream_rows_kernel(const StreamArgs a) {
  using Memory = Shared<kSlabs, kTiles>;
  Memory& shared = *reinterpret_cast<Memory*>(dynamic_shared());
  init_barriers(shared, a.num_rows);
  const Share<kSlabs, kIsGated> share(a.num_out);
  const int num_depths = (a.num_in + kDepth - 1) / kDepth, num_steps = share.num_passes() * num_depths;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool is_producer = warp >= kConsumers;
  const Reader<kSlabs, kTiles, kIsGated> reader{a, share, shared, lane * kProducers + warp % kProducers};
  Step<Memory::kStages> at;
  int step = 0;
#pragma unroll 1
  for (; step < Memory::kStages; ++step, at.next(num_depths))
    if (is_producer && step < num_steps) reader.copy(at);
  auto ahead = at;
#pragma unroll 1
  for (int k = 0; k < a.prefetched; ++k, ahead.next(num_depths))
    if (!is_producer) reader.prefetch(ahead);
  wait_for_prerequisites();
  if (!is_producer) return consume<T>(a, share, shared, num_depths);
  if (a.is_x_shared && warp == kConsumers) copy_x(a, shared);
#pragma unroll 1
  for (; step < num_steps; ++step, at.next(num_depths)) {
    if (step >= num_steps - a.lead) launch_dependents();
    wait_for(shared.empty[at.stage], at.parity ^ 1);
    reader.copy(at);
  }
  launch_dependents();
}

template <class T, int kSlabs, int kTiles, bool kIsGated>
int launch_tiles(StreamArgs a, Stream stream) {
  const int blocks = num_processors() * a.waves, x_bytes = a.num_rows * (2 * a.num_in + kPad);
  a.is_x_shared = static_cast<int>(sizeof(Shared<kSlabs, kTiles>)) + x_bytes <= kMaxShared;
  const int shared_bytes = static_cast<int>(sizeof(Shared<kSlabs, kTiles>)) + (a.is_x_shared ? x_bytes : 0);
  return launch(stream_rows_kernel<T, kSlabs, kTiles, kIsGated>, dim3(a.num_out < blocks ? a.num_out : blocks), kThreads,
                stream, a, Overlap::kWeights, shared_bytes);
}

template <bool kIsGated, class Call>
int launch_slabs(Stream stream, const Call& c, int act) {
  const auto number = [](int64_t x) { return static_cast<int>(x); };
  const StreamArgs a{c.out,
                     c.x,
                     c.weight.data,
                     c.bias,
                     c.x_stride,
                     c.weight_stride,
                     number(c.num_rows),
                     number(c.num_out),
                     number(c.num_in),
                     number(c.prefetched),
                     number(c.waves),
                     number(c.lead),
                     false,
                     act};
  return with_half(c.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.num_rows > 8)
      return c.slabs == 1 ? launch_tiles<T, 1, 2, kIsGated>(a, stream) : launch_tiles<T, 2, 2, kIsGated>(a, stream);
    return c.slabs == 1 ? launch_tiles<T, 1, 1, kIsGated>(a, stream) : launch_tiles<T, 2, 1, kIsGated>(a, stream);
  });
}

}  // namespace

int stream_linear(Stream stream, const StreamLinearCall& c) { return launch_slabs<false>(stream, c, 0); }

int stream_linear_act_mul(Stream stream, const StreamLinearActMulCall& c) {
  return launch_slabs<true>(stream, c, static_cast<int>(c.act));
}

}  // namespace fuseline::cuda
