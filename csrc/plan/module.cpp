// The pybind11 face of fuseline._C. Tensor ops are registered with torch in csrc/torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa/isa.h"
#include "cpu/pool.h"

namespace py = pybind11;

namespace {

constexpr const char* kOpNames[] = {
#define FL_OP(name, schema, shapes) #name,
#include "cpu/ops.def"
#undef FL_OP
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  try {
    fuseline::choose_cpu_isa();
  } catch (const std::exception& error) {
    throw py::import_error(error.what());
  }
  m.def("op_names", [] {
    std::vector<std::string> names;
    for (int op = 0; op < fuseline::kNumOps; ++op)
      if (fuseline::op_table()[op]) names.emplace_back(kOpNames[op]);
    return names;
  });
  m.def("cpu_isa", &fuseline::cpu_isa);
  m.def("available_isas", &fuseline::available_isas);
  m.def("set_cpu_isa", &fuseline::set_cpu_isa);
  m.def("num_threads", &fuseline::num_threads);
  m.def("set_num_threads", &fuseline::set_num_threads);
}
