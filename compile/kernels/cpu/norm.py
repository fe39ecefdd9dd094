"""Norms on a CPU."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native

IMPLEMENTATIONS = tuple(native(op) for op in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"))
