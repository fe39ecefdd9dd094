// ops.def as data, and the argument checks made before any kernel runs.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "fuseline/op.h"

namespace fuseline {

// A size, stride or integer argument: constant + factor * symbols[symbol]; symbol < 0 if it is constant.
struct Dim {
  int64_t constant = 0;
  int64_t factor = 0;
  int32_t symbol = -1;

  int64_t at(const std::vector<int64_t>& symbols) const {
    return symbol < 0 ? constant : constant + factor * symbols[symbol];
  }
  bool operator==(const Dim&) const = default;
};

struct TensorArg {
  std::string name;
  std::string shape;     // sizes from ops.def; empty if unchecked
  bool has_shape = false;
  bool is_output = false;
  bool is_optional = false;
};

struct OpSchema {
  std::string name;
  std::vector<TensorArg> tensors;
  std::vector<std::string> ints;
  std::string int_letters;   // per int: the letter whose size it gives, or a space
  std::vector<std::string> floats;

  // Schema for the torch library: (Tensor(a0!) out, Tensor? weight, int mode, float eps) -> ().
  std::string torch_schema() const;
};

// The schemas of all ops of ops.def, by OpIndex.
const std::vector<OpSchema>& op_schemas();
// OpIndex of the name, or -1.
int find_op(const std::string& name);

// Shape and dtype of a tensor argument; absent ones have is_present == false.
struct ArgShape {
  bool is_present = false;
  DType dtype = DType::f32;
  std::vector<Dim> sizes;
};

// Throws std::invalid_argument, naming op and argument, if sizes or dtypes cannot agree. Sizes with different symbols
// may agree at run time and pass.
void check_args(const OpSchema& op, std::span<const ArgShape> args, std::span<const Dim> ints);

const char* dtype_name(DType dtype);
int64_t dtype_size(DType dtype);
// Throws std::invalid_argument if the name is not a dtype.
DType dtype_from_name(const std::string& name);

}  // namespace fuseline
