"""Text to token ids and back, on the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from fuseline.api.config import ConfigError, ServerConfig
from fuseline.api.errors import bad_request
from fuseline.api.prompt.clean_up import clean_up
from fuseline.api.prompt.control_tokens import Spans, split
from fuseline.api.prompt.fim import FimTokens, find_fim
from fuseline.api.prompt.pieces import TokenPieces
from fuseline.api.prompt.token_bound import TextBound, find_bound
from fuseline.api.prompt.tokenizer_files import TokenizerFiles, read_tokenizer

LONG_TEXT = 8192
"""Characters from which on starting the library's own threads pays."""


def open_tokenizer(config: ServerConfig) -> TextTokenizer | None:
    """None when the server is to run without. Raises ConfigError."""
    if config.skip_tokenizer_init:
        return None
    compile_config = config.engine.compile
    files = read_tokenizer(config.tokenizer_dir, compile_config.cache_dir, compile_config.trust_remote_code)
    return TextTokenizer(files)


class TextTokenizer:
    """A tokenizer as `AutoTokenizer` would load it."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.special_tokens = files.special_tokens
        """bos_token, eos_token, ... as text."""
        self.eos_id = files.eos_id
        self.chat_template = files.chat_template
        """The checkpoint's own template, or several by name."""
        self.control_tokens = files.control_tokens
        self.cleans_up = files.cleans_up
        self._tokenizer = Tokenizer.from_str(files.backend)
        self._tokenizer.encode_special_tokens = files.splits_special

    @cached_property
    def vocab_size(self) -> int:
        """Ids a tokenizer can decode, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def pieces(self) -> TokenPieces:
        """Text of single tokens inside a text."""
        return TokenPieces(self._tokenizer)

    @cached_property
    def added_tokens(self) -> dict[str, bool]:
        """Tokens that are found in a text before it is split, each with whether it is special."""
        return {token.content: token.special for token in self._tokenizer.get_added_tokens_decoder().values()}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding leaves out when special tokens are skipped."""
        return frozenset(k for k, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @property
    def backend(self) -> Tokenizer:
        """The library's own tokenizer."""
        return self._tokenizer

    @cached_property
    def bytes_per_token(self) -> TextBound | None:
        """The most text that one token can stand for; None where a token can stand for text without end."""
        return find_bound(self._tokenizer)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the tokens that `text` encodes to, at a small part of the cost of encoding; 0 if unknown."""
        return self.bytes_per_token.fewest_tokens(text) if self.bytes_per_token else 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        # A batch of one keeps no offsets (a third less time and memory) and lets other threads run meanwhile.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_chat(self, text: str, literals: Spans, add_special_tokens: bool) -> list[int]:
        """Ids of a rendered conversation, in which `literals` spell control tokens and are text.

        Raises ApiError 400 for one that this tokenizer cannot split.
        """
        if not literals:
            return self.encode(text, add_special_tokens)
        newline = self.encode("\n", False)
        ids: list[int] = []
        known: dict[str, list[int]] = {}
        for k, (piece, is_literal) in enumerate(split(text, literals)):
            if is_literal:
                if piece not in known:
                    known[piece] = self._encode_literal(piece, newline)
                ids += known[piece]
            elif piece:
                ids += self._encode_inner(piece, newline, k == 0)
        return self._framed(ids) if add_special_tokens else ids

    def encode_behind(self, text: str) -> list[int]:
        """Ids of a text that goes on behind another one."""
        return self._encode_inner(text, self.encode("\n", False), False)

    def _encode_inner(self, text: str, newline: list[int], is_first: bool) -> list[int]:
        """A piece of a text, behind a line end so that it does not count as the beginning of one."""
        if is_first:
            return self.encode(text, False)
        return _behind(newline, self.encode("\n" + text, False)) or self.encode(text, False)

    def _encode_literal(self, token: str, newline: list[int]) -> list[int]:
        """A token's name as text."""
        id = self.token_id(token)
        cuts = ((token,), *((token[:k], token[k:]) for k in range(1, len(token))))
        for parts in cuts:
            ids = [id for part in parts for id in self._encode_plain(part, newline)]
            if id not in ids:
                return ids
        raise bad_request(f"{token!r} is a control token of this model that cannot be given as text", "messages")

    def _encode_plain(self, text: str, newline: list[int]) -> list[int]:
        """Without looking for added tokens."""
        return _behind(newline, self._run_model("\n" + text)) or self._run_model(text)

    def _run_model(self, text: str) -> list[int]:
        steps = self._tokenizer
        if steps.normalizer is not None:
            text = steps.normalizer.normalize_str(text)
        words = [text] if steps.pre_tokenizer is None else [w for w, _ in steps.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in steps.model.tokenize(word)]

    def _framed(self, ids: list[int]) -> list[int]:
        """With the tokens that begin and end a text."""
        plain, framed = self.encode("a", False), self.encode("a", True)
        at = next((k for k in range(len(framed)) if framed[k : k + len(plain)] == plain), 0)
        return [*framed[:at], *ids, *framed[at + len(plain) :]]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def token_id(self, name: str) -> int | None:
        """Id of the token that the vocabulary spells so."""
        return self._tokenizer.token_to_id(name)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, as plugins written for Transformers ask for them."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def fim(self) -> FimTokens | None:
        """Tokens for filling in the middle; None for a model without."""
        return find_fim(self.token_id)

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a text, special ones included; bytes that are no character alone show as U+FFFD."""
        piece = self.pieces.inner(token_id)
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of a token, also where they are only part of a character."""
        piece = self.pieces.inner(token_id)
        return piece.encode() if isinstance(piece, str) else piece


def _behind(newline: list[int], ids: list[int]) -> list[int]:
    """The ids that follow those of a line end; none where it is not split off."""
    return ids[len(newline) :] if ids[: len(newline)] == newline else []


def read_text(path: Path) -> str:
    """A file's text. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error


def read_json(path: Path) -> dict:
    """The object in a file, empty when there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}
