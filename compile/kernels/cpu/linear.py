"""Matrix products on a CPU, with packed weights."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native

IMPLEMENTATIONS = (native("linear_panels", "linear", choices=lambda node: node.meta.get("choices", 0)),)
