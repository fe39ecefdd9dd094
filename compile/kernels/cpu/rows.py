"""Rows picked by number on a CPU."""

from __future__ import annotations

from fuseline.compile.kernels.plan_call import native

IMPLEMENTATIONS = (
    native("aten.embedding", "embedding", ids=lambda node: node.args[1]),
    native("embedding_panels"),
    native("gather_rows"),
)
