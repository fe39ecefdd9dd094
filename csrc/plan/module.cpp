// pybind11 bindings of fuseline._C: the execution plan and machine settings. csrc/torch registers the tensor ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa/isa.h"
#include "cpu/pool.h"
#include "plan/plan.h"

namespace py = pybind11;

namespace {

using fuseline::Dim;
using fuseline::Plan;

// int | (factor, symbol) | (constant, factor, symbol)
Dim to_dim(const py::handle& value) {
  if (!py::isinstance<py::tuple>(value)) return {value.cast<int64_t>()};
  const auto parts = value.cast<std::vector<int64_t>>();
  if (parts.size() != 2 && parts.size() != 3)
    throw std::invalid_argument("plan: a size is an int, (factor, symbol) or (constant, factor, symbol)");
  const int64_t constant = parts.size() == 3 ? parts[0] : 0;
  const auto symbol = static_cast<int32_t>(parts.back());
  if (symbol < 0) throw std::invalid_argument("plan: no symbol " + std::to_string(symbol));
  return {constant, parts[parts.size() - 2], symbol};
}

std::vector<Dim> to_dims(const py::sequence& values) {
  std::vector<Dim> dims;
  for (const auto& value : values) dims.push_back(to_dim(value));
  return dims;
}

std::vector<std::string> op_names() {
  std::vector<std::string> names;
  for (const auto& op : fuseline::op_schemas()) names.push_back(op.name);
  return names;
}

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan")
      .def(py::init<>())
      .def("add_symbol", &Plan::add_symbol, py::arg("name"))
      .def("add_slot", &Plan::add_slot, py::arg("name"))
      .def(
          "add_tensor",
          [](Plan& plan, int base, const py::object& offset, const std::string& dtype, const py::sequence& sizes,
             const py::sequence& strides) {
            return plan.add_tensor(base, to_dim(offset), dtype, to_dims(sizes), to_dims(strides));
          },
          py::arg("base"), py::arg("offset"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"))
      .def(
          "add_call",
          [](Plan& plan, const std::string& op, const std::vector<int>& tensors, const py::sequence& ints,
             const std::vector<double>& floats, const std::string& label) {
            plan.add_call(op, tensors, to_dims(ints), floats, label);
          },
          py::arg("op"), py::arg("tensors"), py::arg("ints"), py::arg("floats"), py::arg("label") = "")
      .def("set_slot", &Plan::set_slot, py::arg("slot"), py::arg("pointer"))
      .def("set_arena", &Plan::set_arena, py::arg("pointer"), py::arg("num_bytes"))
      .def("run", &Plan::run, py::arg("symbols"), py::arg("begin") = 0, py::arg("end") = -1,
           py::call_guard<py::gil_scoped_release>())
      .def("profile", &Plan::profile, py::arg("symbols"), py::arg("repeats"), py::call_guard<py::gil_scoped_release>())
      .def("to_text", &Plan::to_text)
      .def_property_readonly("num_calls", &Plan::num_calls);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  try {
    fuseline::choose_cpu_isa();
  } catch (const std::exception& error) {
    throw py::import_error(error.what());
  }
  bind_plan(m);
  m.def("op_names", &op_names);
  m.def("cpu_isa", &fuseline::cpu_isa);
  m.def("available_isas", &fuseline::available_isas);
  m.def("set_cpu_isa", &fuseline::set_cpu_isa, py::arg("name"));
  m.def("num_threads", &fuseline::num_threads);
  m.def("set_num_threads", &fuseline::set_num_threads, py::arg("n"));
}
