// exp, tanh, erf and the activations on vectors, within about two units in the last place of fp32.
// The polynomials are minimax fits (Lawson iteration on Chebyshev nodes) over the ranges given beside them.
#pragma once
#include "cpu/vec.h"
#include "fuseline/codes.h"

namespace fuseline::FL_ISA {
namespace {

// 2^n for integral n in [-126, 127].
FL_INLINE vf pow2(vi n) { return (vf)((n + 127) << 23); }

// Adding 1.5 * 2^23 rounds x / ln 2 to n; ln 2 is split in two parts, the first of which multiplies n exactly.
FL_INLINE vf vexp(vf x) {
  constexpr float kMagic = 12582912.0f, kLog2e = 1.44269504088896341f, kLn2High = 0.693145751953125f,
                  kLn2Low = 1.428606765330187e-06f;
  vf clamped = set1(89.0f) < x ? set1(89.0f) : x;   // this operand order keeps a NaN
  clamped = set1(-104.0f) > clamped ? set1(-104.0f) : clamped;
  vf shifted = fma(clamped, set1(kLog2e), set1(kMagic));
  vf whole = shifted - kMagic;
  vf r = fma(whole, set1(-kLn2High), clamped);
  r = fma(whole, set1(-kLn2Low), r);
  vf p = set1(0.0013941109560119866f);  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, error 6e-8
  p = fma(p, r, set1(0.008363175255703672f));
  p = fma(p, r, set1(0.04166637529841601f));
  p = fma(p, r, set1(0.1666657700595071f));
  p = fma(p, r, set1(0.5000000026926887f));
  vf e = fma(p, r * r, r) + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)e, (__m512)whole);
#else
  // Two factors: 2^n itself leaves the normal range at both ends.
  vi n = (vi)shifted - bit_cast<int32_t>(kMagic), half = n >> 1;
  return select((vi)(x != x), x, e * pow2(half) * pow2(n - half));
#endif
}

// exp(x) for x <= 0, as in a softmax; x below -87 is clamped to exp(-87) = 2e-38.
FL_INLINE vf vexp_down(vf x) {
  constexpr float kMagic = 12582912.0f, kLog2e = 1.44269504088896341f, kLn2High = 0.693145751953125f,
                  kLn2Low = 1.428606765330187e-06f;
  vf clamped = set1(-87.0f) > x ? set1(-87.0f) : x;   // keeps a NaN
  vf shifted = fma(clamped, set1(kLog2e), set1(kMagic));
  vf whole = shifted - kMagic;
  vf r = fma(whole, set1(-kLn2High), clamped);
  r = fma(whole, set1(-kLn2Low), r);
  vf p = set1(0.0013941109560119866f);  // as in vexp
  p = fma(p, r, set1(0.008363175255703672f));
  p = fma(p, r, set1(0.04166637529841601f));
  p = fma(p, r, set1(0.1666657700595071f));
  p = fma(p, r, set1(0.5000000026926887f));
  vf e = fma(p, r * r, r) + 1.0f;
  return (vf)((vi)e + ((vi)shifted << 23));   // the bits of the magic number are shifted out
}

FL_INLINE vf vtanh(vf x) {
  vf a = vabs(x), z = x * x;
  vf p = set1(-0.006062236915348035f);  // (tanh(sqrt z)/sqrt z - 1)/z on z <= 0.4, error 5e-8
  p = fma(p, z, set1(0.02097501859837721f));
  p = fma(p, z, set1(-0.053846696878622764f));
  p = fma(p, z, set1(0.13332746453591213f));
  p = fma(p, z, set1(-0.33333328781404076f));
  vf small = fma(p * z, x, x);
  vf big = 1.0f - 2.0f / (vexp(a + a) + 1.0f);
  big = (vf)((vi)big | ((vi)x & (int32_t)0x80000000));
  vf r = select((vi)(a < 0.625f), small, big);
  return select((vi)(x != x), x, r);
}

FL_INLINE vf verf(vf x) {
  vf a = vabs(x), z = x * x;
  vf p = set1(8.397287950990931e-05f);  // erf(sqrt z)/sqrt z on z <= 0.85, error 4e-10
  p = fma(p, z, set1(-0.000814968757105837f));
  p = fma(p, z, set1(0.00520170580757691f));
  p = fma(p, z, set1(-0.02685969820485965f));
  p = fma(p, z, set1(0.11283701547732833f));
  p = fma(p, z, set1(-0.3761263418376419f));
  p = fma(p, z, set1(1.12837916669167f));
  vf small = p * x;
  vf c = a < 4.0f ? a : set1(4.0f);
  vf q = set1(-2.1162768791661014e-05f);  // log(erfc(a)) on [0.92, 4], error 4e-11 of erf
  q = fma(q, c, set1(0.0004352281945019426f));
  q = fma(q, c, set1(-0.004174685056773015f));
  q = fma(q, c, set1(0.025128727580932052f));
  q = fma(q, c, set1(-0.1082940945704858f));
  q = fma(q, c, set1(-0.6333345283484478f));
  q = fma(q, c, set1(-1.129520880427987f));
  q = fma(q, c, set1(0.0001758855317240647f));
  vf big = 1.0f - vexp(q);
  big = (vf)((vi)big | ((vi)x & (int32_t)0x80000000));
  vf r = select((vi)(a < 0.92f), small, big);
  return select((vi)(x != x), x, r);
}

FL_INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }
FL_INLINE vf vsilu(vf x) { return x / (1.0f + vexp(-x)); }
FL_INLINE vf vgelu(vf x) { return x * 0.5f * (1.0f + verf(x * 0.70710678118654752f)); }
FL_INLINE vf vgelu_tanh(vf x) {
  constexpr float kBeta = 0.79788456080286536f;  // sqrt(2 / pi)
  vf inner = kBeta * (x + 0.044715f * (x * x * x));
  return 0.5f * x * (1.0f + vtanh(inner));
}
FL_INLINE vf vrelu(vf x) { return select((vi)(x < 0.0f), zero(), x); }

}  // namespace
}  // namespace fuseline::FL_ISA
