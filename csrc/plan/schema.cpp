#include "plan/schema.h"

#include <array>
#include <map>
#include <sstream>
#include <stdexcept>

namespace fuseline {
namespace {

struct Row {
  const char* name;
  const char* schema;
  const char* shapes;
};

constexpr Row kRows[] = {
#define FL_OP(name, schema, shapes) {#name, schema, shapes},
#include "cpu/ops.def"
#undef FL_OP
};

std::string strip(const std::string& text) {
  const auto begin = text.find_first_not_of(' ');
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);)
    if (!strip(part).empty()) parts.push_back(strip(part));
  return parts;
}

TensorArg parse_tensor(std::string text) {
  TensorArg arg;
  if (text.back() == '!') arg.is_output = true;
  if (text.back() == '?') arg.is_optional = true;
  if (arg.is_output || arg.is_optional) text.pop_back();
  arg.name = text;
  return arg;
}

// "int mode" and "float eps" add a name; "int" alone may not occur.
void parse_number(const std::string& text, OpSchema& op) {
  const auto space = text.find(' ');
  auto& names = text.substr(0, space) == "int" ? op.ints : op.floats;
  names.push_back(text.substr(space + 1));
}

OpSchema parse(const Row& row) {
  OpSchema op;
  op.name = row.name;
  const std::string schema = row.schema;
  const auto tensors_end = schema.find(';');
  for (const auto& text : split(schema.substr(0, tensors_end), ',')) op.tensors.push_back(parse_tensor(text));
  if (tensors_end != std::string::npos) {
    for (const auto& group : split(schema.substr(tensors_end + 1), ';'))
      for (const auto& text : split(group, ',')) parse_number(text, op);
  }
  for (const auto& text : split(row.shapes, ' ')) {
    const auto colon = text.find(':');
    for (auto& arg : op.tensors) {
      if (arg.name != text.substr(0, colon)) continue;
      arg.shape = text.substr(colon + 1);
      arg.has_shape = true;
    }
  }
  return op;
}

[[noreturn]] void fail(const OpSchema& op, const std::string& message) {
  throw std::invalid_argument(op.name + ": " + message);
}

std::string to_text(const Dim& dim) {
  if (dim.symbol < 0) return std::to_string(dim.constant);
  std::string text = std::to_string(dim.factor) + "*s" + std::to_string(dim.symbol);
  return dim.constant ? text + "+" + std::to_string(dim.constant) : text;
}

std::string to_text(const std::vector<Dim>& sizes) {
  std::string text;
  for (const auto& dim : sizes) text += (text.empty() ? "" : ", ") + to_text(dim);
  return "[" + text + "]";
}

bool can_agree(const Dim& a, const Dim& b) {
  if (a.symbol == b.symbol && a.factor == b.factor) return a.constant == b.constant;
  return a.symbol >= 0 || b.symbol >= 0;
}

// What letters stand for so far, and the argument that said so.
struct Bindings {
  std::map<char, std::pair<Dim, std::string>> letters;
  std::vector<Dim> leading;
  std::string leading_from;
};

void bind(const OpSchema& op, const TensorArg& arg, const ArgShape& value, char letter, const Dim& dim, Bindings& known) {
  const bool is_number = letter >= '0' && letter <= '9';
  if (is_number && can_agree(dim, Dim{letter - '0'})) return;
  const auto found = known.letters.find(letter);
  if (!is_number && found == known.letters.end()) {
    known.letters[letter] = {dim, arg.name};
    return;
  }
  if (!is_number && can_agree(dim, found->second.first)) return;
  const std::string expected =
      is_number ? std::string(1, letter) : to_text(found->second.first) + " as in " + found->second.second;
  fail(op, "argument " + arg.name + " of shape " + to_text(value.sizes) + " should be " + arg.shape + " with " + letter +
               " = " + expected);
}

void check_leading(const OpSchema& op, const TensorArg& arg, const ArgShape& value, size_t count, Bindings& known) {
  const std::vector<Dim> leading(value.sizes.begin(), value.sizes.begin() + count);
  if (known.leading_from.empty()) {
    known.leading = leading;
    known.leading_from = arg.name;
    return;
  }
  bool agrees = leading.size() == known.leading.size();
  for (size_t d = 0; agrees && d < count; ++d) agrees = can_agree(leading[d], known.leading[d]);
  if (!agrees)
    fail(op, "leading sizes of argument " + arg.name + " of shape " + to_text(value.sizes) + " should be " +
                 to_text(known.leading) + " as in " + known.leading_from);
}

void check_shape(const OpSchema& op, const TensorArg& arg, const ArgShape& value, Bindings& known) {
  if (!arg.has_shape) return;
  const bool has_star = arg.shape[0] == '*';
  const std::string letters = has_star ? arg.shape.substr(1) : arg.shape;
  const size_t ndim = value.sizes.size();
  if (ndim < letters.size() || (!has_star && ndim != letters.size()))
    fail(op, "argument " + arg.name + " of shape " + to_text(value.sizes) + " should be " + arg.shape);
  const size_t num_leading = ndim - letters.size();
  if (has_star) check_leading(op, arg, value, num_leading, known);
  for (size_t d = 0; d < letters.size(); ++d) bind(op, arg, value, letters[d], value.sizes[num_leading + d], known);
}

// --- dtypes: by default the tensors of an op share one floating dtype; these differ ---

constexpr unsigned bit(DType dtype) { return 1u << static_cast<int>(dtype); }
constexpr unsigned kFloats = bit(DType::f32) | bit(DType::bf16) | bit(DType::f16);
constexpr unsigned kIndices = bit(DType::i64) | bit(DType::i32);
constexpr unsigned kAny = kFloats | kIndices | bit(DType::u8);

struct DTypeRule {
  const char* op;
  const char* arg;
  unsigned allowed;
};

// First match wins; "*" is every op or argument.
constexpr DTypeRule kDTypeRules[] = {
    {"copy", "*", kAny},
    {"unary", "*", kAny},
    {"binary", "*", kAny},
    {"binary_scalar", "*", kAny},
    {"linear", "*", kFloats},
    {"pack_panels", "*", kFloats},
    {"route_topk", "weights", kFloats},
    {"experts", "weights", kFloats},
    {"experts", "gate_up", kFloats},
    {"experts", "down", kFloats},
    {"experts", "gate_up_bias", kFloats},
    {"experts", "down_bias", kFloats},
    {"paged_attention", "out", kFloats},
    {"paged_attention", "q", kFloats},
    {"paged_attention", "sinks", kFloats},
    {"*", "cos", kFloats},
    {"*", "sin", kFloats},
    {"*", "rows", kIndices},
    {"*", "slots", kIndices},
    {"*", "block_table", bit(DType::i32)},
    {"*", "seq_lens", bit(DType::i32)},
    {"*", "query_start", bit(DType::i32)},
    {"route_topk", "ids", bit(DType::i64)},
    {"experts", "ids", bit(DType::i64)},
    {"*", "ids", kIndices},
    {"sample", "ok", bit(DType::u8)},
    {"*", "logprobs", bit(DType::f32)},
    {"*", "top_logprobs", bit(DType::f32)},
    {"sample", "logits", bit(DType::f32)},
    {"row_logprobs", "logits", bit(DType::f32)},
    {"row_logprobs", "*", bit(DType::i64)},
    {"sample", "temperature", bit(DType::f32)},
    {"sample", "top_p", bit(DType::f32)},
    {"sample", "min_p", bit(DType::f32)},
    {"sample", "repetition", bit(DType::f32)},
    {"sample", "frequency", bit(DType::f32)},
    {"sample", "presence", bit(DType::f32)},
    {"sample", "bias_values", bit(DType::f32)},
    {"sample", "bitmask", bit(DType::i32)},
    {"sample", "*", kIndices},
};

unsigned allowed_dtypes(const OpSchema& op, const TensorArg& arg) {
  const auto matches = [](const char* pattern, const std::string& name) { return *pattern == '*' || name == pattern; };
  for (const auto& rule : kDTypeRules)
    if (matches(rule.op, op.name) && matches(rule.arg, arg.name)) return rule.allowed;
  return 0;
}

constexpr std::array<const char*, 6> kDTypeNames = {"f32", "bf16", "f16", "i64", "i32", "u8"};
constexpr std::array<int64_t, 6> kDTypeSizes = {4, 2, 2, 8, 4, 1};

std::string dtype_names(unsigned allowed) {
  std::string text;
  for (size_t k = 0; k < kDTypeNames.size(); ++k)
    if (allowed >> k & 1) text += (text.empty() ? "" : " or ") + std::string(kDTypeNames[k]);
  return text;
}

void check_dtype(const OpSchema& op, const TensorArg& arg, DType dtype, const TensorArg*& first, DType& shared) {
  const unsigned rule = allowed_dtypes(op, arg);
  const unsigned allowed = rule ? rule : kFloats;
  if (!(allowed & bit(dtype)))
    fail(op, "argument " + arg.name + " is " + dtype_name(dtype) + ", should be " + dtype_names(allowed));
  if (rule) return;
  if (first && dtype != shared)
    fail(op, "argument " + arg.name + " is " + dtype_name(dtype) + ", should be " + dtype_name(shared) + " as " +
                 first->name);
  first = &arg;
  shared = dtype;
}

}  // namespace

std::string OpSchema::torch_schema() const {
  std::string text;
  int num_outputs = 0;
  const auto add = [&text](const std::string& arg) { text += (text.empty() ? "" : ", ") + arg; };
  for (const auto& arg : tensors) {
    const std::string alias = arg.is_output ? "(a" + std::to_string(num_outputs++) + "!)" : "";
    add("Tensor" + alias + (arg.is_optional ? "? " : " ") + arg.name);
  }
  for (const auto& arg : ints) add("int " + arg);
  for (const auto& arg : floats) add("float " + arg);
  return name + "(" + text + ") -> ()";
}

const std::vector<OpSchema>& op_schemas() {
  static const std::vector<OpSchema> schemas = [] {
    std::vector<OpSchema> parsed;
    for (const Row& row : kRows) parsed.push_back(parse(row));
    return parsed;
  }();
  return schemas;
}

int find_op(const std::string& name) {
  const auto& schemas = op_schemas();
  for (size_t k = 0; k < schemas.size(); ++k)
    if (schemas[k].name == name) return static_cast<int>(k);
  return -1;
}

void check_args(const OpSchema& op, std::span<const ArgShape> args) {
  Bindings known;
  const TensorArg* first = nullptr;
  DType shared = DType::f32;
  for (size_t k = 0; k < args.size(); ++k) {
    const TensorArg& arg = op.tensors[k];
    if (!args[k].is_present) {
      if (!arg.is_optional) fail(op, "argument " + arg.name + " is absent, but not optional");
      continue;
    }
    check_dtype(op, arg, args[k].dtype, first, shared);
    check_shape(op, arg, args[k], known);
  }
}

const char* dtype_name(DType dtype) { return kDTypeNames[static_cast<size_t>(dtype)]; }

int64_t dtype_size(DType dtype) { return kDTypeSizes[static_cast<size_t>(dtype)]; }

DType dtype_from_name(const std::string& name) {
  for (size_t k = 0; k < kDTypeNames.size(); ++k)
    if (name == kDTypeNames[k]) return static_cast<DType>(k);
  throw std::invalid_argument("unknown dtype '" + name + "'; known: f32, bf16, f16, i64, i32, u8");
}

}  // namespace fuseline
