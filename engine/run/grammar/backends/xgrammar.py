"""xgrammar: EBNF, Lark and structural tags. The default, and what all other code of this server is written for."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from fuseline.engine.messages import GrammarSpec, Vocabulary

if TYPE_CHECKING:
    import xgrammar as xg


class XGrammar:
    """A compiled grammar."""

    def __init__(self, compiled: xg.CompiledGrammar) -> None:
        self.compiled = compiled
        self.num_bytes = compiled.memory_size_bytes

    def matcher(self, ends: Seq[int]) -> xg.GrammarMatcher:
        import xgrammar as xg

        return xg.GrammarMatcher(self.compiled, override_stop_tokens=list(ends) or None)

    def pack(self) -> bytes:
        """Empty: xgrammar writes and reads a compiled grammar as JSON, which takes ten times as long as compiling."""
        return b""


class XGrammarBackend:
    def __init__(self, vocabulary: Vocabulary) -> None:
        """Tokens without bytes are special: no text of a grammar has them."""
        import xgrammar as xg

        tokens, size = list(vocabulary.tokens), vocabulary.vocab_size
        self._info = xg.TokenizerInfo(
            tokens[:size], vocab_type=xg.VocabType.RAW, vocab_size=size, stop_token_ids=list(vocabulary.eos_token_ids)
        )

    def compile(self, spec: GrammarSpec) -> XGrammar:
        """Leaves the interpreter to other threads meanwhile."""
        import xgrammar as xg

        compiler = xg.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        if spec.kind == "ebnf":
            return XGrammar(compiler.compile_grammar(spec.text))
        if spec.kind == "lark":
            return XGrammar(compiler.compile_lark(spec.text))
        return XGrammar(compiler.compile_structural_tag(json.loads(spec.text)))

    def unpack(self, spec: GrammarSpec, data: bytes) -> XGrammar:
        return self.compile(spec)
