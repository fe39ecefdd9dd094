// Execution plan: a lowered graph as a flat list of kernel calls over one arena and external slots, run without
// Python.
#pragma once
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan/schema.h"

namespace fuseline {

constexpr int kArenaBase = -1;

class Plan {
 public:
  // Building; reports every error of a graph as std::invalid_argument.
  int add_symbol(const std::string& name);
  int add_slot(const std::string& name);
  // `offset` counts bytes from the base, which is kArenaBase or a slot; strides count elements.
  int add_tensor(int base, Dim offset, const std::string& dtype, std::vector<Dim> sizes, std::vector<Dim> strides);
  // A tensor id of -1 is an absent optional argument.
  void add_call(const std::string& op, const std::vector<int>& tensors, const std::vector<Dim>& ints,
                const std::vector<double>& floats, const std::string& label);

  // Binds pointers. The caller keeps their memory alive and large enough.
  void set_slot(int slot, uintptr_t pointer);
  void set_arena(uintptr_t pointer, int64_t num_bytes);

  // Runs calls [begin, end); end < 0 means all. Throws std::runtime_error before any kernel runs if symbols are
  // missing, a pointer is unset, or a tensor would exceed the arena.
  void run(const std::vector<int64_t>& symbols, int begin = 0, int end = -1);
  // (label, op, nanoseconds) of every call, the median of `repeats` whole runs.
  std::vector<std::tuple<std::string, std::string, int64_t>> profile(const std::vector<int64_t>& symbols, int repeats);

  int num_calls() const { return static_cast<int>(calls_.size()); }
  std::string to_text() const;

 private:
  struct Base {
    explicit Base(std::string base_name) : name(std::move(base_name)) {}
    std::string name;
    uintptr_t pointer = 0;
    bool is_set = false;
    std::vector<size_t> users;  // indices into args_
  };
  struct View {
    int base;
    Dim offset;
    DType dtype;
    std::vector<Dim> sizes, strides;
    bool is_used = false;
  };
  struct Call {
    int op;
    size_t first_arg, first_int, first_float;
    std::vector<int> tensors;
    std::vector<Dim> ints;
    std::string label;
  };
  // An element of args_, offsets_ or ints_ that depends on a symbol. An index, since the vectors grow while building.
  struct Patch {
    enum Kind { kSize, kStride, kInt, kOffset } kind;
    size_t index;
    int dim;
    Dim value;
  };

  Base& base_of(int base) { return bases_[base + 1]; }
  const Base& base_of(int base) const { return bases_[base + 1]; }
  void check_dim(const Dim& dim) const;
  void check_call(const OpSchema& op, const std::vector<int>& tensors, const std::vector<Dim>& ints,
                  size_t num_floats) const;
  void add_arg(int tensor);
  void add_patch(Patch patch);
  int64_t* target(const Patch& patch);
  void apply(const Patch& patch, const std::vector<int64_t>& symbols);
  void set_base(Base& base, uintptr_t pointer);
  void prepare(const std::vector<int64_t>& symbols);
  void check_sizes(const std::vector<int64_t>& symbols) const;
  void check_view(const View& view, const std::vector<int64_t>& symbols) const;
  std::string view_text(const View& view) const;
  std::string dim_text(const Dim& dim) const;

  std::vector<std::string> symbol_names_;
  std::vector<int64_t> symbols_;                // values for which args_ and ints_ are current
  bool has_symbols_ = false;
  std::vector<std::vector<Patch>> patches_;     // by symbol
  std::vector<Base> bases_{Base("arena")};
  int64_t arena_bytes_ = 0;
  std::vector<View> views_;
  std::vector<Call> calls_;
  std::vector<Tensor> args_;
  std::vector<int64_t> offsets_;                // byte offset of each argument from its base
  std::vector<int64_t> ints_;
  std::vector<double> floats_;
};

}  // namespace fuseline
