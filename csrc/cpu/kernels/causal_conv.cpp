// Causal convolution of each channel over its last W tokens; the last W - 1 inputs are the state of a sequence.
// Weights are summed in their order. Channels are independent: a task has a few vectors of them.
#include "fuseline/codes.h"
#include "sequences.h"

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kBlock = 64;  // channels of a task

struct Conv {
  const Tensor &out, &state, &x, &weight, &bias;
  bool is_silu;

  int64_t width() const { return weight.sizes[1]; }

  template <class T>
  void run(const SequencePart& sequence, int64_t first, int64_t count) const {
    const int64_t before = width() - 1, tokens = sequence.end - sequence.begin;
    // Inputs as fp32: those before this step, then those of the step, `width` rows at a time in a ring.
    float* weights = chunk_floats((2 * width() + 1) * kBlock);
    float *ring = weights + width() * kBlock, *biases = ring + width() * kBlock;
    for (int64_t w = 0; w < width(); ++w)
      read_some(weight, first * weight.strides[0] + w * weight.strides[1], weight.strides[0], count, weights + w * kBlock);
    __builtin_memset(biases, 0, kBlock * 4);
    if (bias.present()) read_some(bias, first * bias.strides[0], bias.strides[0], count, biases);
    for (int64_t j = 0; j < before; ++j) {
      if (sequence.is_first)
        __builtin_memset(ring + j * kBlock, 0, kBlock * 4);
      else
        read_some(state, state_at(sequence, j, first), 1, count, ring + j * kBlock);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t newest = (t + before) % width();
      read_some(x, first * x.strides[1] + (sequence.begin + t) * x.strides[2], x.strides[1], count, ring + newest * kBlock);
      sum<T>(weights, ring, biases, newest, count, sequence.begin + t, first);
    }
    for (int64_t j = 0; j < before; ++j)
      write_some(state, state_at(sequence, j, first), 1, count, ring + (tokens + j) % width() * kBlock);
  }

 private:
  int64_t state_at(const SequencePart& sequence, int64_t j, int64_t first) const {
    return sequence.slot * state.strides[0] + j * state.strides[1] + first;
  }

  // Row (newest + 1 + w) % width of the ring is multiplied with weight w.
  template <class T>
  FL_INLINE void sum(const float* weights, const float* ring, const float* biases, int64_t newest, int64_t count,
                     int64_t token, int64_t first) const {
    alignas(64) float row[kBlock];
    for (int64_t c = 0; c < count; c += kLanes) {
      vf total = load(biases + c);
      for (int64_t w = 0, at = newest + 1; w < width(); ++w, ++at) {
        if (at >= width()) at -= width();
        total = fma(load(weights + w * kBlock + c), load(ring + at * kBlock + c), total);
      }
      total = round_to<T>(total);
      store(row + c, is_silu ? vsilu(total) : total);
    }
    write_some(out, first * out.strides[1] + token * out.strides[2], out.strides[1], count, row);
  }
};

}  // namespace

void causal_conv_slots(const Tensor* t, const int64_t* i, const double*) {
  const Conv conv{t[0], t[1], t[2], t[3], t[4], i[0] == kSilu};
  const int64_t channels = t[2].sizes[1], blocks = (channels + kBlock - 1) / kBlock;
  for_parts({t[5], t[6], t[7]}, t[1], blocks, [&](const SequencePart& sequence, int64_t block) {
    const int64_t first = block * kBlock, count = least(kBlock, channels - first);
    with_float(t[2].dtype, [&](auto type) { conv.run<decltype(type)>(sequence, first, count); });
  });
}

}  // namespace fuseline::FL_ISA
