"""THE order of passes, and the settings of each."""

from __future__ import annotations

from fuseline.compile.graph.runner import Stages
from fuseline.compile.passes.choose_kernels import choose_kernels
from fuseline.compile.passes.keep_last_logits import keep_last_logits
from fuseline.compile.passes.page_attention import page_attention

SERVE = ("serve", (page_attention, keep_last_logits))

REFERENCE: Stages = (SERVE,)
"""Level 0: what serving needs, on reference ops."""

COMPILED: Stages = (SERVE, ("lower", (choose_kernels,)))


def stages(level: int) -> Stages:
    return COMPILED if level > 0 else REFERENCE
