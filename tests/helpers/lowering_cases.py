"""The model config that tests of lowering build."""

from __future__ import annotations

from fuseline.compile.config import CompileConfig

VOCAB, D, MAX_TOKENS, NUM_NODES = 32, 12, 9, 24

CONFIG = CompileConfig("", max_num_batched_tokens=MAX_TOKENS, max_num_seqs=2)
