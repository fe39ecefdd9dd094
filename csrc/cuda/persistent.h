// The instructions of the persistent kernel (persistent.cu).
#pragma once
#include "cuda/few_rows.h"
#include "cuda/norm.h"
#include "cuda/rope.h"

namespace fuseline::cuda {
namespace {

// Codes of the steps of a `persistent` call, in the order of compile/kernels/cuda/persistent.py.
enum class StepKind : int64_t { kLinear, kLinearActMul, kNorm, kRopeCache, kPrefetch };

// A range of memory that L2 is to fetch: what the launch behind this one reads first.
struct PrefetchCall { const void* from; int64_t num_bytes; };

struct RopeStep {
  RopeArgs args;
  int64_t num_vectors;  // of a token
  bool is_wide, has_wide_table;  // vectors of four numbers; tables of float32
};

struct NormStep {
  NormArgs args;
  bool is_wide;
};

struct Step {
  StepKind kind;
  bool is_behind;  // reads or overwrites what earlier steps write or read: begins when all of them have ended
  union {
    LinearArgs linear;
    NormStep norm;
    RopeStep rope;
    PrefetchCall prefetch;
  };

  FL_DEVICE bool is_gated() const { return kind == StepKind::kLinearActMul; }
  FL_DEVICE bool is_product() const { return kind == StepKind::kLinear || is_gated(); }
};

constexpr int kMostSteps = 10;
struct Steps {
  int num_steps;
  Step steps[kMostSteps];
};
static_assert(sizeof(Steps) <= 4096, "the most that arguments of a kernel can take before CUDA 12.1");

}  // namespace
}  // namespace fuseline::cuda
