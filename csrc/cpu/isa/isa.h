// Which of the compiled instruction sets runs. Chosen once at load; tests switch it.
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
// Those that this machine can run, lowest first.
std::vector<std::string> available_isas();
// Throws std::runtime_error with the cure for a name that is unknown or that this machine lacks.
void set_cpu_isa(const std::string& name);
// Best of the machine, or what FUSELINE_CPU_ISA names; the module calls it once at import.
void choose_cpu_isa();

}  // namespace fuseline
