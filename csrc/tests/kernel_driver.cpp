// Runs all kernels on exactly sized heap memory for every instruction set, so that a sanitizer sees any stray access.
// tests/test_native_*.py compare values with torch; here only memory accesses and arithmetic are checked.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa/isa.h"
#include "cpu/pool.h"
#include "fuseline/codes.h"
#include "plan/schema.h"

using namespace fuseline;

namespace {

struct Owned {
  std::unique_ptr<char[]> memory;
  Tensor view{};
};

std::mt19937& random_bits() {
  static std::mt19937 generator(1);
  return generator;
}

// Contiguous. Floats get the bits of small numbers, integers get values below `limit`.
Owned make(DType dtype, std::vector<int64_t> sizes, int64_t limit = 1) {
  Owned owned;
  owned.view.dtype = dtype;
  owned.view.ndim = static_cast<int32_t>(sizes.size());
  int64_t count = 1;
  for (int d = owned.view.ndim - 1; d >= 0; --d) {
    owned.view.sizes[d] = sizes[d];
    owned.view.strides[d] = count;
    count *= sizes[d];
  }
  const int64_t size = dtype_size(dtype);
  owned.memory = std::make_unique<char[]>(count * size);
  owned.view.data = owned.memory.get();
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t bits = random_bits()();
    const float value = static_cast<float>(bits % 2001) / 1000.0f - 1.0f;
    const int64_t integer = bits % limit;
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint16_t upper = static_cast<uint16_t>(wide >> 16), half = static_cast<uint16_t>(0x3000 + bits % 0xc00);
    const void* from = &value;
    if (dtype == DType::bf16) from = &upper;
    if (dtype == DType::f16) from = &half;
    const int32_t narrow = static_cast<int32_t>(integer);
    const uint8_t byte = static_cast<uint8_t>(integer);
    if (dtype == DType::i64) from = &integer;
    if (dtype == DType::i32) from = &narrow;
    if (dtype == DType::u8) from = &byte;
    std::memcpy(owned.memory.get() + k * size, from, size);
  }
  return owned;
}

Owned absent() {
  Owned owned;
  owned.view.ndim = -1;
  return owned;
}

void call(const char* name, std::vector<Owned> args, std::vector<int64_t> ints = {}, std::vector<double> floats = {}) {
  const int op = find_op(name);
  std::vector<Tensor> views;
  std::vector<ArgShape> shapes;
  for (const Owned& arg : args) {
    views.push_back(arg.view);
    ArgShape shape{arg.view.present(), arg.view.dtype, {}};
    for (int d = 0; d < arg.view.ndim; ++d) shape.sizes.push_back({arg.view.sizes[d]});
    shapes.push_back(shape);
  }
  check_args(op_schemas()[op], shapes, std::vector<Dim>(ints.begin(), ints.end()));
  op_table()[op](views.data(), ints.data(), floats.data());
}

template <class... Args>
std::vector<Owned> pack(Args&&... args) {
  std::vector<Owned> all;
  (all.push_back(std::move(args)), ...);
  return all;
}

void run_norms(DType d, int64_t rows, int64_t width) {
  const auto x = [&] { return make(d, {rows, width}); };
  const auto w = [&] { return make(d, {width}); };
  for (int64_t mode = 0; mode < 3; ++mode) {
    call("rms_norm", pack(x(), x(), w()), {mode}, {1e-6});
    call("add_rms_norm", pack(x(), x(), x(), x(), w()), {mode}, {1e-6});
  }
  call("rms_norm", pack(x(), x(), absent()), {0}, {1e-6});
  call("layer_norm", pack(x(), x(), w(), w()), {}, {1e-5});
  call("layer_norm", pack(x(), x(), absent(), absent()), {}, {1e-5});
  call("add_layer_norm", pack(x(), x(), x(), x(), w(), absent()), {}, {1e-5});
}

void run_pointwise(DType d, int64_t rows, int64_t width) {
  const auto x = [&] { return make(d, {rows, width}); };
  for (int64_t code = kNeg; code <= kSoftplus; ++code) call("unary", pack(x(), x()), {code}, {1.0, 2.0});
  for (int64_t code = kAdd; code <= kRsub; ++code) {
    call("binary", pack(x(), x(), make(d, {rows, 1})), {code}, {1.0});
    call("binary_scalar", pack(x(), x()), {code}, {2.0});
  }
  const auto counts = [&] { return make(DType::i64, {rows, width}, 9); };
  for (int64_t code = kAdd; code <= kRsub; ++code) call("binary", pack(counts(), counts(), counts()), {code}, {1.0});
  call("copy", pack(make(DType::f32, {rows, width}), x()));
  call("copy", pack(make(DType::i32, {rows, width}), counts()));
  for (int64_t act = kSilu; act <= kRelu; ++act) call("act_mul", pack(x(), x(), x()), {act});
}

void run_rows(DType d, int64_t rows, int64_t width) {
  const auto ids = [&] { return make(DType::i64, {rows}, 40); };  // some exceed the table of 33 rows
  const auto out = [&] { return make(d, {rows, width}); };
  call("embedding", pack(out(), ids(), make(d, {33, width})));
  call("gather_rows", pack(out(), make(d, {33, width}), ids()));
  call("embedding_panels", pack(out(), ids(), make(d, {3, width, 16})), {33});
}

void run_rope(DType d, int64_t tokens, int64_t head_dim) {
  const int64_t rotary = head_dim / 2 * 2;
  const auto rows = [&] { return make(DType::i64, {tokens}, 30); };
  const auto slots = [&] { return make(DType::i64, {tokens}, 24); };
  const auto q = [&] { return make(d, {1, 4, tokens, head_dim}); };
  const auto k = [&] { return make(d, {1, 2, tokens, head_dim}); };
  const int64_t block_size = tokens % 2 ? 4 : 32;
  const auto cache = [&] { return make(d, {24 / block_size + 1, 2, block_size, head_dim}); };
  for (int64_t columns : {rotary, rotary / 2}) {
    const auto table = [&] { return make(d, {30, columns}); };
    for (int64_t layout : {0, 1}) {
      call("rope", pack(q(), q(), table(), table(), rows()), {rotary, layout});
      call("rope_cache", pack(q(), cache(), cache(), q(), k(), k(), table(), table(), rows(), slots()),
           {rotary, layout});
    }
  }
  call("write_cache", pack(cache(), cache(), k(), k(), slots()));
}

constexpr DType kFloatTypes[] = {DType::f32, DType::bf16, DType::f16};

int64_t panels_of(int64_t rows) { return (rows + 15) / 16; }

void run_linear(DType d) {
  for (int64_t num_k : {1, 37, 530})
    for (int64_t num_out : {1, 45, 150}) {
      for (DType from : kFloatTypes)
        for (int64_t offset : {0, 5})
          call("pack_panels", pack(make(d, {panels_of(num_out + offset), num_k, 16}), make(from, {num_out, num_k})),
               {offset});
      for (int64_t rows : {0, 1, 2, 5, 15, 33})
        for (DType other : kFloatTypes) {
          const auto panels = [&] { return make(other, {panels_of(num_out), num_k, 16}); };
          call("linear", pack(make(d, {rows, num_out}), make(d, {rows, num_k}), panels(), make(other, {num_out})),
               {num_out, 0});
          for (int64_t choices : {0x0505050505, 0x0f0f0f0f0f})
            call("linear", pack(make(other, {rows, 1, num_out}), make(d, {rows, 1, num_k}), panels(), absent()),
                 {num_out, choices});
        }
    }
}

int64_t words_of(int64_t num_k, int64_t bits) {
  return bits == 5 ? (num_k + 31) / 32 * 5 : (num_k * bits + 31) / 32;
}

int64_t bits_of(int64_t kind) {
  if (kind == kCodeInt8 || kind == kCodeFp8 || kind == kCodeUint8) return 8;
  return kind == kCodeInt5 || kind == kCodeUint5 ? 5 : 4;
}

// Weights of codes whose inputs fill no word, group or tile.
void run_codes(DType d, DType other) {
  for (int64_t num_k : {1, 75, 300})
    for (int64_t group : {0, 32, 128})
      for (int64_t kind = kCodeInt8; kind <= kCodeUint5; ++kind)
        for (int64_t rows : {0, 1, 15, 40}) {
          const int64_t num_out = 45 + num_k % 2, groups = group ? (num_k + group - 1) / group : 1;
          const int64_t words = words_of(num_k, bits_of(kind));
          const auto codes = [&] { return make(DType::i32, {panels_of(num_out), words, 16}, int64_t{1} << 32); };
          const auto scales = [&] { return make(other, {panels_of(num_out), groups, 16}); };
          const auto zeros = [&] { return rows == 1 ? absent() : scales(); };
          const auto order = [&] { return rows == 15 ? make(DType::i64, {num_k}, num_k) : absent(); };
          call("linear_codes",
               pack(make(d, {rows, num_out}), make(d, {rows, num_k}), codes(), scales(), zeros(), order(), absent()),
               {num_out, group, kind});
          if (kind != kCodeInt8 && kind != kCodeInt4) continue;
          call("linear_codes_int8",
               pack(make(d, {rows, num_out}), make(d, {rows, num_k}), codes(), scales(), zeros(), order(),
                    make(other, {num_out}), rows == 40 ? make(DType::f32, {1}) : absent()),
               {num_out, group, kind});
        }
}

void run_packing() {
  for (int64_t rows : {0, 1, 45})
    for (int64_t bits : {4, 5, 8})
      for (int64_t num_k : {1, 75, 300})
        for (int64_t offset : {0, 5})
          call("pack_codes", pack(make(DType::i32, {panels_of(rows + offset), words_of(num_k, bits), 16}),
                                  make(DType::u8, {rows, num_k})), {offset, bits});
  for (int64_t rows : {1, 45})
    for (int64_t size : {2, 4})
      call("pack_lanes", pack(make(DType::u8, {panels_of(rows + 3), 9, 16 * size}), make(DType::u8, {rows, 9 * size})), {3});
  for (int64_t bits : {1, 2, 4})
    for (int64_t run : {1, 16})
      call("unpack_codes", pack(make(DType::u8, {5, 48 * 8 / bits}), make(DType::u8, {5, 48})), {bits, run});
}

// Sequences whose last `counts` of `lengths` tokens are queries. Blocks are taken from the end of the cache, so that
// the last one ends where the allocation does.
struct Sequences {
  std::vector<int32_t> lengths, counts;

  int32_t num_blocks(int32_t block_size) const {
    int32_t blocks = 0;
    for (int32_t length : lengths) blocks += (length + block_size - 1) / block_size;
    return blocks;
  }
  Owned values(const std::vector<int32_t>& from) const {
    Owned owned = make(DType::i32, {static_cast<int64_t>(from.size())});
    std::memcpy(owned.view.data, from.data(), from.size() * 4);
    return owned;
  }
  Owned lens() const { return values(lengths); }
  Owned starts() const {
    std::vector<int32_t> sums{0};
    for (int32_t count : counts) sums.push_back(sums.back() + count);
    return values(sums);
  }
  // Entries past a sequence's blocks are far outside the cache: nothing may be read through them.
  Owned table(int32_t block_size) const {
    int32_t most = 0, next = num_blocks(block_size);
    for (int32_t length : lengths) most = std::max(most, (length + block_size - 1) / block_size);
    std::vector<int32_t> table;
    for (int32_t length : lengths)
      for (int32_t b = 0; b < most; ++b) table.push_back(b * block_size < length ? --next : 1 << 28);
    Owned owned = values(table);
    owned.view.ndim = 2;
    owned.view.sizes[0] = static_cast<int64_t>(lengths.size());
    owned.view.sizes[1] = owned.view.strides[0] = most;
    owned.view.strides[1] = 1;
    return owned;
  }
};

struct Heads {
  int64_t query, kv, key_dim, value_dim;
};

void run_attention(DType d, DType cache, const Sequences& s, Heads h, int32_t block_size) {
  int64_t tokens = 0;
  for (int32_t count : s.counts) tokens += count;
  const int64_t blocks = s.num_blocks(block_size);
  const auto attend = [&](Owned sinks, Owned slopes, Owned relative, int64_t window, int64_t chunk, double softcap) {
    call("paged_attention",
         pack(make(d, {1, tokens, h.query, h.value_dim}), make(d, {1, h.query, tokens, h.key_dim}),
              make(cache, {blocks, h.kv, block_size, h.key_dim}), make(cache, {blocks, h.kv, block_size, h.value_dim}),
              s.table(block_size), s.lens(), s.starts(), sinks, slopes, relative),
         {window, chunk}, {0.2, softcap});
  };
  for (int64_t window : {0, 1, 70}) {
    attend(absent(), absent(), absent(), window, 0, 0.0);
    attend(make(d, {h.query}), absent(), absent(), window, 0, 5.0);
    attend(absent(), make(DType::f32, {h.query}), absent(), 0, window, 0.0);
    attend(absent(), absent(), make(DType::f32, {1, h.query, tokens, 20}), window, 0, 0.0);
  }
}

void run_attentions(DType d, DType cache) {
  const Sequences mixed{{1, 130, 17, 65}, {1, 9, 17, 0}}, decode{{2070, 33, 5}, {1, 1, 1}};
  run_attention(d, cache, mixed, {6, 2, 40, 24}, 5);
  run_attention(d, cache, mixed, {7, 1, 64, 64}, 16);
  run_attention(d, cache, decode, {14, 2, 17, 33}, 16);
  run_attention(d, cache, decode, {70, 1, 80, 16}, 128);
}

void run_experts(DType d, DType panels) {
  constexpr int64_t kExperts = 3, kTop = 2;
  for (int64_t dim : {7, 70})
    for (int64_t hidden : {5, 45})
      for (int64_t tokens : {0, 1, 40})
        for (int64_t act = kExpertSilu; act <= kGluOss; ++act) {
          const bool has_bias = (act + tokens) % 2 == 0;
          const auto bias = [&](int64_t width) { return has_bias ? make(panels, {kExperts, width}) : absent(); };
          call("experts",
               pack(make(d, {tokens, dim}), make(d, {tokens, dim}), make(DType::i64, {tokens, kTop}, kExperts + 1),
                    make(act % 2 ? d : DType::f32, {tokens, kTop}),
                    make(panels, {kExperts, panels_of(2 * hidden), dim, 16}),
                    make(panels, {kExperts, panels_of(dim), hidden, 16}), bias(2 * hidden), bias(dim)),
               {act, hidden}, {1.702, 7.0});
          call("expert_linear",
               pack(make(d, {tokens, kTop, hidden}), make(d, {tokens, dim}), make(DType::i64, {tokens, kTop}, kExperts + 1),
                    make(panels, {kExperts, panels_of(hidden), dim, 16}), bias(hidden)),
               {hidden}, {});
        }
  for (int64_t order : {kSoftmaxThenTopk, kTopkThenSoftmax})
    for (int64_t num_experts : {1, 3, 37})
      for (int64_t top_k : {int64_t{1}, num_experts})
        call("route_topk", pack(make(panels, {5, top_k}), make(DType::i64, {5, top_k}), make(d, {5, num_experts})),
             {order, 1});
}

// Starts of the rows' ranges in a list of `each` entries per row.
Owned list_starts(int64_t rows, int64_t each, DType dtype) {
  Owned owned = make(dtype, {rows + 1});
  for (int64_t r = 0; r <= rows; ++r) {
    if (dtype == DType::i64) static_cast<int64_t*>(owned.view.data)[r] = r * each;
    else static_cast<int32_t*>(owned.view.data)[r] = static_cast<int32_t>(r * each);
  }
  return owned;
}

Owned filled(int64_t rows, float value) {
  Owned owned = make(DType::f32, {rows});
  for (int64_t r = 0; r < rows; ++r) static_cast<float*>(owned.view.data)[r] = value;
  return owned;
}

// `each` entries in every list of every row, some of them invalid tokens; num_top best tokens reported.
void run_sample(int64_t rows, int64_t vocab, int64_t each, int64_t num_top, float temperature, DType index) {
  const auto ids = [&] { return make(index, {rows * each}, vocab + 2); };
  const auto starts = [&] { return list_starts(rows, each, index); };
  const auto wanted = [&] {
    Owned owned = make(DType::i64, {rows});
    for (int64_t r = 0; r < rows; ++r) static_cast<int64_t*>(owned.view.data)[r] = r % 3 == 2 ? -1 : num_top;
    return owned;
  };
  const auto top = [&](DType dtype) { return make(dtype, {rows, num_top}); };
  const auto truncation = [&](float on, float off) { return filled(rows, each > 0 ? on : off); };
  for (int64_t mode = kRawLogprobs; mode <= kProcessedLogits; ++mode) {
    call("sample",
         pack(make(DType::i64, {rows}), make(DType::f32, {rows}), make(DType::i64, {rows}), top(DType::i64),
              top(DType::f32), make(DType::u8, {rows}), make(DType::f32, {rows, vocab}), filled(rows, temperature),
              make(index, {rows}, vocab + 5), truncation(0.8f, 1.0f), truncation(0.01f, 0.0f), truncation(1.2f, 1.0f),
              truncation(0.3f, 0.0f), truncation(0.3f, 0.0f), make(DType::i64, {rows}, 1 << 20),
              make(DType::i64, {rows}, 100), wanted(), starts(), ids(), make(index, {rows}, each + 1), starts(),
              ids(), make(DType::f32, {rows * each}), starts(), ids(), starts(), ids(),
              each > 0 ? make(DType::i32, {rows, (vocab + 31) / 32}, int64_t{1} << 32) : absent()),
         {mode});
  }
}

void run_sampling(DType index) {
  for (int64_t rows : {0, 1, 4})
    for (int64_t vocab : {1, 63, 64, 321})
      for (int64_t each : {0, 7}) {
        const int64_t num_top = vocab < 5 ? vocab : 5;
        for (float temperature : {0.0f, 0.9f}) run_sample(rows, vocab, each, num_top, temperature, index);
        call("row_logprobs", pack(make(DType::f32, {rows}), make(DType::i64, {rows}), make(DType::i64, {rows, num_top}),
                                  make(DType::f32, {rows, num_top}), make(DType::f32, {rows, vocab}),
                                  make(DType::i64, {rows}, vocab)));
      }
}

void run_products(DType d) {
  run_linear(d);
  if (d == DType::f32) run_packing();
  for (DType other : kFloatTypes) {
    run_codes(d, other);
    run_attentions(d, other);
    run_experts(d, other);
  }
}

void count_nested(void* counts, int64_t chunk) {
  const auto inner = [](void* count, int64_t) { static_cast<std::atomic<int>*>(count)->fetch_add(1); };
  parallel_for(5, inner, static_cast<std::atomic<int>*>(counts) + chunk);
}

// Nested calls and concurrent calls of several threads run every chunk exactly once.
void run_pool() {
  std::atomic<int> counts[4][7]{};
  std::vector<std::thread> callers;
  for (auto& mine : counts)
    callers.emplace_back([&mine] {
      for (int repeat = 0; repeat < 200; ++repeat) parallel_for(7, count_nested, mine);
    });
  for (auto& caller : callers) caller.join();
  for (auto& mine : counts)
    for (auto& count : mine)
      if (count != 5 * 200) throw std::runtime_error("a chunk ran " + std::to_string(count) + " times, not 1000");
}

}  // namespace

int main() {
  set_num_threads(3);
  run_pool();
  for (const std::string& isa : available_isas()) {
    set_cpu_isa(isa);
    for (DType index : {DType::i32, DType::i64}) run_sampling(index);
    for (DType d : kFloatTypes) {
      run_products(d);
      for (int64_t rows : {0, 1, 3, 70}) {
        for (int64_t width : {1, 6, 16, 37, 300}) {
          run_norms(d, rows, width);
          run_pointwise(d, rows, width);
          run_rows(d, rows, width);
          if (width % 2 == 0) run_rope(d, rows, width);
        }
      }
    }
    std::printf("%s: clean\n", isa.c_str());
  }
  return 0;
}
