// Row gathers: embedding tables, plain or packed, and the rows whose logits are wanted.
#include "cpu/rows.h"
#include "tile.h"

namespace fuseline::FL_ISA {
namespace {

// An id outside the table reads as a row of zeros: ids come from requests, and a kernel cannot throw.
template <class T>
void take_row(T* out, const Tensor& table, int64_t id, int64_t width) {
  const bool is_inside = id >= 0 && id < table.sizes[0];
  const T* from = static_cast<const T*>(table.data) + (is_inside ? id * table.strides[0] : 0);
  if (!is_inside)
    __builtin_memset(out, 0, width * sizeof(T));
  else
    __builtin_memcpy(out, from, width * sizeof(T));
}

struct Bytes8 { uint64_t bits; };
struct Bytes4 { uint32_t bits; };
struct Bytes2 { uint16_t bits; };
struct Bytes1 { uint8_t bits; };

// Calls body with an integer type of the dtype's size: rows are copied, not interpreted.
template <class F>
void with_size(DType dtype, const F& body) {
  switch (item_size(dtype)) {
    case 8: return body(Bytes8{});
    case 4: return body(Bytes4{});
    case 2: return body(Bytes2{});
    default: return body(Bytes1{});
  }
}

void take_rows(const Tensor& out, const Tensor& table, const Tensor& ids) {
  const int64_t width = last_size(out);
  with_size(out.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_ranges(num_rows(out), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) take_row(row<T>(out, r), table, id_at(ids, r), width);
    });
  });
}

}  // namespace

void embedding(const Tensor* t, const int64_t*, const double*) { take_rows(t[0], t[2], t[1]); }

void gather_rows(const Tensor* t, const int64_t*, const double*) { take_rows(t[0], t[1], t[2]); }

// Row `id` is stored in lane id % 16 of panel id / 16.
void embedding_panels(const Tensor* t, const int64_t* i, const double*) {
  const Tensor &out = t[0], &ids = t[1], &panels = t[2];
  const int64_t width = last_size(out);
  const bool is_paired = panels.dtype == DType::bf16;
  with_size(out.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_ranges(num_rows(out), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* to = row<T>(out, r);
        const int64_t id = id_at(ids, r);
        const bool is_inside = id >= 0 && id < i[0];
        const T* from = static_cast<const T*>(panels.data) + (is_inside ? id / kPanel * width * kPanel : 0);
        for (int64_t c = 0; c < width; ++c)
          to[c] = is_inside ? from[panel_index(is_paired, width, c, id % kPanel)] : T{};
      }
    });
  });
}

}  // namespace fuseline::FL_ISA
