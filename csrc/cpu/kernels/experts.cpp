// Experts whose weights are panels of floats.
#include "experts.h"

namespace fuseline::FL_ISA {
namespace {

struct PanelExperts {
  const Tensor& panels;   // [E][P][K][16]
  int64_t size;           // outputs
  int64_t num_out() const { return size; }
  int64_t num_k() const { return panels.sizes[2]; }
  int64_t packed_floats(int64_t rows) const { return packed_size(rows, num_k()); }
  int64_t spare_floats() const { return 0; }
  int64_t wide_floats(int64_t) const { return kWideSize; }
  template <class T>
  void pack(int64_t, const T* row, float*, float* packed, int64_t num_rows, int64_t r) const {
    pack_row(row, num_k(), packed, num_rows, r);
  }
  void multiply(const Item& item, const float* packed, int64_t num_rows, int64_t panel, int num_panels, float* wide,
                float* c, int64_t ldc) const {
    with_float(panels.dtype, [&](auto t) {
      auto* first = static_cast<decltype(t)*>(panels.data) + item.expert * panels.strides[0] + panel * num_k() * kPanel;
      product(packed + item.row * kPackedRow, packed_step(num_rows), item.num_rows, num_k(), first, num_panels, wide, c,
              ldc);
    });
  }
};

// The rows of the first product in the order of their pairs.
void write_pairs(const Experts<PanelExperts>& job, const Block& b) {
  const int64_t num_out = job.gate_up.num_out();
  with_float(job.out.dtype, [&](auto t) {
    using T = decltype(t);
    parallel(b.num_tokens * job.top_k(), [&](int64_t pair) {
      T* to = static_cast<T*>(job.out.data) + (b.token * job.top_k() + pair) * num_out;
      const int64_t row = b.row_of[pair];
      if (row >= 0) return convert_row(b.gate_up + row * num_out, num_out, to);
      for (int64_t n = 0; n < num_out; ++n) to[n] = T{};
    });
  });
}

}  // namespace

// t: out! [T][K][N], x, ids, panels [E][panels][D][16], bias? [E, N]; i: num_out N.
void expert_linear(const Tensor* t, const int64_t* i, const double*) {
  PanelExperts weight{t[3], i[0]};
  Experts<PanelExperts> job{t[0], t[1], t[2], t[2], t[4], t[4], weight, weight, t[3].sizes[0], 0, (i[0] + 1) / 2, 0, 0};
  for_sorted_blocks(job, [&](const Block& b) {
    gather_rows(job, b);
    project<PanelExperts>(job, {job.gate_up, job.gate_up_bias, b.x, b.gate_up}, b);
    write_pairs(job, b);
  });
}

// t: out!, x, ids, weights, gate_up [E][panels][D][16], down [E][panels][I][16], gate_up_bias? [E, 2 I],
// down_bias? [E, D]; i: act (ExpertAct), num_hidden I; f: alpha, limit. Ids outside [0, E) add nothing.
void experts(const Tensor* t, const int64_t* i, const double* f) {
  run_experts<PanelExperts>({t[0], t[1], t[2], t[3], t[6], t[7], {t[4], 2 * i[1]}, {t[5], t[1].sizes[1]}, t[4].sizes[0],
                             i[0], i[1], static_cast<float>(f[0]), static_cast<float>(f[1])});
}

}  // namespace fuseline::FL_ISA
