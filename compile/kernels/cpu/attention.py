"""Attention over the paged cache on a CPU, where no cache is scaled (fp8)."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native, without_scales

IMPLEMENTATIONS = (native("paged_attention", supports=without_scales("paged_attention")),)
