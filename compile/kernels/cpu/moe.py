"""Mixture of experts on a CPU, with packed weights."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native

IMPLEMENTATIONS = (native("experts_panels", "experts"), native("route_topk"))
