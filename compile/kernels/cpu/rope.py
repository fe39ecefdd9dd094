"""Rotary embedding and the KV cache's write on a CPU, where no cache is scaled (fp8)."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native, without_scales

IMPLEMENTATIONS = (
    native("rope"),
    native("rope_cache", supports=without_scales("rope_cache")),
    native("write_cache", supports=without_scales("write_cache")),
)
