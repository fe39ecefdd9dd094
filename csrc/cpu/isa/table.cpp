// Compiled once per ISA: the table of its kernels, in the order of ops.def.
#include "fuseline/op.h"

namespace fuseline::FL_ISA {

#define FL_OP(name, schema, shapes) void name(const Tensor* t, const int64_t* i, const double* f);
#include "cpu/ops.def"
#undef FL_OP

extern const OpFn kTable[];
const OpFn kTable[] = {
#define FL_OP(name, schema, shapes) name,
#include "cpu/ops.def"
#undef FL_OP
};

}  // namespace fuseline::FL_ISA
