// Activations of gated products, by the codes of fuseline/codes.h.
#pragma once
#include "cuda/device.h"
#include "fuseline/codes.h"

namespace fuseline::cuda {

FL_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FL_DEVICE float activate(float x, int act) {
  switch (act) {
    case kSilu: return x * sigmoid(x);
    case kGelu: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    // 0.5 (1 + tanh z) is the sigmoid of 2 z.
    case kGeluTanh: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    default: return fmaxf(x, 0.0f);
  }
}

}  // namespace fuseline::cuda
