"""guidance, by its engine llguidance: JSON schemas, regexes, Lark and GBNF."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import EndingMatcher

if TYPE_CHECKING:
    from llguidance import LLMatcher

BYTES_PER_CHAR = 500
"""Memory of a compiled grammar for each character of its text, about."""
SPECIAL = 0xFF
"""First byte of a token that is no text."""


class GuidanceBackend:
    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._vocabulary = vocabulary
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)), n_vocab=vocabulary.vocab_size)

    def compile(self, spec: GrammarSpec) -> GuidanceGrammar:
        """Leaves the interpreter to other threads meanwhile. Raises ValueError."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _source(spec), log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return GuidanceGrammar(matcher, self._vocabulary, BYTES_PER_CHAR * len(spec.text))

    def unpack(self, spec: GrammarSpec, data: bytes) -> GuidanceGrammar:
        return self.compile(spec)


class GuidanceGrammar:
    """A compiled grammar."""

    is_slow = False

    def __init__(self, begin: LLMatcher, vocabulary: Vocabulary, num_bytes: int) -> None:
        self._begin, self._vocabulary = begin, vocabulary
        self.num_bytes = num_bytes

    def matcher(self, ends: Seq[int]) -> GuidanceMatcher:
        return GuidanceMatcher(self._begin.deep_copy(), ends, self._vocabulary)

    def pack(self) -> bytes:
        return b""


class GuidanceMatcher(EndingMatcher):
    def __init__(self, matcher: LLMatcher, ends: Seq[int], vocabulary: Vocabulary) -> None:
        super().__init__(ends, vocabulary)
        self._matcher = matcher

    def _advance(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def _take_back(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)

    def _fill(self, words: np.ndarray) -> None:
        """A grammar that exceeds the package's bounds on one step allows nothing from then on: its request ends."""
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def _can_end(self) -> bool:
        return self._matcher.is_accepting() and not self._matcher.is_error()


class _Tokens:
    """The vocabulary in the form that `TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        known = vocabulary.tokens[: vocabulary.vocab_size]
        tokens = [*known, *[b""] * (vocabulary.vocab_size - len(known))]
        self.special_token_ids = [token for token, text in enumerate(tokens) if not text]
        self.tokens = [text or bytes([SPECIAL]) + b"<%d>" % token for token, text in enumerate(tokens)]
        self._ids = {text: token for token, text in enumerate(tokens) if text}
        self._longest = max(map(len, self._ids), default=0)
        self.eos_token_id = vocabulary.eos_token_ids[0] if vocabulary.eos_token_ids else self.special_token_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that a grammar forces, the longest ones first."""
        found, begin = [], 0
        while begin < len(text):
            ends = range(min(len(text), begin + self._longest), begin, -1)
            end = next((end for end in ends if text[begin:end] in self._ids), None)
            if end is None:
                break  # no token goes on: none can be forced
            found.append(self._ids[text[begin:end]])
            begin = end
        return found


def _source(spec: GrammarSpec) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "json_schema":
        form = json.loads(spec.text)
        overrides = {"whitespace_pattern": form["whitespace"], "lenient": False, "coerce_one_of": False}
        return LLMatcher.grammar_from_json_schema(json.dumps(form["schema"]), overrides=overrides)
    return LLMatcher.grammar_from_lark(spec.text if spec.kind == "lark" else gbnf_to_lark(spec.text))
