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

// "int mode" and "float eps" add a name; the name is required.
void parse_number(const std::string& text, OpSchema& op) {
  const auto space = text.find(' ');
  auto& names = text.substr(0, space) == "int" ? op.ints : op.floats;
  names.push_back(text.substr(space + 1));
}

// Parses "x:*K", the shape of a tensor, or "num_out:N", a size given by an int.
void parse_shape(const std::string& text, OpSchema& op) {
  const auto colon = text.find(':');
  const std::string name = text.substr(0, colon), shape = text.substr(colon + 1);
  for (auto& arg : op.tensors) {
    if (arg.name != name) continue;
    arg.shape = shape;
    arg.has_shape = true;
  }
  for (size_t k = 0; k < op.ints.size(); ++k)
    if (op.ints[k] == name) op.int_letters[k] = shape[0];
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
  op.int_letters.assign(op.ints.size(), ' ');
  for (const auto& text : split(row.shapes, ' ')) parse_shape(text, op);
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

// The sizes bound to letters so far, and the argument that bound each.
struct Bindings {
  std::map<char, std::pair<Dim, std::string>> letters;
  std::vector<Dim> leading;
  std::string leading_from;
};

// One size of a shape: its letter, digit or '#', and how the size is derived from it.
struct Term {
  char letter;
  bool is_doubled, is_panels;
};

std::vector<Term> terms_of(const std::string& shape) {
  std::vector<Term> terms;
  Term next{};
  for (char c : shape) {
    if (c == '+') next.is_doubled = true;
    if (c == '/') next.is_panels = true;
    if (c == '+' || c == '/') continue;
    next.letter = c;
    terms.push_back(next);
    next = {};
  }
  return terms;
}

constexpr int64_t kPanelLanes = 16;

// The size a term requires. Panels of a symbolic size get an otherwise unused factor, and so match any size.
Dim size_of(const Term& term, const Bindings& known) {
  if (term.letter == '#') return {kPanelLanes};
  if (term.letter >= '0' && term.letter <= '9') return {term.letter - '0'};
  Dim size = known.letters.at(term.letter).first;
  if (term.is_doubled) size = {2 * size.constant, 2 * size.factor, size.symbol};
  if (!term.is_panels) return size;
  return size.symbol < 0 ? Dim{(size.constant + kPanelLanes - 1) / kPanelLanes} : Dim{0, 0, size.symbol};
}

void bind(const OpSchema& op, const TensorArg& arg, const ArgShape& value, const Term& term, const Dim& dim,
          Bindings& known) {
  const bool is_new = term.letter >= 'A' && term.letter <= 'Z' && !known.letters.count(term.letter);
  if (is_new) known.letters[term.letter] = {dim, arg.name};
  const Dim expected = size_of(term, known);
  if (can_agree(dim, expected)) return;
  std::string text = (term.is_panels ? "/" : "") + std::string(term.is_doubled ? "+" : "") + term.letter;
  text += " = " + to_text(expected);
  const auto from = known.letters.find(term.letter);
  if (from != known.letters.end()) text += " as in " + from->second.second;
  fail(op, "argument " + arg.name + " of shape " + to_text(value.sizes) + " should be " + arg.shape + " with " + text);
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
  const std::vector<Term> terms = terms_of(has_star ? arg.shape.substr(1) : arg.shape);
  const size_t ndim = value.sizes.size();
  if (ndim < terms.size() || (!has_star && ndim != terms.size()))
    fail(op, "argument " + arg.name + " of shape " + to_text(value.sizes) + " should be " + arg.shape);
  const size_t num_leading = ndim - terms.size();
  if (has_star) check_leading(op, arg, value, num_leading, known);
  for (size_t d = 0; d < terms.size(); ++d) bind(op, arg, value, terms[d], value.sizes[num_leading + d], known);
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
    {"embedding_codes", "codes", bit(DType::i32)},
    {"embedding_codes", "ids", kIndices},
    {"embedding_codes", "*", kFloats},
    {"linear_codes", "codes", bit(DType::i32)},
    {"linear_codes", "order", bit(DType::i64)},
    {"linear_codes", "*", kFloats},
    {"linear_codes_int8", "codes", bit(DType::i32)},
    {"linear_codes_int8", "order", bit(DType::i64)},
    {"linear_codes_int8", "*", kFloats},
    {"pack_panels", "*", kFloats},
    {"pack_codes", "panels", bit(DType::i32)},
    {"pack_codes", "codes", bit(DType::u8)},
    {"pack_lanes", "*", bit(DType::u8)},
    {"unpack_codes", "*", bit(DType::u8)},
    {"route_topk", "weights", kFloats},
    {"route_groups", "weights", kFloats},
    {"route_groups", "logits", kFloats},
    {"route_groups", "bias", kFloats},
    {"experts", "weights", kFloats},
    {"experts", "gate_up", kFloats},
    {"experts", "down", kFloats},
    {"experts", "gate_up_bias", kFloats},
    {"experts", "down_bias", kFloats},
    {"expert_linear", "panels", kFloats},
    {"expert_linear", "bias", kFloats},
    {"experts_codes", "gate_up", bit(DType::i32)},
    {"experts_codes", "down", bit(DType::i32)},
    {"experts_codes", "ids", bit(DType::i64)},
    {"experts_codes", "gate_up_order", bit(DType::i64)},
    {"experts_codes", "down_order", bit(DType::i64)},
    {"experts_codes", "weights", kFloats},
    {"experts_codes", "gate_up_scales", kFloats},
    {"experts_codes", "gate_up_zeros", kFloats},
    {"experts_codes", "down_scales", kFloats},
    {"experts_codes", "down_zeros", kFloats},
    {"experts_codes", "gate_up_bias", kFloats},
    {"experts_codes", "down_bias", kFloats},
    {"paged_attention", "out", kFloats},
    {"paged_attention", "q", kFloats},
    {"paged_attention", "sinks", kFloats},
    {"paged_latent_attention", "out", kFloats},
    {"paged_latent_attention", "q", kFloats},
    {"paged_latent_attention", "sinks", kFloats},
    {"paged_attention_codes", "sinks", kFloats},
    {"paged_latent_attention_codes", "sinks", kFloats},
    {"paged_latent_attention_codes", "latent_cache", bit(DType::u8)},
    {"write_latent_codes", "latent_cache", bit(DType::u8)},
    {"rope_latent_codes", "latent_cache", bit(DType::u8)},
    {"*", "slopes", bit(DType::f32)},
    {"*", "relative", bit(DType::f32)},
    {"write_cache_codes", "k_cache", bit(DType::u8)},
    {"write_cache_codes", "v_cache", bit(DType::u8)},
    {"rope_cache_codes", "k_cache", bit(DType::u8)},
    {"rope_cache_codes", "v_cache", bit(DType::u8)},
    {"paged_attention_codes", "k_cache", bit(DType::u8)},
    {"paged_attention_codes", "v_cache", bit(DType::u8)},
    {"*", "k_scale", bit(DType::f32)},
    {"*", "v_scale", bit(DType::f32)},
    {"*", "latent_scale", bit(DType::f32)},
    {"causal_conv_slots", "weight", kFloats},
    {"causal_conv_slots", "bias", kFloats},
    {"gated_delta_slots", "state", bit(DType::f32)},
    {"ssd_scan_slots", "state", bit(DType::f32)},
    {"selective_scan_slots", "state", bit(DType::f32)},
    {"*", "cos", kFloats},
    {"*", "sin", kFloats},
    {"*", "rows", kIndices},
    {"*", "slots", kIndices},
    {"*", "block_table", bit(DType::i32)},
    {"*", "seq_lens", bit(DType::i32)},
    {"*", "query_start", bit(DType::i32)},
    {"route_topk", "ids", bit(DType::i64)},
    {"route_groups", "ids", bit(DType::i64)},
    {"experts", "ids", bit(DType::i64)},
    {"expert_linear", "ids", bit(DType::i64)},
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
    {"gated_delta_slots", "*", kFloats},
    {"ssd_scan_slots", "*", kFloats},
    {"selective_scan_slots", "*", kFloats},
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

void check_args(const OpSchema& op, std::span<const ArgShape> args, std::span<const Dim> ints) {
  Bindings known;
  for (size_t k = 0; k < ints.size(); ++k)
    if (op.int_letters[k] != ' ') known.letters[op.int_letters[k]] = {ints[k], op.ints[k]};
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
