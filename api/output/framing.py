"""How chunks of a stream are written as server-sent events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from fuseline.api.errors import ApiError


def sse(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def named_sse(body: dict[str, Any]) -> bytes:
    """An event that also has its type as its name."""
    return b"event: " + body["type"].encode() + b"\n" + sse(body)


@dataclass(frozen=True)
class Framing:
    """One API's way."""

    write: Callable[[dict[str, Any]], bytes] = sse
    end: bytes = b"data: [DONE]\n\n"
    failure: Callable[[ApiError], dict[str, Any]] = ApiError.body
    """The chunk of an error."""


OPENAI = Framing()
