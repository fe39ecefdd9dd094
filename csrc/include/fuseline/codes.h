// Integer codes of op arguments. compile/ops/codes.py repeats them; a test keeps the two equal.
#pragma once

namespace fuseline {

// RMSNorm flavours; each fixes the order of the cast to the input dtype.
enum NormMode {
  kNormCastThenScale = 0,  // round(x * rsqrt) * weight                      (Llama)
  kNormScaleThenCast = 1,  // round(x * rsqrt * weight)                      (OLMo2, gpt-oss)
  kNormOnePlus = 2,        // round(x * rsqrt * (1 + weight)), all in fp32   (Gemma)
};

enum Unary {
  kNeg = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kTanh = 5, kSigmoid = 6, kExp = 7, kCos = 8, kSin = 9,
  kRsqrt = 10, kSqrt = 11, kSquare = 12, kClamp = 13 /* to [a, b] */, kReciprocal = 14, kAbs = 15, kLog = 16,
  kSoftplus = 17,
};

enum Binary { kAdd = 0 /* a + alpha*b */, kSub = 1, kMul = 2, kDiv = 3, kMax = 4, kMin = 5, kPow = 6, kRsub = 7 /* b - a */ };

// Which features are a pair; those of kRopeSplit are read at (2j, 2j + 1) and written at (j, j + R/2) (DeepSeek).
enum RopeLayout { kRopeHalf = 0 /* (j, j + R/2) */, kRopeInterleaved = 1 /* (2j, 2j + 1) */, kRopeSplit = 2 };

enum RouteOrder { kSoftmaxThenTopk = 0, kTopkThenSoftmax = 1 };

// Scores of a router that chooses among groups of experts.
enum RouteScore { kRouteSigmoid = 0, kRouteSoftmax = 1 };

// Expert activations: gate and up are the halves of the row, except kGluOss: interleaved, clamped, (up+1)*gate*sigmoid(alpha*gate).
enum ExpertAct { kExpertSilu = 0, kExpertGelu = 1, kExpertGeluTanh = 2, kExpertRelu = 3, kGluOss = 4 };

// What the codes of a weight stand for.
enum CodeKind {
  kCodeInt8 = 0, kCodeFp8 = 1, kCodeInt4 = 2, kCodeNf4 = 3, kCodeFp4 = 4, kCodeE2m1 = 5, kCodeIq4nl = 6,
  kCodeUint4 = 7, kCodeUint8 = 8 /* to 127 */,   // of these and uint5, zeros hold the least value of a group
  kCodeInt5 = 9, kCodeUint5 = 10,
};

// What a KV cache of one byte a number holds.
enum CacheCode { kCacheInt8 = 0, kCacheE4m3 = 1, kCacheE5m2 = 2 };

enum LogprobsMode { kRawLogprobs = 0, kProcessedLogprobs = 1, kRawLogits = 2, kProcessedLogits = 3 };

}  // namespace fuseline
