// Codes of weights (compile/ops/code_rows.py) to numbers of half precision, eight inputs of an output at a time.
#pragma once
#include "cuda/device.h"
#include "cuda/fp8.h"

namespace fuseline::cuda {

// Kinds of csrc/include/fuseline/codes.h. kSpan: inputs in 64 bytes; four lanes hold 16 bytes of them each.
struct Int8Codes { static constexpr int kSpan = 64; };
struct Fp8Codes { static constexpr int kSpan = 64; };
struct Int4Codes { static constexpr int kSpan = 128; };

// Any 16 values: the low and the high bytes of their half-precision bits, four a register.
struct Lut4Codes {
  static constexpr int kSpan = 128;
  uint32_t low[4], high[4];
};

// Pairs of neighbouring inputs, the first in the low half.
struct Pairs { uint32_t at[4]; };

// With its exponent set so that the last bits of a fraction are the units, an integer in those bits is added to it.
constexpr uint32_t kUnits128 = 0x43004300, kUnits1024 = 0x64006400;  // of bf16 and of fp16

// (0 b 0 a), bytes that are int8 numbers. bf16 has room for seven bits: the eighth stands for -128.
FL_DEVICE uint32_t of_int8(uint32_t two, Bf16) {
  return minus((two & 0x007f007f) | kUnits128, (two & 0x00800080) | kUnits128, Bf16{});
}
FL_DEVICE uint32_t of_int8(uint32_t two, Half) {
  return minus((two ^ 0x00800080) | kUnits1024, kUnits1024 + 0x00800080, Half{});
}
// (0 b 0 a), codes 0 .. 15 that stand for -8 .. 7.
FL_DEVICE uint32_t of_int4(uint32_t two, Bf16) { return minus(two | kUnits128, kUnits128 + 0x00080008, Bf16{}); }
FL_DEVICE uint32_t of_int4(uint32_t two, Half) { return minus(two | kUnits1024, kUnits1024 + 0x00080008, Half{}); }

template <class T>
FL_DEVICE Pairs decode(uint32_t first, uint32_t second, Int8Codes, T type) {
  return {{of_int8(first_bytes(first) >> 8, type), of_int8(last_bytes(first) >> 8, type),
           of_int8(first_bytes(second) >> 8, type), of_int8(last_bytes(second) >> 8, type)}};
}
template <class T>
FL_DEVICE Pairs decode(uint32_t first, uint32_t second, Fp8Codes, T type) {
  const uint2 low = widen(first, E4m3{}, type), high = widen(second, E4m3{}, type);
  return {{low.x, low.y, high.x, high.y}};
}

// Words of 4 bits hold inputs 0, 2, 4, 6 in their low half, 1, 3, 5, 7 in the high one.
template <class T>
FL_DEVICE Pairs decode(uint32_t word, Int4Codes, T type) {
  Pairs to;
#pragma unroll
  for (int p = 0; p < 4; ++p) to.at[p] = of_int4(word >> (4 * p) & 0x000f000f, type);
  return to;
}

// Bytes of a table of 16 at four codes, the lowest four bits of `codes` first; `is_upper` is 0xff for codes from 8 on.
FL_DEVICE uint32_t looked_up(const uint32_t (&table)[4], uint32_t codes, uint32_t is_upper) {
  return (permute(table[0], table[1], codes) & ~is_upper) | (permute(table[2], table[3], codes) & is_upper);
}
template <class T>
FL_DEVICE Pairs decode(uint32_t word, const Lut4Codes& table, T) {
  // A selector of 8 + n repeats the sign of byte n: the highest bits of codes, the even ones shifted there.
  const uint32_t shifted = word << 4, codes = word & 0x77777777;
  const uint32_t even = permute(shifted, word, 0xd9c8), odd = permute(shifted, word, 0xfbea);
  const uint32_t even_low = looked_up(table.low, codes, even), even_high = looked_up(table.high, codes, even);
  const uint32_t odd_low = looked_up(table.low, codes >> 16, odd), odd_high = looked_up(table.high, codes >> 16, odd);
  const uint32_t even01 = permute(even_low, even_high, 0x5140), even23 = permute(even_low, even_high, 0x7362);
  const uint32_t odd01 = permute(odd_low, odd_high, 0x5140), odd23 = permute(odd_low, odd_high, 0x7362);
  return {{low_halves(even01, odd01), high_halves(even01, odd01), low_halves(even23, odd23),
           high_halves(even23, odd23)}};
}

// The decoder of a kind; a table is read for those that have one.
template <class T>
FL_DEVICE void prepare(Lut4Codes& to, const float* table, T) {
  to = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = cast<T>(table[i]).bits;
    to.low[i / 4] |= (bits & 0xff) << 8 * (i % 4);
    to.high[i / 4] |= (bits >> 8) << 8 * (i % 4);
  }
}
template <class Kind, class T>
FL_DEVICE void prepare(Kind&, const float*, T) {}

}  // namespace fuseline::cuda
