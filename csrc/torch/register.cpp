// Registers every op of ops.def as torch.ops.fuseline_cpu.<name>, through libtorch's stable ABI (2.11 and later).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <utility>

#include "cpu/isa/isa.h"
#include "plan/schema.h"

namespace fuseline {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::detail::to;
using TorchTensor = torch::stable::Tensor;

DType to_dtype(const OpSchema& op, const TensorArg& arg, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Long: return DType::i64;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
    case ScalarType::Bool: return DType::u8;
    default: throw std::invalid_argument(op.name + ": argument " + arg.name + " has a dtype no kernel takes");
  }
}

Tensor to_view(const OpSchema& op, const TensorArg& arg, const std::optional<TorchTensor>& tensor) {
  Tensor view{};
  view.ndim = -1;
  if (!tensor) return view;
  if (!tensor->is_cpu()) throw std::invalid_argument(op.name + ": argument " + arg.name + " is not on the CPU");
  if (tensor->dim() > kMaxDims)
    throw std::invalid_argument(op.name + ": argument " + arg.name + " has more than " + std::to_string(kMaxDims) +
                                " dimensions");
  view.data = arg.is_output ? tensor->mutable_data_ptr() : const_cast<void*>(tensor->const_data_ptr());
  view.dtype = to_dtype(op, arg, tensor->scalar_type());
  view.ndim = static_cast<int32_t>(tensor->dim());
  for (int d = 0; d < view.ndim; ++d) {
    view.sizes[d] = tensor->size(d);
    view.strides[d] = tensor->stride(d);
  }
  return view;
}

ArgShape to_shape(const Tensor& view) {
  ArgShape shape;
  shape.is_present = view.present();
  shape.dtype = view.dtype;
  for (int d = 0; d < view.ndim; ++d) shape.sizes.push_back({view.sizes[d]});
  return shape;
}

void call(int index, StableIValue* stack) {
  const OpSchema& op = op_schemas()[index];
  std::vector<std::optional<TorchTensor>> owners;  // takes ownership of every argument before anything can throw
  for (const TensorArg& arg : op.tensors) {
    if (arg.is_optional)
      owners.push_back(to<std::optional<TorchTensor>>(*stack++));
    else
      owners.emplace_back(to<TorchTensor>(*stack++));
  }
  std::vector<int64_t> ints;
  std::vector<double> floats;
  for (size_t k = 0; k < op.ints.size(); ++k) ints.push_back(to<int64_t>(*stack++));
  for (size_t k = 0; k < op.floats.size(); ++k) floats.push_back(to<double>(*stack++));

  std::vector<Tensor> views;
  std::vector<ArgShape> shapes;
  for (size_t k = 0; k < op.tensors.size(); ++k) {
    views.push_back(to_view(op, op.tensors[k], owners[k]));
    shapes.push_back(to_shape(views.back()));
  }
  check_args(op, shapes, std::vector<Dim>(ints.begin(), ints.end()));
  op_table()[index](views.data(), ints.data(), floats.data());
}

// Boxed dispatcher functions carry no context, so each op has its own.
template <int kIndex>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  call(kIndex, stack);
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

template <int... kIndex>
void register_all(torch::stable::detail::StableLibrary& library, std::integer_sequence<int, kIndex...>) {
  const Boxed functions[] = {boxed<kIndex>...};
  for (int k = 0; k < kNumOps; ++k) library.impl(op_schemas()[k].name.c_str(), functions[k]);
}

STABLE_TORCH_LIBRARY(fuseline_cpu, library) {
  for (const OpSchema& op : op_schemas()) library.def(op.torch_schema().c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fuseline_cpu, CPU, library) {
  register_all(library, std::make_integer_sequence<int, kNumOps>());
}

}  // namespace
}  // namespace fuseline
