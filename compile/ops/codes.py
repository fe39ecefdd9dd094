"""Integer codes that ops take; equal to csrc/include/fuseline/codes.h (a test compares)."""

from __future__ import annotations

NORM_CAST_THEN_SCALE, NORM_SCALE_THEN_CAST, NORM_ONE_PLUS = 0, 1, 2

UNARY = {
    "neg": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "tanh": 5, "sigmoid": 6, "exp": 7, "cos": 8, "sin": 9,
    "rsqrt": 10, "sqrt": 11, "square": 12, "clamp": 13, "reciprocal": 14, "abs": 15, "log": 16, "softplus": 17,
}  # fmt: skip
BINARY = {"add": 0, "sub": 1, "mul": 2, "div": 3, "max": 4, "min": 5, "pow": 6, "rsub": 7}
ROPE_HALF, ROPE_INTERLEAVED, ROPE_SPLIT = 0, 1, 2
ROUTE_SOFTMAX_TOPK, ROUTE_TOPK_SOFTMAX = 0, 1
ROUTE_SIGMOID, ROUTE_SOFTMAX = 0, 1
EXPERT_ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "glu_oss": 4}
EXPERT_UNARY = {code: UNARY.get(name) for name, code in EXPERT_ACTS.items()}
"""Code of the gate's activation by that of the experts'; None for gpt-oss's own way to combine gate and up."""
CACHES = {"int8": 0, "float8_e4m3fn": 1, "float8_e5m2": 2}
"""What a KV cache of one byte a number holds, by the name of its dtype (CacheCode)."""
