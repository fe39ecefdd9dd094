"""lm-format-enforcer: regexes and JSON schemas, followed character by character in Python."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from fuseline.engine.messages import Vocabulary
from fuseline.engine.params import GrammarSpec
from fuseline.engine.run.grammar.backends.interface import MOST_TAKEN_BACK, EndingMatcher

BYTES_PER_CHAR = 2000
"""Memory of a compiled grammar for each character of its text, about."""
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
"""Control characters but the line feed: JSON has them nowhere, and the package would put them into strings."""


class FormatEnforcerBackend:
    def __init__(self, vocabulary: Vocabulary) -> None:
        from lmformatenforcer import TokenEnforcerTokenizerData

        texts = [_text(token) for token in vocabulary.tokens[: vocabulary.vocab_size]]
        ends = set(vocabulary.eos_token_ids)
        regular = [(token, text, True) for token, text in enumerate(texts) if text and token not in ends]
        in_json = [item for item in regular if not CONTROL.search(item[1])]
        self._vocabulary = vocabulary
        # Ending tokens are looked after by the matcher.
        self._data, self._json_data = (
            TokenEnforcerTokenizerData(tokens, _no_decoder, [], True, vocabulary.vocab_size)
            for tokens in (regular, in_json)
        )

    def compile(self, spec: GrammarSpec) -> FormatEnforcerGrammar:
        """Raises ValueError."""
        data = self._data if spec.kind == "regex" else self._json_data
        try:
            grammar = FormatEnforcerGrammar(spec, data, self._vocabulary)
            grammar.matcher(())
        except MemoryError:
            raise
        except Exception as error:  # some of the package's have no message
            raise ValueError(str(error) or f"the {spec.kind} cannot be read ({type(error).__name__})") from error
        return grammar

    def unpack(self, spec: GrammarSpec, data: bytes) -> FormatEnforcerGrammar:
        return self.compile(spec)


class FormatEnforcerGrammar:
    """A grammar. Each sequence has a parser of its own, since those of JSON change state that their copies share."""

    is_slow = False

    def __init__(self, spec: GrammarSpec, data: Any, vocabulary: Vocabulary) -> None:
        from lmformatenforcer import RegexParser

        self._spec, self._data, self._vocabulary = spec, data, vocabulary
        self._regex = RegexParser(spec.text) if spec.kind == "regex" else None
        self.num_bytes = BYTES_PER_CHAR * len(spec.text)

    def matcher(self, ends: Seq[int]) -> FormatEnforcerMatcher:
        return FormatEnforcerMatcher(self._parser(), self._data, ends, self._vocabulary)

    def pack(self) -> bytes:
        return b""

    def _parser(self) -> Any:
        from lmformatenforcer import CharacterLevelParserConfig, JsonSchemaParser, RegexParser

        config = CharacterLevelParserConfig(alphabet=self._data.tokenizer_alphabet)
        if self._regex is not None:
            return RegexParser(self._regex.context, config)
        return ValidJson(JsonSchemaParser(json.loads(self._spec.text)["schema"], config))


class FormatEnforcerMatcher(EndingMatcher):
    """Keeps the states behind the last tokens, and none of those before."""

    def __init__(self, parser: Any, data: Any, ends: Seq[int], vocabulary: Vocabulary) -> None:
        from lmformatenforcer import TokenEnforcer

        super().__init__(ends, vocabulary)
        self._enforcer = TokenEnforcer(data, parser)
        self._enforcer.get_allowed_tokens(())
        self._states = [self._enforcer.prefix_states.pop(())]

    def _advance(self, token: int) -> bool:
        if not self._states[-1].allowed_tokens.is_token_allowed(token):
            return False
        states = self._enforcer.prefix_states
        states[("last",)] = self._states[-1]
        self._enforcer.get_allowed_tokens(("last", token))
        self._states = [*self._states[-MOST_TAKEN_BACK:], states.pop(("last", token))]
        return True

    def _take_back(self, num_tokens: int) -> None:
        del self._states[-num_tokens:]

    def _fill(self, words: np.ndarray) -> None:
        words |= self._states[-1].allowed_tokens.allowed_tokens.numpy()

    def _can_end(self) -> bool:
        return self._states[-1].parser.can_end()


class ValidJson:
    """A parser of the package that keeps to JSON where its own would not: it takes `1.e5`, 1e-5 for an integer, a comma
    before a bracket, and control characters in strings.
    """

    def __init__(self, inner: Any, is_in_string: bool = False, last: str = "") -> None:
        self._inner, self._is_in_string = inner, is_in_string
        self._last = last
        """The last character; between values the last that is no blank, as long as no number has begun."""

    def add_character(self, new_character: str) -> ValidJson:
        if self._is_in_string:
            is_end = new_character == '"' and self._last != "\\"
            last = "" if self._last == new_character == "\\" else new_character  # the second of two marks nothing
            return ValidJson(self._inner.add_character(new_character), not is_end, last)
        last = self._last if self._last == "," and new_character.isspace() else new_character
        return ValidJson(self._inner.add_character(new_character), new_character == '"', last)

    def get_allowed_characters(self) -> str:
        return "".join(char for char in self._inner.get_allowed_characters() if self._may(char))

    def can_end(self) -> bool:
        return self._inner.can_end()

    def shortcut_key(self) -> Any:
        return self._inner.shortcut_key()

    def cache_key(self) -> None:
        """None: its states are as many as its texts."""

    def _may(self, char: str) -> bool:
        if self._is_in_string:
            return char >= " "
        if self._last == ",":
            return char not in "}]"
        if self._last == "-":
            return char != "0"
        return not (char in "eE" and (self._last.isdigit() or self._last == "."))


def _text(token: bytes) -> str:
    """Empty for tokens that are no whole characters: the package knows of characters alone."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""


def _no_decoder(tokens: list[int]) -> str:
    """Each token is a new word to the package, which then needs no decoder."""
    raise NotImplementedError
