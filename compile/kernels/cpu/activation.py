"""Gated activations on a CPU."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native

IMPLEMENTATIONS = (native("act_mul"),)
