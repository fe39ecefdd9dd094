"""Log-probabilities in the three shapes of the wire (SPEC 4.2, 5.3, 6.8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

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
        pairs = list(zip(position.top_ids, position.top_logprobs, strict=True))[:num_top]
        own = self._entry(position.token_id, position.logprob)
        return {**own, "top_logprobs": [self._entry(token, value) for token, value in pairs]}

    def _entry(self, token_id: int, logprob: float) -> dict:
        raw = self._tokenizer.token_bytes(token_id) if self._tokenizer else b""
        return {"token": self.text(token_id), "logprob": finite(logprob), "bytes": list(raw)}

    def completion(self, positions: Positions, tokens: Sequence[int], offset: int) -> dict[str, list]:
        """choices[].logprobs of completions; `offset` is the text before the first token, None stands for no value."""
        out: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, position in zip(tokens, positions, strict=True):
            out["text_offset"].append(offset)
            out["tokens"].append(self.text(token))
            out["token_logprobs"].append(None if position is None else finite(position.logprob))
            out["top_logprobs"].append(None if position is None else self._top(position))
            offset += self.length(token)
        return out

    def length(self, token_id: int) -> int:
        """Characters of a token's text."""
        return len(self._tokenizer.token_text(token_id) if self._tokenizer else self.text(token_id))

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        top = {self.text(t): finite(v) for t, v in zip(position.top_ids, position.top_logprobs, strict=True)}
        return {**top, self.text(position.token_id): finite(position.logprob)}

    def prompt(self, positions: Positions) -> list[dict | None]:
        """prompt_logprobs: token id -> logprob, rank, decoded token."""
        return [None if p is None else self._prompt_entry(p) for p in positions]

    def _prompt_entry(self, position: PositionLogprobs) -> dict[str, dict]:
        entries = {
            str(token): {"logprob": finite(value), "rank": rank, "decoded_token": self.text(token)}
            for rank, (token, value) in enumerate(zip(position.top_ids, position.top_logprobs, strict=True), start=1)
        }
        entries[str(position.token_id)] = {
            "logprob": finite(position.logprob), "rank": position.rank, "decoded_token": self.text(position.token_id),
        }  # fmt: skip
        return entries


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

    def __init__(self, writer: LogprobWriter, offset: int = 0) -> None:
        self._writer = writer
        self._offset = offset  # characters of the choice's text so far
        self._lists: dict[str, JsonList] = {}

    def copy(self) -> CompletionLogprobs:
        made = CompletionLogprobs(self._writer)
        made._offset = self._offset
        made._lists = {name: JsonList(items.parts) for name, items in self._lists.items()}
        return made

    async def extend(self, positions: Positions, tokens: Sequence[int], turns: Turns) -> None:
        for at in range(0, len(tokens), SLICE):
            await turns.rest()
            self.add(positions[at : at + SLICE], tokens[at : at + SLICE])

    def add(self, positions: Positions, tokens: Sequence[int]) -> None:
        """Encode a few positions without a pause."""
        if not tokens:
            return
        out = self._writer.completion(positions, tokens, self._offset)
        for name, items in out.items():
            self._lists.setdefault(name, JsonList()).extend(items)
        self._offset = out["text_offset"][-1] + self._writer.length(tokens[-1])

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
