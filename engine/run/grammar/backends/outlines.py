"""outlines, by its core: regexes, and JSON schemas as regexes, as automata over the tokens of the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import MOST_TAKEN_BACK, EndingMatcher

if TYPE_CHECKING:
    from outlines_core import Guide, Index
    from outlines_core import Vocabulary as Tokens


class OutlinesBackend:
    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens: Tokens | None = None

    def compile(self, spec: GrammarSpec) -> OutlinesGrammar:
        """Raises ValueError."""
        from outlines_core import Index
        from outlines_core.json_schema import build_regex_from_schema

        pattern = spec.text
        if spec.kind == "json_schema":
            form = json.loads(spec.text)
            pattern = build_regex_from_schema(json.dumps(form["schema"]), form["whitespace"])
        if self._tokens is None:
            self._tokens = self._make_tokens()
        index = Index(pattern, self._tokens)
        return OutlinesGrammar(index, index.__reduce__()[1][0], self._vocabulary)

    def unpack(self, spec: GrammarSpec, data: bytes) -> OutlinesGrammar:
        """Reads the automaton, which takes a hundredth of the time of making it."""
        from outlines_core import Index

        return OutlinesGrammar(Index.from_binary(data), data, self._vocabulary)

    def _make_tokens(self) -> Tokens:
        from outlines_core import Vocabulary as Tokens

        found: dict[bytes, list[int]] = {}
        ends = set(self._vocabulary.eos_token_ids)
        for token, text in enumerate(self._vocabulary.tokens[: self._vocabulary.vocab_size]):
            if text and token not in ends:
                found.setdefault(text, []).append(token)
        return Tokens(next(iter(ends), self._vocabulary.vocab_size), found)


class OutlinesGrammar:
    """A compiled grammar."""

    is_slow = False

    def __init__(self, index: Index, data: bytes, vocabulary: Vocabulary) -> None:
        self._index, self._data, self._vocabulary = index, data, vocabulary
        self.num_bytes = 2 * len(data)

    def matcher(self, ends: Seq[int]) -> OutlinesMatcher:
        from outlines_core import Guide

        return OutlinesMatcher(Guide(self._index, MOST_TAKEN_BACK), ends, self._vocabulary)

    def pack(self) -> bytes:
        return self._data


class OutlinesMatcher(EndingMatcher):
    def __init__(self, guide: Guide, ends: Seq[int], vocabulary: Vocabulary) -> None:
        super().__init__(ends, vocabulary)
        self._guide = guide

    def _advance(self, token: int) -> bool:
        try:
            self._guide.advance(token, False)
        except ValueError:
            return False
        return True

    def _take_back(self, num_tokens: int) -> None:
        self._guide.rollback_state(num_tokens)

    def _fill(self, words: np.ndarray) -> None:
        self._guide.write_mask_into(words.ctypes.data, words.size, words.itemsize)

    def _can_end(self) -> bool:
        return self._guide.is_finished()
