"""xgrammar: EBNF, Lark and structural tags. The default, and what all other code of this server is written for."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
import torch

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import MOST_TAKEN_BACK

if TYPE_CHECKING:
    import xgrammar as xg


class XGrammar:
    """A compiled grammar. `free`: int32 [ceil(V / 32)], tokens that free text may hold and that are no text to it."""

    is_slow = False

    def __init__(self, compiled: xg.CompiledGrammar, free: np.ndarray | None = None) -> None:
        self.compiled = compiled
        self.num_bytes = compiled.memory_size_bytes
        self.has_free_text = free is not None
        self._free = free

    def matcher(self, ends: Seq[int]) -> xg.GrammarMatcher | FreeTextMatcher:
        import xgrammar as xg

        made = xg.GrammarMatcher(self.compiled, override_stop_tokens=list(ends) or None)
        return made if self._free is None else FreeTextMatcher(made, self._free)

    def pack(self) -> bytes:
        """Empty: xgrammar writes and reads a compiled grammar as JSON, which takes ten times as long as compiling."""
        return b""


class FreeTextMatcher:
    """Takes special tokens too where the text is free: where it could end."""

    def __init__(self, matcher: xg.GrammarMatcher, free: np.ndarray) -> None:
        self._matcher, self._free = matcher, free
        self._is_passed: deque[bool] = deque(maxlen=MOST_TAKEN_BACK)
        """Whether each of the last tokens is none to the grammar."""

    def accept_token(self, token: int) -> bool:
        is_special = bool(self._free[token // 32] >> (token % 32) & 1)
        is_taken = self._matcher.is_completed() if is_special else self._matcher.accept_token(token)
        if is_taken:
            self._is_passed.append(is_special)
        return is_taken

    def rollback(self, num_tokens: int) -> None:
        passed = [self._is_passed.pop() for _ in range(num_tokens)]
        if num_taken := passed.count(False):
            self._matcher.rollback(num_taken)

    def is_terminated(self) -> bool:
        return self._matcher.is_terminated()

    def fill_next_token_bitmask(self, mask: torch.Tensor) -> None:
        self._matcher.fill_next_token_bitmask(mask)
        if self._matcher.is_completed():
            mask.numpy()[0] |= self._free


class XGrammarBackend:
    def __init__(self, vocabulary: Vocabulary) -> None:
        """Tokens without bytes are special: no text of a grammar has them, but for those that it spells."""
        self._vocabulary = vocabulary
        self._infos: dict[tuple[tuple[int, str], ...], xg.TokenizerInfo] = {}
        self._info(())

    def _info(self, spelled: tuple[tuple[int, str], ...]) -> xg.TokenizerInfo:
        import xgrammar as xg

        if spelled not in self._infos:
            vocabulary, tokens = self._vocabulary, list(self._vocabulary.tokens)
            for token, text in spelled:
                tokens[token] = text.encode()
            size, ends = vocabulary.vocab_size, list(vocabulary.eos_token_ids)
            self._infos[spelled] = xg.TokenizerInfo(
                tokens[:size], vocab_type=xg.VocabType.RAW, vocab_size=size, stop_token_ids=ends
            )
        return self._infos[spelled]

    def _free(self, spec: GrammarSpec) -> np.ndarray | None:
        if not spec.is_free:
            return None
        vocabulary, spelled = self._vocabulary, {token for token, _ in spec.spelled}
        bits = np.zeros(-(-vocabulary.vocab_size // 32) * 32, np.uint8)
        for token, text in enumerate(vocabulary.tokens[: vocabulary.vocab_size]):
            bits[token] = not text and token not in spelled and token not in vocabulary.eos_token_ids
        return np.packbits(bits, bitorder="little").view(np.int32)

    def compile(self, spec: GrammarSpec) -> XGrammar:
        """Leaves the interpreter to other threads meanwhile."""
        import xgrammar as xg

        compiler = xg.GrammarCompiler(self._info(spec.spelled), max_threads=1, cache_enabled=False)
        if spec.kind == "ebnf":
            return XGrammar(compiler.compile_grammar(spec.text))
        if spec.kind == "lark":
            return XGrammar(compiler.compile_lark(spec.text))
        return XGrammar(compiler.compile_structural_tag(json.loads(spec.text)), self._free(spec))

    def unpack(self, spec: GrammarSpec, data: bytes) -> XGrammar:
        return self.compile(spec)
