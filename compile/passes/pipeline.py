"""THE order of passes, and the settings of each."""

from __future__ import annotations

from fuseline.compile.graph.runner import Stages
from fuseline.compile.passes.keep_last_logits import keep_last_logits
from fuseline.compile.passes.page_attention import page_attention

REFERENCE: Stages = (("serve", (page_attention, keep_last_logits)),)
"""Level 0."""


def stages(level: int) -> Stages:
    return REFERENCE
