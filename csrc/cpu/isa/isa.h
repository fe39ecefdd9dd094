// Selects which of the compiled instruction sets runs: once at load; tests switch it.
#pragma once
#include <string>
#include <vector>

#include "fuseline/op.h"

namespace fuseline {

// Position in ops.def.
enum OpIndex : int {
#define FL_OP(name, schema, shapes) kOp_##name,
#include "cpu/ops.def"
#undef FL_OP
  kNumOps
};

// Kernels of the current ISA, by OpIndex.
const OpFn* op_table();

std::string cpu_isa();
// The ISAs this machine can run, lowest first.
std::vector<std::string> available_isas();
// Throws std::runtime_error, listing the valid names, if `name` is unknown or this machine cannot run it.
void set_cpu_isa(const std::string& name);
// Selects the best supported ISA, or the one $FUSELINE_CPU_ISA names. The module calls it once at import.
void choose_cpu_isa();

}  // namespace fuseline
