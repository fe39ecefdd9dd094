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
    output_config: dict[str, Any] | None = None
    # Known, and refused where they ask for something.
    container: str | dict[str, Any] | None = None
    mcp_servers: list[dict[str, Any]] | None = None
    context_management: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    stream: bool | None = None
    # Anthropic's own, which by their definition change no answer: accepted.
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
