"""Log-probabilities in the three shapes of the wire (SPEC 4.2, 5.3, 6.8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any

import msgspec

from fuseline.api.output.detokenizer import Detokenizer
from fuseline.api.output.pace import Turns
from fuseline.api.prompt.encode import TextTokenizer
from fuseline.engine.messages import PositionLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""
SLICE = 32
"""Positions that are written without a pause."""
Positions = Sequence[PositionLogprobs | None]


class LogprobWriter:
    """Writes log-probabilities, with tokens spelled as text or as token_id:N."""

    def __init__(self, tokenizer: TextTokenizer | None, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def chat(self, positions: Sequence[PositionLogprobs], num_top: int) -> dict:
        """choices[].logprobs of chat."""
        return {"content": self.chat_tokens(positions, num_top)}

    def chat_tokens(self, positions: Positions, num_top: int) -> list[dict]:
        return [self._chat_token(position, num_top) for position in positions]

    def _chat_token(self, position: PositionLogprobs, num_top: int) -> dict:
        own = self._entry(position.token_id, position.logprob)
        others = zip(position.top_ids, position.top_logprobs, strict=True)
        top = [own, *(self._entry(token, value) for token, value in others if token != position.token_id)]
        return {**own, "top_logprobs": top[:num_top]}

    def _entry(self, token_id: int, logprob: float) -> dict:
        raw = self._tokenizer.token_bytes(token_id) if self._tokenizer else b""
        return {"token": self.text(token_id), "logprob": finite(logprob), "bytes": list(raw)}

    def completion(self, positions: Positions, tokens: Sequence[int], offsets: Sequence[int]) -> dict[str, list]:
        """choices[].logprobs of completions. `offsets`: characters before each token; None stands for no value."""
        return {
            "text_offset": list(offsets),
            "token_logprobs": [None if position is None else finite(position.logprob) for position in positions],
            "tokens": [self.text(token) for token in tokens],
            "top_logprobs": [None if position is None else self._top(position) for position in positions],
        }

    def prompt_offsets(self, tokens: Sequence[int], text: str) -> Iterator[int]:
        """Characters of an echoed prompt before each of its tokens."""
        if self._tokenizer is None:
            return repeat(0, len(tokens))
        return _prompt_offsets(self._tokenizer, tokens, text)

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """The alternatives by their text, the token itself first; one whose text another one has goes by its id."""
        top = {self.text(position.token_id): finite(position.logprob)}
        for token, value in zip(position.top_ids, position.top_logprobs, strict=True):
            if token != position.token_id:
                name = self.text(token)
                top[f"token_id:{token}" if name in top else name] = finite(value)
        return top

    def prompt(self, positions: Positions) -> list[dict | None]:
        """prompt_logprobs: token id -> logprob, rank, decoded token."""
        return [None if p is None else self._prompt_entry(p) for p in positions]

    def _prompt_entry(self, position: PositionLogprobs) -> dict[str, dict]:
        entries = {str(position.token_id): self._prompt_token(position.token_id, position.logprob, position.rank)}
        tops = enumerate(zip(position.top_ids, position.top_logprobs, strict=True), start=1)
        for rank, (token, value) in tops:
            if token != position.token_id:
                entries[str(token)] = self._prompt_token(token, value, rank)
        return entries

    def _prompt_token(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": self.text(token_id)}


def _prompt_offsets(tokenizer: TextTokenizer, tokens: Sequence[int], text: str) -> Iterator[int]:
    """Tokens that the tokenizer has added to the text, and the blank before its first word, take no place in it."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    at = 0
    for token in tokens:
        yield at
        piece = detokenizer.feed(token)
        if not at and not text.startswith(piece):
            piece = piece[1:] if piece[:1] == " " and text.startswith(piece[1:]) else piece
        if token not in tokenizer.special_ids or text.startswith(piece, at):
            at = min(at + len(piece), len(text))


class JsonList:
    """A list that is encoded while it grows; `encode_pieces` puts it into a larger object."""

    def __init__(self, parts: Sequence[bytes] = ()) -> None:
        self.parts = list(parts)

    def extend(self, items: Sequence[Any]) -> None:
        if items:
            self.parts.append(msgspec.json.encode(items)[1:-1])


MARK = b"\0"
"""Stands for a JsonList in a message; JSON has no such byte."""


def encode_pieces(body: dict[str, Any]) -> list[bytes]:
    """A JSON object with JsonLists in it, whose parts are not copied: they can be many megabytes."""
    lists: list[JsonList] = []

    def stand_in(value: object) -> msgspec.Raw:
        if not isinstance(value, JsonList):
            raise TypeError(f"{type(value).__name__} is not JSON")
        lists.append(value)
        return msgspec.Raw(MARK)

    first, *rest = msgspec.json.encode(body, enc_hook=stand_in).split(MARK)
    pieces = [first]
    for items, text in zip(lists, rest, strict=True):
        pieces[-1] += b"["
        for part in items.parts:
            pieces += (part, b",")
        if items.parts:
            pieces.pop()
        pieces.append(b"]" + text)
    return pieces


class CompletionLogprobs:
    """choices[].logprobs of one completion, encoded while it grows."""

    def __init__(self, writer: LogprobWriter) -> None:
        self._writer = writer
        self._lists: dict[str, JsonList] = {}

    def copy(self) -> CompletionLogprobs:
        made = CompletionLogprobs(self._writer)
        made._lists = {name: JsonList(items.parts) for name, items in self._lists.items()}
        return made

    async def extend(self, positions: Positions, tokens: Sequence[int], offsets: Iterable[int], turns: Turns) -> None:
        left = iter(offsets)
        for at in range(0, len(tokens), SLICE):
            await turns.rest()
            some = tokens[at : at + SLICE]
            self.add(positions[at : at + SLICE], some, list(islice(left, len(some))))

    def add(self, positions: Positions, tokens: Sequence[int], offsets: Sequence[int]) -> None:
        """Encode a few positions without a pause."""
        for name, items in self._writer.completion(positions, tokens, offsets).items():
            self._lists.setdefault(name, JsonList()).extend(items)

    def lists(self) -> dict[str, JsonList]:
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        return {name: self._lists.get(name) or JsonList() for name in names}


async def encode_slices(write: Callable[[Positions], list], positions: Positions, turns: Turns) -> JsonList:
    """Encode the positions with `write`, in slices."""
    made = JsonList()
    for at in range(0, len(positions), SLICE):
        await turns.rest()
        made.extend(write(positions[at : at + SLICE]))
    return made


def finite(value: float) -> float:
    return value if value > LOWEST else LOWEST
