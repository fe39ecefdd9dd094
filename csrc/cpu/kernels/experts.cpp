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

}  // namespace

// t: out!, x, ids, weights, gate_up [E][panels][D][16], down [E][panels][I][16], gate_up_bias? [E, 2 I],
// down_bias? [E, D]; i: act (ExpertAct), num_hidden I; f: alpha, limit. Ids outside [0, E) add nothing.
void experts(const Tensor* t, const int64_t* i, const double* f) {
  run_experts<PanelExperts>({t[0], t[1], t[2], t[3], t[6], t[7], {t[4], 2 * i[1]}, {t[5], t[1].sizes[1]}, t[4].sizes[0],
                             i[0], i[1], static_cast<float>(f[0]), static_cast<float>(f[1])});
}

}  // namespace fuseline::FL_ISA
