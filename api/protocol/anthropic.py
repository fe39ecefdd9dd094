"""POST /v1/messages and /v1/messages/count_tokens (SPEC 24.2)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fuseline.api.protocol.common import MAX_NAME, Fields


class AnthropicMessage(Fields):
    role: str = Field(max_length=MAX_NAME)
    content: str | list[dict[str, Any]]


class CountTokensRequest(Fields):
    model: str | None = None
    messages: list[AnthropicMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
