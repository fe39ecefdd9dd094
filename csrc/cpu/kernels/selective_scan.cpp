// Mamba's state space: a state of N numbers a channel, each with a decay of its own.
//
//   state = exp(dt * a) * state + b * (dt * x);   out = round(c . state) + d * x
//
// Tokens are computed one by one in their order, states summed in theirs. Channels are independent: a task has a panel of
// 16, whose state is [N][16].
#include "sequences.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int kVectors = kPanelColumns / kLanes;

// Numbers of a panel's channels, in scratch.
struct Panel {
  float *decay, *b, *c;  // a [N][16]; b, c [N]
  alignas(64) float x[kPanelColumns] = {}, dt[kPanelColumns] = {}, skip[kPanelColumns] = {}, out[kPanelColumns];
};

struct Scan {
  const Tensor &out, &x, &dt, &a, &b, &c, &d;

  void run(const SequencePart& sequence, int64_t first, float* state) const {
    const int64_t num_states = a.sizes[1], count = least(kPanelColumns, x.sizes[1] - first);
    Panel panel;
    panel.decay = chunk_floats(num_states * (kPanelColumns + 2));
    panel.b = panel.decay + num_states * kPanelColumns;
    panel.c = panel.b + num_states;
    __builtin_memset(panel.decay, 0, num_states * kPanelColumns * 4);
    for (int64_t n = 0; n < num_states; ++n)
      read_some(a, first * a.strides[0] + n * a.strides[1], a.strides[0], count, panel.decay + n * kPanelColumns);
    if (d.present()) read_some(d, first * d.strides[0], d.strides[0], count, panel.skip);
    for (int64_t t = sequence.begin; t < sequence.end; ++t) {
      read_token(panel, t, first, count);
      with_float(x.dtype, [&](auto type) { step<decltype(type)>(panel, state); });
      write_some(out, t * out.strides[2] + first * out.strides[1], out.strides[1], count, panel.out);
    }
  }

 private:
  FL_INLINE void read_token(Panel& panel, int64_t t, int64_t first, int64_t count) const {
    read_some(x, t * x.strides[2] + first * x.strides[1], x.strides[1], count, panel.x);
    read_some(dt, t * dt.strides[2] + first * dt.strides[1], dt.strides[1], count, panel.dt);
    read_some(b, t * b.strides[2], b.strides[1], a.sizes[1], panel.b);
    read_some(c, t * c.strides[2], c.strides[1], a.sizes[1], panel.c);
  }

  template <class T>
  FL_INLINE void step(Panel& panel, float* state) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = v * kLanes;
      const vf x = load(panel.x + at), dt = load(panel.dt + at), added = x * dt;
      vf sum = zero();
      for (int64_t n = 0; n < a.sizes[1]; ++n) {
        float* own = state + n * kPanelColumns + at;
        const vf decay = vexp(load(panel.decay + n * kPanelColumns + at) * dt);
        const vf now = fma(set1(panel.b[n]), added, load(own) * decay);
        store(own, now);
        sum = fma(now, set1(panel.c[n]), sum);
      }
      store(panel.out + at, fma(load(panel.skip + at), x, round_to<T>(sum)));
    }
  }
};

}  // namespace

void selective_scan_slots(const Tensor* t, const int64_t*, const double*) {
  const Tensor& state = t[1];
  const Scan scan{t[0], t[2], t[3], t[4], t[5], t[6], t[7]};
  for_parts({t[8], t[9], t[10]}, state, state.sizes[1], [&](const SequencePart& sequence, int64_t panel) {
    float* own = static_cast<float*>(state.data) + sequence.slot * state.strides[0] + panel * state.strides[1];
    if (sequence.is_first) __builtin_memset(own, 0, state.sizes[2] * kPanelColumns * 4);
    scan.run(sequence, panel * kPanelColumns, own);
  });
}

}  // namespace fuseline::FL_ISA
