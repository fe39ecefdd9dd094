"""Finished answers of /v1/responses, which later requests may name: the newest ones, in memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from fuseline.api.errors import ApiError


@dataclass(frozen=True)
class _Stored:
    response: bytes
    conversation: bytes
    """Items of the conversation, the answer included."""


class ResponseStore:
    """Keeps up to `max_count` responses of `max_bytes` together; the oldest go first."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count, self._left = max_count, max_bytes
        self._stored: OrderedDict[str, _Stored] = OrderedDict()

    def keep(self, response: dict[str, Any], items: list[Any]) -> None:
        """`items`: input of the request, with the conversation before it."""
        stored = _Stored(msgspec.json.encode(response), msgspec.json.encode([*items, *response["output"]]))
        self._stored[response["id"]] = stored
        self._left -= _size(stored)
        while self._stored and (len(self._stored) > self._max_count or self._left < 0):
            self._left += _size(self._stored.popitem(last=False)[1])

    def response(self, id: str) -> bytes:
        """JSON of a response. Raises ApiError 404."""
        return self._find(id, None).response

    def conversation(self, id: str) -> list[Any]:
        """Items up to a response. Raises ApiError 404."""
        return msgspec.json.decode(self._find(id, "previous_response_id").conversation)

    def delete(self, id: str) -> None:
        """Raises ApiError 404."""
        self._left += _size(self._find(id, None))
        del self._stored[id]

    def _find(self, id: str, param: str | None) -> _Stored:
        if id not in self._stored:
            raise ApiError(404, f"Response with id '{id[:100]}' not found.", param, "response_not_found")
        return self._stored[id]


def _size(stored: _Stored) -> int:
    return len(stored.response) + len(stored.conversation)
