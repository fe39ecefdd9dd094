// Runs kernels on exactly sized heap memory for every instruction set, so that a sanitizer sees any stray access.
// Values are compared with torch elsewhere (tests/test_native_kernels.py); here only memory and arithmetic are watched.
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
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

// Contiguous; floats of any dtype get bits of small numbers, integers get values below `limit`.
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
  check_args(op_schemas()[op], shapes);
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
  const auto ids = [&] { return make(DType::i64, {rows}, 40); };  // some lie outside the table of 33
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
  const auto cache = [&] { return make(d, {6, 2, 4, head_dim}); };
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

}  // namespace

int main() {
  set_num_threads(3);
  for (const std::string& isa : available_isas()) {
    set_cpu_isa(isa);
    for (DType d : {DType::f32, DType::bf16, DType::f16}) {
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
