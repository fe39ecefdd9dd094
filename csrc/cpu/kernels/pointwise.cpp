// Element-wise ops over any strides and dtypes: each row is converted to fp32 (int64 if all operands are integral) in
// slices, computed, and rounded once to the output's dtype.
#include "cpu/rows.h"
#include "cpu/vec_math.h"

extern "C" float powf(float, float);
extern "C" float cosf(float);
extern "C" float sinf(float);
extern "C" float logf(float);
extern "C" float log1pf(float);

namespace fuseline::FL_ISA {
namespace {

constexpr int64_t kSlice = 256;  // elements of a slice; a multiple of kLanes for every ISA

bool is_integral(DType dtype) { return dtype == DType::i64 || dtype == DType::i32 || dtype == DType::u8; }

// A cursor over an operand whose size-1 (or missing) dimensions are broadcast to `shape`.
struct Operand {
  const Tensor* tensor;
  int64_t strides[kMaxDims];
};

Operand broadcast(const Tensor& t, const Tensor& shape) {
  Operand operand{&t, {}};
  const int32_t missing = shape.ndim - t.ndim;
  for (int32_t d = 0; d < shape.ndim; ++d)
    operand.strides[d] = d < missing || t.sizes[d - missing] == 1 ? 0 : t.strides[d - missing];
  return operand;
}

int64_t offset_of(const Operand& operand, const Tensor& shape, int64_t index) {
  int64_t offset = 0;
  for (int d = shape.ndim - 2; d >= 0; --d) {
    offset += index % shape.sizes[d] * operand.strides[d];
    index /= shape.sizes[d];
  }
  return offset;
}

template <class T>
FL_INLINE void read_floats(float* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1) {
    for_columns(n, [&](int64_t c, int64_t count) { store_some(to + c, load_some(from + c, count), count); });
    return;
  }
  for (int64_t k = 0; k < n; ++k) to[k] = to_float(from[k * stride]);
}

template <class T, class To>
FL_INLINE void convert(To* to, const T* from, int64_t stride, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k] = static_cast<To>(from[k * stride]);
}

void read(float* to, const Tensor& t, int64_t at, int64_t stride, int64_t n) {
  switch (t.dtype) {
    case DType::f32: return read_floats(to, static_cast<const float*>(t.data) + at, stride, n);
    case DType::bf16: return read_floats(to, static_cast<const bf16*>(t.data) + at, stride, n);
    case DType::f16: return read_floats(to, static_cast<const f16*>(t.data) + at, stride, n);
    case DType::i64: return convert(to, static_cast<const int64_t*>(t.data) + at, stride, n);
    case DType::i32: return convert(to, static_cast<const int32_t*>(t.data) + at, stride, n);
    case DType::u8: return convert(to, static_cast<const uint8_t*>(t.data) + at, stride, n);
  }
}

void read(int64_t* to, const Tensor& t, int64_t at, int64_t stride, int64_t n) {
  switch (t.dtype) {
    case DType::i64: return convert(to, static_cast<const int64_t*>(t.data) + at, stride, n);
    case DType::i32: return convert(to, static_cast<const int32_t*>(t.data) + at, stride, n);
    default: return convert(to, static_cast<const uint8_t*>(t.data) + at, stride, n);
  }
}

template <class T>
FL_INLINE void write_floats(T* to, int64_t stride, const float* from, int64_t n) {
  if (stride == 1) {
    for_columns(n, [&](int64_t c, int64_t count) { store_some(to + c, load_some(from + c, count), count); });
    return;
  }
  for (int64_t k = 0; k < n; ++k) to[k * stride] = from_float<T>(from[k]);
}

template <class T, class From>
FL_INLINE void write_integers(T* to, int64_t stride, const From* from, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[k * stride] = static_cast<T>(static_cast<int64_t>(from[k]));
}

void write(const Tensor& t, int64_t at, int64_t stride, const float* from, int64_t n) {
  switch (t.dtype) {
    case DType::f32: return write_floats(static_cast<float*>(t.data) + at, stride, from, n);
    case DType::bf16: return write_floats(static_cast<bf16*>(t.data) + at, stride, from, n);
    case DType::f16: return write_floats(static_cast<f16*>(t.data) + at, stride, from, n);
    case DType::i64: return write_integers(static_cast<int64_t*>(t.data) + at, stride, from, n);
    case DType::i32: return write_integers(static_cast<int32_t*>(t.data) + at, stride, from, n);
    case DType::u8: return write_integers(static_cast<uint8_t*>(t.data) + at, stride, from, n);
  }
}

void write(const Tensor& t, int64_t at, int64_t stride, const int64_t* from, int64_t n) {
  switch (t.dtype) {
    case DType::i64: return write_integers(static_cast<int64_t*>(t.data) + at, stride, from, n);
    case DType::i32: return write_integers(static_cast<int32_t*>(t.data) + at, stride, from, n);
    default: return write_integers(static_cast<uint8_t*>(t.data) + at, stride, from, n);
  }
}

// compute(a, b, n) writes its result to `a`; b is null for unary ops. Number is float or int64_t.
template <class Number, class F>
void map(const Tensor& out, const Tensor& a, const Tensor* b, const F& compute) {
  Tensor shape = out;
  if (shape.ndim == 0) {
    shape.ndim = 1;
    shape.sizes[0] = 1;
    shape.strides[0] = 0;
  }
  const Operand to = broadcast(shape, shape), in_a = broadcast(a, shape), in_b = broadcast(b ? *b : a, shape);
  const int last = shape.ndim - 1;
  const int64_t width = shape.sizes[last];
  parallel_ranges(num_rows(shape), row_grain(width), [&](int64_t begin, int64_t end) {
    alignas(64) Number x[kSlice], y[kSlice];
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = offset_of(to, shape, r), at_a = offset_of(in_a, shape, r), at_b = offset_of(in_b, shape, r);
      for (int64_t c = 0; c < width; c += kSlice) {
        const int64_t n = width - c < kSlice ? width - c : kSlice;
        read(x, a, at_a + c * in_a.strides[last], in_a.strides[last], n);
        if (b) read(y, *b, at_b + c * in_b.strides[last], in_b.strides[last], n);
        compute(x, y, n);
        write(out, at + c * to.strides[last], to.strides[last], x, n);
      }
    }
  });
}

template <class F>
FL_INLINE void each_vector(float* x, int64_t n, const F& op) {
  for_columns(n, [&](int64_t c, int64_t count) { store_some(x + c, op(load_some(x + c, count)), count); });
}

template <class F>
FL_INLINE void each(float* x, int64_t n, const F& op) {
  for (int64_t k = 0; k < n; ++k) x[k] = op(x[k]);
}

// Computes torch's softplus with beta = a and threshold = b.
float softplus(float x, float beta, float threshold) {
  return x * beta > threshold ? x : log1pf(vexp(set1(x * beta))[0]) / beta;
}

void apply_unary(float* x, int64_t n, int64_t code, float a, float b) {
  switch (code) {
    case kNeg: return each_vector(x, n, [](vf v) { return -v; });
    case kSilu: return each_vector(x, n, [](vf v) { return vsilu(v); });
    case kGelu: return each_vector(x, n, [](vf v) { return vgelu(v); });
    case kGeluTanh: return each_vector(x, n, [](vf v) { return vgelu_tanh(v); });
    case kRelu: return each_vector(x, n, [](vf v) { return vrelu(v); });
    case kTanh: return each_vector(x, n, [](vf v) { return vtanh(v); });
    case kSigmoid: return each_vector(x, n, [](vf v) { return vsigmoid(v); });
    case kExp: return each_vector(x, n, [](vf v) { return vexp(v); });
    case kCos: return each(x, n, [](float v) { return cosf(v); });
    case kSin: return each(x, n, [](float v) { return sinf(v); });
    case kRsqrt: return each_vector(x, n, [](vf v) { return 1.0f / vsqrt(v); });
    case kSqrt: return each_vector(x, n, [](vf v) { return vsqrt(v); });
    case kSquare: return each_vector(x, n, [](vf v) { return v * v; });
    case kClamp: return each_vector(x, n, [a, b](vf v) { return select((vi)(v != v), v, vmin(vmax(v, set1(a)), set1(b))); });
    case kReciprocal: return each_vector(x, n, [](vf v) { return 1.0f / v; });
    case kAbs: return each_vector(x, n, [](vf v) { return vabs(v); });
    case kLog: return each(x, n, [](float v) { return logf(v); });
    case kSoftplus: return each(x, n, [a, b](float v) { return softplus(v, a, b); });
  }
}

template <class F>
FL_INLINE void zip(float* x, const float* y, int64_t n, const F& op) {
  for_columns(n, [&](int64_t c, int64_t count) {
    store_some(x + c, op(load_some(x + c, count), load_some(y + c, count)), count);
  });
}

FL_INLINE vf keep_nan(vf a, vf b, vf r) { return select((vi)((a != a) | (b != b)), a + b, r); }

void apply_binary(float* x, const float* y, int64_t n, int64_t code, float alpha) {
  switch (code) {
    case kAdd: return zip(x, y, n, [alpha](vf a, vf b) { return a + alpha * b; });
    case kSub: return zip(x, y, n, [alpha](vf a, vf b) { return a - alpha * b; });
    case kMul: return zip(x, y, n, [](vf a, vf b) { return a * b; });
    case kDiv: return zip(x, y, n, [](vf a, vf b) { return a / b; });
    case kMax: return zip(x, y, n, [](vf a, vf b) { return keep_nan(a, b, vmax(a, b)); });
    case kMin: return zip(x, y, n, [](vf a, vf b) { return keep_nan(a, b, vmin(a, b)); });
    case kRsub: return zip(x, y, n, [alpha](vf a, vf b) { return b - alpha * a; });
    case kPow:
      for (int64_t k = 0; k < n; ++k) x[k] = powf(x[k], y[k]);
  }
}

// Integer division truncates toward zero; division by zero gives zero, since a kernel must not trap.
int64_t apply_integer(int64_t a, int64_t b, int64_t code, int64_t alpha) {
  switch (code) {
    case kAdd: return a + alpha * b;
    case kSub: return a - alpha * b;
    case kMul: return a * b;
    case kDiv: return b ? a / b : 0;
    case kMax: return a > b ? a : b;
    case kMin: return a < b ? a : b;
    case kRsub: return b - alpha * a;
    default: break;
  }
  int64_t power = 1;
  for (int64_t k = 0; k < b; ++k) power *= a;
  return power;
}

}  // namespace

void copy(const Tensor* t, const int64_t*, const double*) {
  if (is_integral(t[0].dtype) && is_integral(t[1].dtype))
    map<int64_t>(t[0], t[1], nullptr, [](int64_t*, int64_t*, int64_t) {});
  else
    map<float>(t[0], t[1], nullptr, [](float*, float*, int64_t) {});
}

void unary(const Tensor* t, const int64_t* i, const double* f) {
  const auto a = static_cast<float>(f[0]), b = static_cast<float>(f[1]);
  map<float>(t[0], t[1], nullptr, [&](float* x, float*, int64_t n) { apply_unary(x, n, i[0], a, b); });
}

void binary(const Tensor* t, const int64_t* i, const double* f) {
  if (is_integral(t[0].dtype) && is_integral(t[1].dtype) && is_integral(t[2].dtype)) {
    const auto alpha = static_cast<int64_t>(f[0]);
    map<int64_t>(t[0], t[1], &t[2], [&](int64_t* x, int64_t* y, int64_t n) {
      for (int64_t k = 0; k < n; ++k) x[k] = apply_integer(x[k], y[k], i[0], alpha);
    });
    return;
  }
  const auto alpha = static_cast<float>(f[0]);
  map<float>(t[0], t[1], &t[2], [&](float* x, float* y, int64_t n) { apply_binary(x, y, n, i[0], alpha); });
}

void binary_scalar(const Tensor* t, const int64_t* i, const double* f) {
  if (is_integral(t[0].dtype) && is_integral(t[1].dtype)) {
    const auto scalar = static_cast<int64_t>(f[0]);
    map<int64_t>(t[0], t[1], nullptr, [&](int64_t* x, int64_t*, int64_t n) {
      for (int64_t k = 0; k < n; ++k) x[k] = apply_integer(x[k], scalar, i[0], 1);
    });
    return;
  }
  const auto scalar = static_cast<float>(f[0]);
  map<float>(t[0], t[1], nullptr, [&](float* x, float* y, int64_t n) {
    for (int64_t k = 0; k < n; ++k) y[k] = scalar;
    apply_binary(x, y, n, i[0], 1.0f);
  });
}

namespace {

FL_INLINE vf activate(vf x, int64_t act) {
  switch (act) {
    case kGelu: return vgelu(x);
    case kGeluTanh: return vgelu_tanh(x);
    case kRelu: return vrelu(x);
    case kTanh: return vtanh(x);
    case kSigmoid: return vsigmoid(x);
    default: return vsilu(x);
  }
}

template <class T>
void act_mul_row(T* out, const T* gate, const T* up, int64_t width, int64_t act) {
  for_columns(width, [&](int64_t c, int64_t n) {
    const vf activated = round_to<T>(activate(load_some(gate + c, n), act));
    store_some(out + c, activated * load_some(up + c, n), n);
  });
}

}  // namespace

void act_mul(const Tensor* t, const int64_t* i, const double*) {
  with_float(t[0].dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t width = last_size(t[0]);
    parallel_ranges(num_rows(t[0]), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        act_mul_row(row<T>(t[0], r), row<T>(t[1], r), row<T>(t[2], r), width, i[0]);
    });
  });
}

}  // namespace fuseline::FL_ISA
