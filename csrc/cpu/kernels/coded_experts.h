// Experts whose weights are codes: their matrices, and the arguments of experts_codes.
#pragma once
#include "codes_product.h"
#include "experts.h"

namespace fuseline::FL_ISA {
namespace {

struct ExpertCodes {
  const Tensor &codes, &scales, &zeros, &order;   // [E][P][W][16], [E][P][G][16], [E][K]
  int64_t size, num_k, group, kind;               // size: outputs; kind: CodeKind
  DType dtype;                                    // of x
  int64_t num_out() const { return size; }
  CodedWeight matrix(int64_t expert) const {
    return {of_expert(codes, expert), of_expert(scales, expert), of_expert(zeros, expert), num_k, group, counts_up(kind)};
  }
};

// t: out!, x, ids, weights, gate_up, gate_up_scales, gate_up_zeros?, gate_up_order?, down, down_scales, down_zeros?,
// down_order?, gate_up_bias?, down_bias?; i: act (ExpertAct), num_hidden I, then group and kind of gate_up and of down;
// f: alpha, limit.
template <class Weight>
void run_coded(const Tensor* t, const int64_t* i, const double* f) {
  int64_t dim = t[1].sizes[1];
  DType dtype = t[1].dtype;
  run_experts<Weight>({t[0], t[1], t[2], t[3], t[12], t[13],
                       {{t[4], t[5], t[6], t[7], 2 * i[1], dim, i[2], i[3], dtype}},
                       {{t[8], t[9], t[10], t[11], dim, i[1], i[4], i[5], dtype}},
                       t[4].sizes[0], i[0], i[1], static_cast<float>(f[0]), static_cast<float>(f[1])});
}

}  // namespace
}  // namespace fuseline::FL_ISA
