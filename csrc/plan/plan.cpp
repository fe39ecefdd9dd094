#include "plan/plan.h"

#include <algorithm>
#include <chrono>
#include <sstream>
#include <stdexcept>

#include "cpu/isa/isa.h"

namespace fuseline {
namespace {

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument("plan: " + message); }
[[noreturn]] void refuse(const std::string& message) { throw std::runtime_error("plan: " + message); }

std::string plural(size_t n, const char* what) { return std::to_string(n) + " " + what + (n == 1 ? "" : "s"); }

}  // namespace

int Plan::add_symbol(const std::string& name) {
  symbol_names_.push_back(name);
  patches_.emplace_back();
  symbols_.push_back(0);
  has_symbols_ = false;
  return static_cast<int>(symbol_names_.size()) - 1;
}

int Plan::add_slot(const std::string& name) {
  bases_.emplace_back(name);
  return static_cast<int>(bases_.size()) - 2;
}

void Plan::check_dim(const Dim& dim) const {
  if (dim.symbol >= static_cast<int>(symbol_names_.size())) reject("no symbol " + std::to_string(dim.symbol));
}

int Plan::add_tensor(int base, Dim offset, const std::string& dtype, std::vector<Dim> sizes,
                     std::vector<Dim> strides) {
  if (base < kArenaBase || base + 1 >= static_cast<int>(bases_.size())) reject("no slot " + std::to_string(base));
  check_dim(offset);
  if (offset.symbol < 0 && offset.constant < 0) reject("negative offset in " + base_of(base).name);
  if (sizes.size() != strides.size()) reject("sizes and strides differ in length");
  if (sizes.size() > kMaxDims) reject("a tensor has at most " + std::to_string(kMaxDims) + " dimensions");
  for (const auto* dims : {&sizes, &strides})
    for (const Dim& dim : *dims) check_dim(dim);
  for (const Dim& dim : sizes)
    if (dim.symbol < 0 && dim.constant < 0) reject("negative size");
  views_.push_back({base, offset, dtype_from_name(dtype), std::move(sizes), std::move(strides)});
  return static_cast<int>(views_.size()) - 1;
}

void Plan::check_call(const OpSchema& op, const std::vector<int>& tensors, const std::vector<Dim>& ints,
                      size_t num_floats) const {
  if (tensors.size() != op.tensors.size() || ints.size() != op.ints.size() || num_floats != op.floats.size())
    reject(op.name + " takes " + plural(op.tensors.size(), "tensor") + ", " + plural(op.ints.size(), "int") + " and " +
           plural(op.floats.size(), "float") + ", got " + std::to_string(tensors.size()) + ", " +
           std::to_string(ints.size()) + " and " + std::to_string(num_floats));
  std::vector<ArgShape> shapes;
  for (int id : tensors) {
    if (id < -1 || id >= static_cast<int>(views_.size())) reject(op.name + ": no tensor " + std::to_string(id));
    shapes.push_back(id < 0 ? ArgShape{} : ArgShape{true, views_[id].dtype, views_[id].sizes});
  }
  check_args(op, shapes, ints);
}

void Plan::add_call(const std::string& name, const std::vector<int>& tensors, const std::vector<Dim>& ints,
                    const std::vector<double>& floats, const std::string& label) {
  const int op = find_op(name);
  if (op < 0) reject("unknown op '" + name + "'");
  for (const Dim& dim : ints) check_dim(dim);
  check_call(op_schemas()[op], tensors, ints, floats.size());
  calls_.push_back({op, args_.size(), ints_.size(), floats_.size(), tensors, ints, label});
  has_symbols_ = false;
  for (int id : tensors) add_arg(id);
  for (const Dim& dim : ints) {
    ints_.push_back(dim.constant);
    add_patch({Patch::kInt, ints_.size() - 1, 0, dim});
  }
  floats_.insert(floats_.end(), floats.begin(), floats.end());
}

void Plan::add_arg(int id) {
  Tensor arg{};
  if (id < 0) {
    arg.ndim = -1;
    args_.push_back(arg);
    offsets_.push_back(0);
    return;
  }
  View& view = views_[id];
  view.is_used = true;
  Base& base = base_of(view.base);
  base.users.push_back(args_.size());
  arg.data = reinterpret_cast<void*>(base.pointer + view.offset.constant);
  arg.dtype = view.dtype;
  arg.ndim = static_cast<int32_t>(view.sizes.size());
  const size_t index = args_.size();
  for (int d = 0; d < arg.ndim; ++d) {
    arg.sizes[d] = view.sizes[d].constant;
    arg.strides[d] = view.strides[d].constant;
    add_patch({Patch::kSize, index, d, view.sizes[d]});
    add_patch({Patch::kStride, index, d, view.strides[d]});
  }
  args_.push_back(arg);
  offsets_.push_back(view.offset.constant);
  add_patch({Patch::kOffset, index, 0, view.offset});
}

void Plan::add_patch(Patch patch) {
  if (patch.value.symbol >= 0) patches_[patch.value.symbol].push_back(patch);
}

int64_t* Plan::target(const Patch& patch) {
  if (patch.kind == Patch::kInt) return &ints_[patch.index];
  if (patch.kind == Patch::kOffset) return &offsets_[patch.index];
  Tensor& arg = args_[patch.index];
  return patch.kind == Patch::kSize ? &arg.sizes[patch.dim] : &arg.strides[patch.dim];
}

void Plan::apply(const Patch& patch, const std::vector<int64_t>& symbols) {
  int64_t* number = target(patch);
  const int64_t before = *number;
  *number = patch.value.at(symbols);
  if (patch.kind != Patch::kOffset) return;
  void*& data = args_[patch.index].data;
  data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) + (*number - before));
}

void Plan::set_base(Base& base, uintptr_t pointer) {
  base.is_set = true;
  if (base.pointer == pointer) return;
  base.pointer = pointer;
  for (size_t index : base.users) args_[index].data = reinterpret_cast<void*>(pointer + offsets_[index]);
}

void Plan::set_slot(int slot, uintptr_t pointer) {
  if (slot < 0 || slot + 1 >= static_cast<int>(bases_.size())) reject("no slot " + std::to_string(slot));
  set_base(base_of(slot), pointer);
}

void Plan::set_arena(uintptr_t pointer, int64_t num_bytes) {
  set_base(base_of(kArenaBase), pointer);
  arena_bytes_ = num_bytes;
  has_symbols_ = false;
}

// An empty view accesses no memory, so its address is not checked.
void Plan::check_view(const View& view, const std::vector<int64_t>& symbols) const {
  int64_t last = 0;
  for (size_t d = 0; d < view.sizes.size(); ++d) {
    const int64_t size = view.sizes[d].at(symbols);
    if (size < 0) refuse("a size of " + view_text(view) + " is negative");
    if (size == 0) return;
    last += (size - 1) * view.strides[d].at(symbols);
  }
  const int64_t offset = view.offset.at(symbols);
  if (offset < 0) refuse("the offset of " + view_text(view) + " is negative");
  const int64_t end = offset + (last + 1) * dtype_size(view.dtype);
  if (view.base == kArenaBase && end > arena_bytes_)
    refuse(view_text(view) + " ends at byte " + std::to_string(end) + " of an arena of " +
           std::to_string(arena_bytes_));
}

void Plan::check_sizes(const std::vector<int64_t>& symbols) const {
  for (const View& view : views_)
    if (view.is_used) check_view(view, symbols);
}

// Recomputes only what depends on a symbol that changed.
void Plan::prepare(const std::vector<int64_t>& symbols) {
  if (has_symbols_ && symbols == symbols_) return;
  if (symbols.size() != symbol_names_.size())
    refuse(plural(symbol_names_.size(), "symbol") + " needed, got " + std::to_string(symbols.size()));
  check_sizes(symbols);
  for (const Base& base : bases_)
    if (!base.is_set && !base.users.empty()) refuse("no pointer was set for " + base.name);
  for (size_t s = 0; s < symbols.size(); ++s) {
    if (has_symbols_ && symbols[s] == symbols_[s]) continue;
    for (const Patch& patch : patches_[s]) apply(patch, symbols);
  }
  symbols_ = symbols;
  has_symbols_ = true;
}

void Plan::run(const std::vector<int64_t>& symbols, int begin, int end) {
  prepare(symbols);
  end = end < 0 ? num_calls() : end;
  if (begin < 0 || begin > end || end > num_calls())
    refuse("no calls " + std::to_string(begin) + " to " + std::to_string(end));
  const OpFn* table = op_table();
  for (int k = begin; k < end; ++k) {
    const Call& call = calls_[k];
    table[call.op](args_.data() + call.first_arg, ints_.data() + call.first_int, floats_.data() + call.first_float);
  }
}

std::vector<std::tuple<std::string, std::string, int64_t>> Plan::profile(const std::vector<int64_t>& symbols,
                                                                         int repeats) {
  using Clock = std::chrono::steady_clock;
  if (repeats < 1) refuse("profile needs at least one run");
  std::vector<std::vector<int64_t>> times(calls_.size());
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int k = 0; k < num_calls(); ++k) {
      const auto start = Clock::now();
      run(symbols, k, k + 1);
      times[k].push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
    }
  }
  std::vector<std::tuple<std::string, std::string, int64_t>> rows;
  for (size_t k = 0; k < calls_.size(); ++k) {
    std::nth_element(times[k].begin(), times[k].begin() + repeats / 2, times[k].end());
    rows.emplace_back(calls_[k].label, op_schemas()[calls_[k].op].name, times[k][repeats / 2]);
  }
  return rows;
}

std::string Plan::dim_text(const Dim& dim) const {
  if (dim.symbol < 0) return std::to_string(dim.constant);
  const std::string factor = dim.factor == 1 ? "" : std::to_string(dim.factor) + "*";
  const std::string text = factor + symbol_names_[dim.symbol];
  return dim.constant ? text + (dim.constant < 0 ? "" : "+") + std::to_string(dim.constant) : text;
}

std::string Plan::view_text(const View& view) const {
  std::string text = std::string(dtype_name(view.dtype)) + "[";
  for (size_t d = 0; d < view.sizes.size(); ++d) text += (d ? ", " : "") + dim_text(view.sizes[d]);
  text += "]@" + base_of(view.base).name;
  return view.offset == Dim{} ? text : text + "+" + dim_text(view.offset);
}

std::string Plan::to_text() const {
  std::string text;
  for (const Call& call : calls_) {
    const OpSchema& op = op_schemas()[call.op];
    text += op.name + "(";
    const char* comma = "";
    const auto add = [&](const std::string& name, const std::string& value) {
      text += comma + name + "=" + value;
      comma = ", ";
    };
    for (size_t k = 0; k < call.tensors.size(); ++k)
      if (call.tensors[k] >= 0) add(op.tensors[k].name, view_text(views_[call.tensors[k]]));
    for (size_t k = 0; k < op.ints.size(); ++k) add(op.ints[k], dim_text(call.ints[k]));
    for (size_t k = 0; k < op.floats.size(); ++k) {
      std::ostringstream number;
      number << floats_[call.first_float + k];
      add(op.floats[k], number.str());
    }
    text += ")" + (call.label.empty() ? "" : "  # " + call.label) + "\n";
  }
  return text;
}

}  // namespace fuseline
